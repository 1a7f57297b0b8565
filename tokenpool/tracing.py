"""What a patched model did with each image patch, block by block."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tokenpool.downsampling import Downsampled
from tokenpool.vit import compose, is_patched, merged_sizes


class BlockTrace(NamedTuple):
    """What one block did.

    Attributes:
        tokens: patch tokens that remain after the block's downsampler.
        assignment: (B, N) int64, for each of the image's N patches the token that it is in now, -1 if dropped.
        sizes: (B, tokens), the number of patches in each token.
        error: (B,), the reconstruction error, equation (8), of this block's downsampling alone: the squared distance of
            each token that came in to the token that it went to, or, if dropped, to the nearest that remains; summed
            over tokens. Zero where nothing happened, NaN where nothing remains.
    """

    tokens: int
    assignment: Tensor
    sizes: Tensor
    error: Tensor


class Trace(NamedTuple):
    """What a forward pass did.

    Attributes:
        logits: (B, classes).
        blocks: what each block did.
        grid: rows and columns of patches; their product is N, unless patches were dropped at random in training.
    """

    logits: Tensor
    blocks: list[BlockTrace]
    grid: tuple[int, int]


@torch.no_grad()
def trace(model: VisionTransformer, images: Tensor) -> Trace:
    """Run a patched model on images (B, C, H, W), as it is (training or evaluating), and report what it merged.

    Raises:
        ValueError: if the model is not patched.
    """
    if not is_patched(model):
        raise ValueError("the model has no downsamplers to trace; call tokenpool.patch first")
    seen: dict[int, tuple[Tensor, Downsampled]] = {}
    handles = _watch(model, lambda index, before, after: seen.update({index: (before, after)}))
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()

    first = next(iter(seen.values()))[0] if seen else None  # patch dropout may have left fewer tokens than patches
    grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    n = first.shape[1] if seen else math.prod(grid)
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
        ones = torch.ones_like(assignment, dtype=torch.float32)
        blocks.append(BlockTrace(n, assignment, merged_sizes(ones, assignment, n), error))
    return Trace(logits, blocks, tuple(grid))


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


class ReconstructionErrorCallback(Callback):
    """Measures, while Lightning tests, the reconstruction error of each block's downsampling, relative to the spread.

    The module must hold a patched network as `model`; for a plain one nothing is measured.
    """

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}
        self._handles: list[RemovableHandle] = []
        self._depth = 0

    @property
    def relative(self) -> list[float | None]:
        """For each block the error (8) of the tokens that came in, as a share of their squared distance to their mean.

        Summed over tokens and images. 0 where nothing happens, None where no token remains.
        """
        shares: list[float | None] = [0.0] * self._depth
        for block, (error, spread) in self._sums.items():
            shares[block] = error / spread if math.isfinite(error) and spread > 0 else None
        return shares

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        if is_patched(module.model):
            self._depth = len(module.model.blocks)
            self._sums.clear()
            self._handles = _watch(module.model, self._add)

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        if trainer.world_size > 1 and self._depth:
            shared = torch.zeros(self._depth, 2, device=module.device)
            for block, sums in self._sums.items():
                shared[block] = torch.tensor(sums)
            shared = trainer.strategy.reduce(shared, reduce_op="sum")  # over processes, each with its own images
            self._sums = {block: sums for block, sums in enumerate(shared.tolist()) if any(sums)}

    def _add(self, block: int, before: Tensor, after: Downsampled) -> None:
        centred = before.float() - before.float().mean(1, keepdim=True)  # (B, N, D)
        sums = self._sums.setdefault(block, [0.0, 0.0])
        sums[0] += reconstruction_error(before, after).sum().item()
        sums[1] += centred.square().sum().item()


def _watch(model: VisionTransformer, record: Callable[[int, Tensor, Downsampled], None]) -> list[RemovableHandle]:
    """Have `record` called with block, tokens before and what came of them, whenever a block downsamples."""

    def hook(index: int) -> Callable[..., None]:
        return lambda module, inputs, output: record(index, inputs[0], output)

    layers = [block.downsampler for block in model.blocks]
    return [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers) if layer is not None]
