"""The pooled block, the stack of pooled blocks, and the data that a block passes to the next block."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tokenpool import micro_batch
from tokenpool.adoption import adopt, give_back
from tokenpool.attention import Attended
from tokenpool.downsampling import Downsampler, Masked
from tokenpool.eager import is_in_graph


class Stream(NamedTuple):
    """The data that a block passes to the next block.

    Attributes:
        tokens: (B, P + N, D), P prefix tokens (class, register, distillation) and N patch tokens.
        sizes: (B, P + N), the number of original tokens that each token stands for. None if no block needs sizes.
        assignment: (B, patches), the current patch token of each patch of the image. None if the head does not need
            the assignment.
    """

    tokens: Tensor
    sizes: Tensor | None
    assignment: Tensor | None

    def split(self, images: int) -> list["Stream"]:
        """Split the batch into streams of `images` images each. The last stream has the remaining images."""
        parts = [itertools.repeat(None) if part is None else part.split(images) for part in self]
        return [Stream(*part) for part in zip(*parts, strict=False)]  # tokens are never None, so zip ends

    @staticmethod
    def cat(streams: Sequence["Stream"]) -> "Stream":
        """Concatenate streams along the batch."""
        if len(streams) == 1:
            return streams[0]
        tokens, sizes, assignments = zip(*streams, strict=True)
        return Stream(
            torch.cat(tokens),
            None if sizes[0] is None else torch.cat(sizes),
            None if assignments[0] is None else torch.cat(assignments),
        )


@dataclass(frozen=True)
class Setting:
    """The arguments of `tokenpool.patch` that a model was patched with."""

    downsampler: str
    keep: tuple[int, ...] | None
    carry: bool
    qk_norm: str | None = None
    alpha: float = 1.0
    learn_alpha: bool = False
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_NEEDS_PLAIN = (
    "gradient checkpointing, attention masks, features_only, forward_intermediates and slices of the blocks need a "
    "plain model: call tokenpool.unpatch first"
)


class PooledBlock(nn.Module):
    """A transformer block with a downsampler between attention and MLP (Marin et al. 2021, section 4).

    A pooled block adopts the submodules of the model's own block under the same names, so that checkpoints stay the
    same. Each family of models has a subclass in `tokenpool.hosts`. The subclass implements `attend` and
    `feed_forward` with these submodules.

    Args:
        host: the model's own block.
        downsampler: the downsampler of this block, or None.
        prefix: number of prefix tokens, which the downsampler does not see.
        carry: whether the attention weighs each token by its size.
    """

    def __init__(self, host: nn.Module, downsampler: Downsampler | None, prefix: int, carry: bool) -> None:
        super().__init__()
        adopt(self, host)
        self._host = (host,)  # a tuple, so that PyTorch does not register the block as a submodule
        self.downsampler = downsampler and downsampler.train(host.training)
        self.prefix = prefix
        self.carry = carry

    def attend(self, tokens: Tensor, sizes: Tensor | None, with_scores: bool, with_keys: bool) -> Attended:
        """Compute the attention branch. The block adds its `output` to the tokens.

        Args:
            tokens: (B, P + N, D).
            sizes: (B, P + N) or None, see `ScoredAttention`.
            with_scores: also return the significance scores.
            with_keys: also return the keys.
        """
        raise NotImplementedError

    def feed_forward(self, tokens: Tensor) -> Tensor:
        """Compute the MLP branch (B, P + K, D) of tokens (B, P + K, D). The block adds it to the tokens."""
        raise NotImplementedError

    def give_back(self) -> nn.Module:
        """Return the model's own block with the current submodules of this block."""
        give_back(self, self._host[0], but=("downsampler",))
        return self._host[0]

    def forward(self, stream: Stream, **unsupported: Any) -> Stream:
        if not isinstance(stream, Stream) or unsupported:
            raise TypeError(f"a pooled block was called on its own; {_NEEDS_PLAIN}")
        tokens, sizes, patches = self._attend_and_downsample(stream)
        tokens = tokens + self.feed_forward(tokens)
        return Stream(tokens, sizes, patches)

    def _attend_and_downsample(self, stream: Stream) -> Stream:
        """Compute the part of the block before the MLP. As a separate method, it frees its tensors before the MLP."""
        tokens, sizes, patches = stream
        downsampler, prefix = self.downsampler, self.prefix
        if downsampler is not None and not downsampler.acts_on(tokens.shape[1] - prefix):
            downsampler = None

        with_scores = downsampler is not None and downsampler.uses_scores
        with_keys = downsampler is not None and downsampler.uses_keys
        attended = self.attend(tokens, sizes if self.carry else None, with_scores, with_keys)
        tokens = tokens + attended.output  # (B, P + N, D)
        if downsampler is None:
            return Stream(tokens, sizes, patches)

        def of_patches(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, prefix:]

        hints = {"sizes": of_patches(sizes)} if downsampler.uses_sizes else {}
        hints |= {"keys": of_patches(attended.keys)} if with_keys else {}
        found = downsampler(tokens[:, prefix:], of_patches(attended.scores), **hints)
        kept, assignment = found[:2]
        if sizes is not None:
            merged = merged_sizes(sizes[:, prefix:], assignment, kept.shape[1])
            merged = merged * found.mask if isinstance(found, Masked) else merged
            sizes = torch.cat([sizes[:, :prefix], merged], dim=1)
        if patches is not None:
            patches = compose(patches, assignment)
        return Stream(torch.cat([tokens[:, :prefix], kept], dim=1), sizes, patches)  # (B, P + K, D)


