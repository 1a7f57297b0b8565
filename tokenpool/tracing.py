"""Report the token of each image patch after each block of a patched model."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool import hosts
from tokenpool.downsampling import Downsampled
from tokenpool.moved import old_names
from tokenpool.stream import compose, merged_sizes

__getattr__ = old_names(__name__)  # PEP 562


class BlockTrace(NamedTuple):
    """The state of the tokens after one block.

    Attributes:
        tokens: number of patch tokens after the downsampler of the block.
        assignment: (B, N) int64, the current token of each of the N patches of an image, or -1 if it was dropped.
        sizes: (B, tokens), the number of patches of each token.
        error: (B,), the reconstruction error, equation (8), of the downsampler of this block: the squared distance from
            each input token to its output token, summed over input tokens. A dropped token counts with the distance to
            the nearest output token. Zero if the block does not downsample, NaN if no token remains.
    """

    tokens: int
    assignment: Tensor
    sizes: Tensor
    error: Tensor


class Trace(NamedTuple):
    """Result of a traced forward pass.

    Attributes:
        logits: (B, classes), or the features of the images if the model has no classes.
        blocks: the state after each block.
        grid: rows and columns of patches. Their product is N, except if the model drops patches at random in training.
    """

    logits: Tensor
    blocks: list[BlockTrace]
    grid: tuple[int, int]


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run a patched model on images, and report which patches each block merged or dropped.

    The model runs in its current mode (training or evaluation).

    Args:
        model: a patched model.
        images: (B, C, H, W).

    Returns:
        The logits, and the state of the tokens after each block.

    Raises:
        ValueError: if the model is not patched, or if `images` is not a batch (B, C, H, W).
    """
    adapter = hosts.find(model)
    if adapter is None or not adapter.is_patched:
        raise ValueError("the model has no downsamplers to trace: call tokenpool.patch first")
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise ValueError(
            "trace needs images (B, C, H, W): give one image as image[None], and images of a padded batch one by one"
        )
    seen: dict[int, tuple[Tensor, Downsampled]] = {}
    handles = watch(model, lambda index, before, after: seen.update({index: (before, after)}))
    try:
        logits = adapter.run(images)
    finally:
        for handle in handles:
            handle.remove()

    rows, columns = images.shape[-2:]
    grid = adapter.grid((rows, columns))
    first = next(iter(seen.values()))[0] if seen else None  # patch dropout may leave fewer tokens than patches
    n = math.prod(grid) if first is None else first.shape[1]
    assignment = torch.arange(n, device=images.device).expand(len(images), n)  # (B, N)
    error = torch.zeros(len(images), device=images.device)
    blocks = []
    for index in range(adapter.depth):
        if index in seen:
            before, after = seen[index]
            assignment = compose(assignment, after.assignment)
            n, error = after.tokens.shape[1], reconstruction_error(before, after)
        else:
            error = torch.zeros_like(error)
        ones = torch.ones_like(assignment, dtype=torch.float32)
        blocks.append(BlockTrace(n, assignment, merged_sizes(ones, assignment, n), error))
    return Trace(logits, blocks, grid)


def reconstruction_error(tokens: Tensor, downsampled: Downsampled) -> Tensor:
    """Compute the reconstruction error, equation (8), with nearest-neighbour interpolation by the assignment.

    Args:
        tokens: (B, N, D), the input of a downsampler.
        downsampled: the output of the downsampler.

    Returns:
        (B,), see `BlockTrace.error`.
    """
    kept, assignment = downsampled
    if kept.shape[1] == 0:
        return tokens.new_full((len(tokens),), torch.nan)
    tokens, kept = tokens.float(), kept.float()
    own = kept.gather(1, assignment.clamp(min=0)[:, :, None].expand(-1, -1, kept.shape[2]))
    error = (tokens - own).square().sum(-1)  # (B, N)
    nearest = torch.cdist(tokens, kept).square().amin(-1)  # (B, N)
    return torch.where(assignment >= 0, error, nearest).sum(-1)


def watch(model: nn.Module, record: Callable[[int, Tensor, Downsampled], None]) -> list[RemovableHandle]:
    """Call a function whenever a downsampler of a patched model runs.

    Args:
        model: a patched model.
        record: called with the index of the block, the input tokens (B, N, D) and the output of the downsampler.

    Returns:
        Handles that remove the hooks.
    """

    def hook(index: int) -> Callable[..., None]:
        return lambda module, inputs, output: record(index, inputs[0], output)

    layers = hosts.of(model).downsamplers
    return [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers) if layer is not None]
