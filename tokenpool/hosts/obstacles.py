"""Reasons why a model cannot be pooled, guessed from the names of its modules and parameters."""

import re

from torch import nn

_OBSTACLES = (
    ("featuregetter", "features_only hands out the whole grid of patches after each block"),
    (r"dino\w*backbone", "it is a backbone, which returns the whole grid of patches after several layers"),
    ("window|swin", "its attention runs in windows, which need the whole grid of patches"),
    ("stages|downsample|pool_block|hiera|reroll", "it is hierarchical: its stages need the whole grid of patches"),
    ("rel_pos|relpos|relative_position", "its relative positions tie each token to one place of the grid"),
    ("(clip|siglip|siglip2)text", "it reads texts, and only patches of images are pooled"),
    ("parallel", "its attention and MLP run in parallel, so a downsampler cannot run between them"),
    (
        "respost",
        "its blocks normalise the output of attention and MLP; of such blocks only timm's EvaBlockPostNorm fits",
    ),
    ("diffattention", "its attention is the difference of two softmax matrices, and no adapter exists for it"),
    ("rope|rotary", "its attention rotates queries and keys, and no adapter exists for its class of attention"),
)


def obstacle(model: nn.Module) -> str:
    """Return the reason why a model or a block cannot be pooled, in words."""
    classes = (type(module).__name__ for module in model.modules())
    names = " ".join([*classes, *(name for name, _ in model.named_modules()), *model.state_dict()]).lower()
    reasons = (reason for pattern, reason in _OBSTACLES if re.search(pattern, names))
    return next(reasons, "no adapter exists for its class of blocks")
