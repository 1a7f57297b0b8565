"""The pooled block and the stack of pooled blocks, and what travels from block to block."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tokenpool import micro_batch
from tokenpool.adoption import adopt, give_back
from tokenpool.attention import Attended
from tokenpool.downsampling import Downsampler
from tokenpool.eager import is_in_graph


class Stream(NamedTuple):
    """What travels from block to block.

    Attributes:
        tokens: (B, P + N, D), P prefix tokens (class, register, distillation) and N patch tokens.
        sizes: (B, P + N), the number of original tokens that each token stands for; None if no block needs sizes.
        assignment: (B, patches), for each patch of the image the patch token that it is in now; None if the head does
            not need it.
    """

    tokens: Tensor
    sizes: Tensor | None
    assignment: Tensor | None

    def split(self, images: int) -> list["Stream"]:
        """Split the batch into streams of `images` images each; the last stream has the rest."""
        parts = [itertools.repeat(None) if part is None else part.split(images) for part in self]
        return [Stream(*part) for part in zip(*parts, strict=False)]  # tokens end the endless repetition of None

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
    """How a model was patched: the arguments of `tokenpool.patch`."""

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

    A pooled block takes over the submodules of the model's own block under the same names, so that checkpoints stay
    the same. Each family of models has a subclass, in `tokenpool.hosts`, that implements `attend` and `feed_forward`
    with these submodules.

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
        """Compute the attention branch on tokens (B, P + N, D); its `output` is what is added to the tokens.

        Args:
            tokens: (B, P + N, D).
            sizes: (B, P + N) or None, see `ScoredAttention`.
            with_scores: also return the significance scores.
            with_keys: also return the keys.
        """
        raise NotImplementedError

    def feed_forward(self, tokens: Tensor) -> Tensor:
        """Compute the MLP branch on tokens (B, P + K, D): (B, P + K, D), which is added to the tokens."""
        raise NotImplementedError

    def give_back(self) -> nn.Module:
        """Return the model's own block, with the submodules that are in this block now."""
        give_back(self, self._host[0], but=("downsampler",))
        return self._host[0]

    def forward(self, stream: Stream, **unsupported: Any) -> Stream:
        if not isinstance(stream, Stream) or unsupported:
            raise TypeError(f"a pooled block was called on its own; {_NEEDS_PLAIN}")
        tokens, sizes, patches = self._attend_and_downsample(stream)
        tokens = tokens + self.feed_forward(tokens)
        return Stream(tokens, sizes, patches)

    def _attend_and_downsample(self, stream: Stream) -> Stream:
        """All that comes before the MLP. It is a method of its own, so that its tensors are freed before the MLP."""
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
        kept, assignment = downsampler(tokens[:, prefix:], of_patches(attended.scores), **hints)
        if sizes is not None:
            sizes = torch.cat([sizes[:, :prefix], merged_sizes(sizes[:, prefix:], assignment, kept.shape[1])], dim=1)
        if patches is not None:
            patches = compose(patches, assignment)
        return Stream(torch.cat([tokens[:, :prefix], kept], dim=1), sizes, patches)  # (B, P + K, D)


class PooledBlocks(nn.Sequential):
    """The blocks of a patched model: the model calls it with tokens (B, P + N, D) and gets tokens (B, P + K, D).

    With `unpools`, it returns all P + N tokens; each patch then has the value of the token that it is in (equation
    (9)). This is for heads that read patches: their mean over patches, or their attention over patches, then weighs
    each token by its size, exactly.

    Args:
        blocks: one pooled block for each block of the model.
        setting: how the model was patched.
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
        """Return the model's own stack, with the blocks that are in this stack now."""
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
        streams = self._parts(stream)
        for block in self:
            streams = _joined([block(part) for part in streams])
        stream = Stream.cat(streams)
        if stream.assignment is None:
            return stream.tokens
        back = unpool(stream.tokens[:, self.prefix :], stream.assignment)
        return torch.cat([stream.tokens[:, : self.prefix], back], dim=1)

    def _parts(self, stream: Stream) -> list[Stream]:
        """The stream in parts of a few images each, on a CPU; else the stream as it is.

        The stream stays whole where parts would not help or would change the result: with gradients they save no
        memory, in a graph the loop over them would be unrolled, hooks expect a whole batch, and the random numbers of
        training are drawn for a whole batch.
        """
        whole = is_in_graph() or torch.is_grad_enabled() or self.training
        tokens = stream.tokens
        if whole or tokens.device.type != "cpu" or tokens.numel() <= micro_batch.BLOCK_FLOATS:
            return [stream]
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.modules()):
            return [stream]
        return stream.split(micro_batch.even_size(len(tokens), tokens.numel(), micro_batch.BLOCK_FLOATS))


def _joined(streams: list[Stream]) -> list[Stream]:
    """Join neighbouring streams while the joined stream has at most `micro_batch.BLOCK_FLOATS` numbers."""
    joined: list[list[Stream]] = []
    for stream in streams:
        if joined and sum(part.tokens.numel() for part in [*joined[-1], stream]) <= micro_batch.BLOCK_FLOATS:
            joined[-1].append(stream)
        else:
            joined.append([stream])
    return [Stream.cat(parts) for parts in joined]


def unpool(tokens: Tensor, assignment: Tensor) -> Tensor:
    """Put K tokens back at the positions of the N patches: nearest-neighbour interpolation, equation (9).

    This is for dense heads, such as segmentation. `patch(..., dense=True)` does it at the end of the network.

    Args:
        tokens: (B, K, D).
        assignment: (B, N), the token that each patch is in, as in `BlockTrace.assignment`. Patches that were dropped
            (-1) become zeros.

    Returns:
        (B, N, D).
    """
    index = assignment.clamp(min=0)[:, :, None].expand(-1, -1, tokens.shape[2])
    if tokens.shape[1] == 0:
        return tokens.new_zeros(*assignment.shape, tokens.shape[2])
    return tokens.gather(1, index) * (assignment >= 0)[:, :, None]


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Compose assignments (B, N) -> (B, K1) and (B, K1) -> (B, K2) to (B, N) -> (B, K2); -1 stays -1."""
    if second.shape[1] == 0:
        return torch.full_like(first, -1)
    return torch.where(first >= 0, second.gather(1, first.clamp(min=0)), -1)


def merged_sizes(sizes: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Sum the sizes (B, N) over the tokens that each of the K output tokens is made of: (B, K).

    The sizes of dropped tokens are lost.
    """
    bins = sizes.new_zeros(sizes.shape[0], k + 1)  # the first bin collects dropped tokens, whose assignment is -1
    return bins.scatter_add(1, assignment + 1, sizes)[:, 1:]
