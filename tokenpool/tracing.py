"""What a patched model did with each image patch, block by block."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokenpool.downsampling import Downsampled, Downsampler
from tokenpool.vit import is_patched


class BlockTrace(NamedTuple):
    """What one block did.

    Attributes:
        tokens: patch tokens that remain after the block's downsampler.
        assignment: (B, N) int64, for each of the image's N patches the token that it is in now, -1 if dropped.
        error: (B,), the reconstruction error, equation (8), of this block's downsampling alone: the squared distance of
            each token that came in to the token that it went to, or, if dropped, to the nearest that remains; summed
            over tokens. Zero where nothing happened, NaN where nothing remains.
    """

    tokens: int
    assignment: Tensor
    error: Tensor


class Trace(NamedTuple):
    """Logits (B, classes) of a forward pass, and what each block did."""

    logits: Tensor
    blocks: list[BlockTrace]


@torch.no_grad()
def trace(model: VisionTransformer, images: Tensor) -> Trace:
    """Run a patched model on images (B, C, H, W), as it is (training or evaluating), and report what it merged.

    Raises:
        ValueError: if the model is not patched.
    """
    if not is_patched(model):
        raise ValueError("the model has no downsamplers to trace; call tokenpool.patch first")
    seen: dict[int, tuple[Tensor, Downsampled]] = {}
    handles = [
        block.downsampler.register_forward_hook(_recorder(seen, index))
        for index, block in enumerate(model.blocks)
        if block.downsampler is not None
    ]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()

    first = next(iter(seen.values()))[0] if seen else None  # patch dropout may have left fewer tokens than patches
    n = first.shape[1] if seen else math.prod(model.patch_embed.dynamic_feat_size(images.shape[-2:]))
    assignment = torch.arange(n, device=images.device).expand(len(images), n)  # (B, N)
    error = torch.zeros(len(images), device=images.device)
    blocks = []
    for index in range(len(model.blocks)):
        if index in seen:
            before, after = seen[index]
            assignment = compose(assignment, after.assignment)
            n, error = after.tokens.shape[1], reconstruction_error(before, after)
        else:
            error = torch.zeros_like(error)
        blocks.append(BlockTrace(n, assignment, error))
    return Trace(logits, blocks)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Assignment (B, N) -> (B, K2) from assignments (B, N) -> (B, K1) and (B, K1) -> (B, K2); -1 stays -1."""
    if second.shape[1] == 0:
        return torch.full_like(first, -1)
    return torch.where(first >= 0, second.gather(1, first.clamp(min=0)), -1)


def reconstruction_error(tokens: Tensor, downsampled: Downsampled) -> Tensor:
    """Equation (8) with nearest-neighbour interpolation, through the assignment: tokens (B, N, D) -> (B,)."""
    kept, assignment = downsampled
    if kept.shape[1] == 0:
        return tokens.new_full((len(tokens),), torch.nan)
    tokens, kept = tokens.float(), kept.float()
    own = kept.gather(1, assignment.clamp(min=0)[:, :, None].expand(-1, -1, kept.shape[2]))
    error = (tokens - own).square().sum(-1)  # (B, N)
    nearest = torch.cdist(tokens, kept).square().amin(-1)  # (B, N)
    return torch.where(assignment >= 0, error, nearest).sum(-1)


def _recorder(seen: dict[int, tuple[Tensor, Downsampled]], index: int) -> Callable[..., None]:
    def record(module: Downsampler, inputs: tuple[Tensor, ...], output: Downsampled) -> None:
        seen[index] = (inputs[0], output)

    return record