class PooledBlocks(nn.Sequential):
    """The blocks of a patched model. They map tokens (B, P + N, D) to tokens (B, P + K, D).

    With `unpools`, the stack returns all P + N tokens, and each patch has the value of its token (equation (9)). This
    is for heads that read patches. Their mean over patches, or their attention over patches, then weighs each token
    exactly by its size.

    Args:
        blocks: one pooled block for each block of the model.
        setting: arguments that the model was patched with.
        host: the model's own stack of blocks.
        prefix: number of prefix tokens.
        unpools: whether all patches are returned.
    """

    def __init__(
        self, blocks: Sequence[PooledBlock], setting: Setting, host: nn.Sequential, prefix: int, unpools: bool
    ) -> None:
        super().__init__(*blocks)
        self._host = (host,)  # a tuple, so that PyTorch does not register the stack as a submodule
        self.setting = setting
        self.prefix = prefix
        self.unpools = unpools
        self.training = host.training

    def give_back(self) -> nn.Sequential:
        """Return the model's own stack with the current blocks of this stack."""
        (host,) = self._host
        blocks = [block.give_back() for block in cast(Iterable[PooledBlock], self)]
        del host[:]
        host.extend(blocks).training = self.training
        return host

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError(f"pooled blocks cannot be sliced; {_NEEDS_PLAIN}")
        return super().__getitem__(index)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, n, _ = tokens.shape
        downsamplers = [block.downsampler for block in self]
        with_sizes = self.setting.carry or any(isinstance(d, Downsampler) and d.uses_sizes for d in downsamplers)
        sizes = torch.ones(batch, n, device=tokens.device) if with_sizes else None
        patches = torch.arange(n - self.prefix, device=tokens.device).expand(batch, -1) if self.unpools else None
        stream = Stream(tokens, sizes, patches)
        streams = self._micro_batches(stream)
        for block in self:
            streams = _joined([block(part) for part in streams])
        stream = Stream.cat(streams)
        if stream.assignment is None:
            return stream.tokens
        back = unpool(stream.tokens[:, self.prefix :], stream.assignment)
        return torch.cat([stream.tokens[:, : self.prefix], back], dim=1)

    def _micro_batches(self, stream: Stream) -> list[Stream]:
        """Split the stream into micro-batches on a CPU. Return it unsplit if they would not help or change the result.

        With gradients, micro-batches save no memory. In a graph, the loop over them would be unrolled. Hooks expect
        the full batch. Training draws random numbers for the full batch.
        """
        unsplit = is_in_graph() or torch.is_grad_enabled() or self.training
        tokens = stream.tokens
        if unsplit or tokens.device.type != "cpu" or tokens.numel() <= micro_batch.BLOCK_FLOATS:
            return [stream]
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.modules()):
            return [stream]
        return stream.split(micro_batch.even_size(len(tokens), tokens.numel(), micro_batch.BLOCK_FLOATS))


def _joined(streams: list[Stream]) -> list[Stream]:
    """Join neighbouring streams into streams of at most `micro_batch.BLOCK_FLOATS` floats."""
    joined: list[list[Stream]] = []
    for stream in streams:
        if joined and sum(part.tokens.numel() for part in [*joined[-1], stream]) <= micro_batch.BLOCK_FLOATS:
            joined[-1].append(stream)
        else:
            joined.append([stream])
    return [Stream.cat(parts) for parts in joined]


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
    bins = sizes.new_zeros(sizes.shape[0], k + 1)  # the first bin collects dropped tokens, whose assignment is -1
    return bins.scatter_add(1, assignment + 1, sizes)[:, 1:]
