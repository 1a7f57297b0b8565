"""The data that travels from block to block, and the operations on assignments."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from tokenpool.clustering.reductions import sums
from tokenpool.eager import is_exporting

NEEDS_PLAIN = (
    "attention masks, features_only, forward_intermediates and slices of the blocks need a plain model: call "
    "tokenpool.unpatch first"
)


class Frame(NamedTuple):
    """The properties of a patched model that its first and its last block need.

    Attributes:
        prefix: number P of prefix tokens (class, register, distillation), which come before the patch tokens.
        sizes: whether a block needs the sizes of the tokens.
        positions: the rotary position of a merged token, "mean" or "medoid". None for models without rotary positions.
        unpools: whether the last block returns all patches. Each patch then has the value of its token, equation (9).
            This is for heads that read patches. Their mean over patches, or their attention over patches, then weighs
            each token exactly by its size.
        drops: whether a downsampler drops patches that the head reads. A head that gets a mask of all patches then
            cannot be used.
        schedule: returns the retention schedule of an image with a given number of patches. None if all images have the
            same schedule.
    """

    prefix: int
    sizes: bool
    positions: str | None
    unpools: bool
    drops: bool = False
    schedule: Callable[[int], Sequence[int]] | None = None


class Stream(NamedTuple):
    """The tokens of images with the same number of tokens.

    Attributes:
        tokens: (B, P + N, D), P prefix tokens and N patch tokens.
        sizes: (B, P + N), the number of original tokens that each token stands for. None if no block needs sizes.
        assignment: (B, patches), the current patch token of each patch of the image. None if nothing needs it.
        places: (B, N), the patch whose position each patch token has, for the positions "medoid". Otherwise None.
        images: (B,), the index of each image in the batch. None if the images are all images in their order, or if the
            index is not needed.
    """

    tokens: Tensor
    sizes: Tensor | None = None
    assignment: Tensor | None = None
    places: Tensor | None = None
    images: Tensor | None = None

    @staticmethod
    def start(tokens: Tensor, frame: Frame, images: Tensor | None = None, masked: bool = False) -> "Stream":
        """Return the stream before the first block, where each token stands for itself.

        Args:
            tokens: (B, P + N, D).
            frame: properties of the patched model.
            images: see `Stream`.
            masked: see `Batch`.
        """
        batch, n, _ = tokens.shape
        sizes = torch.ones(batch, n, device=tokens.device) if frame.sizes else None
        patches = None
        if masked or frame.unpools or frame.positions or frame.schedule:
            patches = torch.arange(n - frame.prefix, device=tokens.device).expand(batch, -1)
        return Stream(tokens, sizes, patches, patches if frame.positions == "medoid" else None, images)

    def split(self, images: int) -> list["Stream"]:
        """Split the batch into streams of `images` images each. The last stream has the remaining images."""
        parts = [itertools.repeat(None) if part is None else part.split(images) for part in self]
        return [Stream(*part) for part in zip(*parts, strict=False)]  # tokens are never None, so zip ends

    @staticmethod
    def cat(streams: Sequence["Stream"]) -> "Stream":
        """Concatenate streams along the batch."""
        if len(streams) == 1:
            return streams[0]
        joined: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in zip(*streams, strict=True)]
        return Stream(*joined)


@dataclass(frozen=True)
class Batch:
    """The streams of a batch. A pooled block takes a batch from the block before it.

    A batch has several streams if micro-batches are faster, or if its images have different numbers of tokens.

    Attributes:
        streams: the streams.
        masked: whether the model has a mask of all patches. The last block then returns all patches, each with the
            value of its token. Dropped patches are zero.
        padded: number N of patches of the padded batch, or None if the batch has no padding.
        order: (B, N), the patches of a padded batch in the order of the streams: first the patches, then the padding.
            None if they are in this order already.
    """

    streams: list[Stream]
    masked: bool
    padded: int | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Only the number of images (B,), which some models read between blocks, for example with patch dropout."""
        return torch.Size([sum(stream.tokens.shape[0] for stream in self.streams)])

    def map(self, function: Callable[[Stream], Stream]) -> "Batch":
        """Apply a function to each stream."""
        return replace(self, streams=[function(stream) for stream in self.streams])

    def joined(self, max_floats: float) -> "Batch":
        """Join neighbouring streams into streams of at most `max_floats` floats. Padded batches stay as they are."""
        if self.padded is not None or len(self.streams) == 1:
            return self
        joined: list[list[Stream]] = []
        for stream in self.streams:
            if joined and sum(part.tokens.numel() for part in [*joined[-1], stream]) <= max_floats:
                joined[-1].append(stream)
            else:
                joined.append([stream])
        return replace(self, streams=[Stream.cat(parts) for parts in joined])

    def table(self, table: Tensor | None) -> Tensor | None:
        """Return a rotary table (B or 1, H or 1, N, W) in the order of the streams."""
        if table is None or self.order is None:
            return table
        index = self.order[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
        return table.expand(len(index), -1, -1, -1).gather(2, index)

    def tokens(self, frame: Frame) -> Tensor:
        """Return the tokens (B, P + K, D) of all images, after the last block.

        With `masked` or `frame.unpools` there are all N patches, and padding is zero.
        """
        unpools = self.masked or frame.unpools
        parts = [_unpooled(stream, frame.prefix) if unpools else stream.tokens for stream in self.streams]
        if self.padded is None:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        width = frame.prefix + self.padded
        padded = [torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts]
        images = torch.cat([stream.images for stream in self.streams if stream.images is not None])
        tokens = torch.cat(padded)[images.argsort()]
        return tokens if self.order is None else permuted(tokens, self.order.argsort(dim=1), frame.prefix)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError(
            f"{getattr(function, '__name__', function)} was called between two pooled blocks; {NEEDS_PLAIN}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name} was read of the tokens between two pooled blocks; {NEEDS_PLAIN}")

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(f"the tokens between two pooled blocks were indexed; {NEEDS_PLAIN}")


def _unpooled(stream: Stream, prefix: int) -> Tensor:
    if stream.assignment is None:
        return stream.tokens
    return torch.cat([stream.tokens[:, :prefix], unpool(stream.tokens[:, prefix:], stream.assignment)], dim=1)


def permuted(tokens: Tensor, order: Tensor, prefix: int) -> Tensor:
    """Permute the patch tokens of each image.

    Args:
        tokens: (B, P + N, D).
        order: (B, N), indices of patch tokens.
        prefix: number P of prefix tokens.
    """
    patches = tokens[:, prefix:].gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :prefix], patches], dim=1)


