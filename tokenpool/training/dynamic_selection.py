"""The losses of DynamicViT beside the cross-entropy: ratio and distillation (Rao et al. 2021, section 3.3)."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpool.downsampling import DynamicSelection, Masked
from tokenpool.patching import unpatch


class Decisions(NamedTuple):
    """The decisions of a predictor on a batch.

    Attributes:
        kept: (B, N), about 1 for tokens that are kept, and about 0 for tokens that this or an earlier predictor drops.
        share: the share of tokens to keep, K / N.
    """

    kept: Tensor
    share: float


def layers(model: nn.Module) -> list[DynamicSelection]:
    """Return the predictors of a model in the order of its blocks."""
    return [module for module in model.modules() if isinstance(module, DynamicSelection)]


def teacher_of(model: nn.Module) -> nn.Module:
    """Return a copy of a patched model without its patch, with the current weights, frozen."""
    return unpatch(copy.deepcopy(model)).requires_grad_(False).eval()


def losses(
    model: nn.Module, teacher: nn.Module | None, images: Tensor, ratio_penalty: float, distillation: float
) -> tuple[Tensor, Tensor]:
    """Run a model with predictors in training mode, and compute its losses without the cross-entropy.

    Args:
        model: a timm model with `DynamicSelection`.
        teacher: see `teacher_of`, or None for no distillation.
        images: (B, C, H, W).
        ratio_penalty: weight of the ratio loss.
        distillation: weight of each of the two distillation losses.

    Returns:
        Logits (B, classes), and the weighted sum of the losses.
    """
    with recorded(model) as decisions:
        features = model.forward_features(images)  # type: ignore[operator]
    logits = model.forward_head(features)  # type: ignore[operator]
    loss = ratio_penalty * ratio_loss(decisions)
    if teacher is not None:
        with torch.no_grad():
            target = teacher.eval().forward_features(images)  # type: ignore[operator]
            target_logits = teacher.forward_head(target)  # type: ignore[operator]
        loss = loss + distillation * token_loss(features, target, decisions[-1].kept)
        loss = loss + distillation * F.kl_div(
            logits.log_softmax(-1), target_logits.log_softmax(-1), reduction="batchmean", log_target=True
        )
    return logits, loss


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Decisions]]:
    """Record the decisions of all predictors while a model runs in training mode.

    Args:
        model: a model with `DynamicSelection`.

    Yields:
        A list. Each call of a predictor adds its decisions.
    """
    decisions: list[Decisions] = []

    def record(layer: nn.Module, _: Any, hints: dict[str, Tensor], found: Any) -> None:
        if isinstance(layer, DynamicSelection) and isinstance(found, Masked):
            decisions.append(Decisions(hints["sizes"] * found.mask, layer.keep / found.mask.shape[1]))

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers(model)]
    try:
        yield decisions
    finally:
        for handle in handles:
            handle.remove()


def ratio_loss(decisions: Sequence[Decisions]) -> Tensor:
    """Return the mean of (kept share of an image - share to keep)^2 over images and predictors."""
    return torch.stack([(kept.mean(dim=1) - share).square().mean() for kept, share in decisions]).mean()


def token_loss(features: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """Return the mean squared difference between the kept tokens and the teacher's tokens.

    Args:
        features: (B, P + N, D), the last tokens of the model.
        target: (B, P + N, D), the last tokens of the teacher.
        kept: (B, N), see `Decisions`. Prefix tokens do not count.
    """
    patches = kept.shape[1]
    difference = (features[:, -patches:] - target[:, -patches:]).square().mean(dim=2)  # (B, N)
    return (difference * kept).sum() / kept.sum()