def unpool(tokens: Tensor, assignment: Tensor) -> Tensor:
    """Copy K tokens to the positions of the N patches: nearest-neighbour interpolation, equation (9).

    This is for dense heads, such as segmentation. `patch(..., dense=True)` does it at the end of the network.

    Args:
        tokens: (B, K, D).
        assignment: (B, N) int64, the token of each patch, as in `BlockTrace.assignment`. A dropped patch has -1.

    Returns:
        (B, N, D). Dropped patches are zero.
    """
    index = assignment.clamp(min=0)[:, :, None].expand(-1, -1, tokens.shape[2])
    if tokens.shape[1] == 0:
        return tokens.new_zeros(*assignment.shape, tokens.shape[2])
    return tokens.gather(1, index) * (assignment >= 0)[:, :, None]


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Compose two assignments. An entry -1 (dropped) stays -1.

    Args:
        first: (B, N), indices in 0..M-1, or -1.
        second: (B, M), indices in 0..K-1, or -1.

    Returns:
        (B, N), indices in 0..K-1, or -1.
    """
    if second.shape[1] == 0:
        return torch.full_like(first, -1)
    return torch.where(first >= 0, second.gather(1, first.clamp(min=0)), -1)


def merged_sizes(sizes: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Sum the sizes of the input tokens of each output token.

    Args:
        sizes: (B, N), the sizes of the input tokens. The sizes of dropped tokens are not counted.
        assignment: (B, N), the output token of each input token, or -1.
        k: number of output tokens.

    Returns:
        (B, K), the sizes of the output tokens.
    """
    if is_exporting():
        return sums(sizes, assignment, k)  # a dropped token is in no cluster
    bins = sizes.new_zeros(sizes.shape[0], k + 1)  # the first bin collects dropped tokens, whose assignment is -1
    return bins.scatter_add(1, assignment + 1, sizes)[:, 1:]
