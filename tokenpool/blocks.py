"""The pooled block, and the stack of pooled blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from tokenpool import micro_batch
from tokenpool.adoption import adopt, give_back
from tokenpool.attention import Asked, Attended, ScoredAttention
from tokenpool.downsampling import Downsampler, Masked
from tokenpool.eager import is_in_graph
from tokenpool.positions import MergedPositions, representatives
from tokenpool.stream import NEEDS_PLAIN, Batch, Frame, Stream, compose, merged_sizes, permuted

NOT_IN_A_GRAPH = (
    "a batch with padding cannot be compiled or exported, because its images have different numbers of tokens: give "
    "images of one size, without padding"
)


@dataclass(frozen=True)
class Setting:
    """The arguments of `tokenpool.patch` that a model was patched with.

    Attributes:
        keep: the schedule at the model's own image size.
        form: the short form of the schedule, such as 0.9, if each image resolves it for its own number of patches. None
            if `keep` is the schedule of all images.
    """

    downsampler: str
    keep: tuple[int, ...] | None
    carry: bool
    qk_norm: str | None = None
    alpha: float = 1.0
    learn_alpha: bool = False
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    positions: str = "mean"
    form: float | str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `patch` that give this setting. The option's values stay in "options"."""
        keep = None if self.keep is None else list(self.keep)
        arguments = vars(self) | {"keep": keep if self.form is None else self.form}
        del arguments["form"]  # `patch` finds it anew
        return arguments


class Given(NamedTuple):
    """The arguments that a model gives to each of its blocks, besides the tokens.

    Attributes:
        table: (B or 1, H or 1, N, W), the rotary table of all patches, or None.
        valid: (B, N) bool, the patches that are not padding. None if there is no padding.
    """

    table: Tensor | None = None
    valid: Tensor | None = None


class PooledBlock(nn.Module):
    """A transformer block with a downsampler between attention and MLP (Marin et al. 2021, section 4).

    A pooled block adopts the submodules and parameters of the model's own block under the same names, so that
    checkpoints stay the same. Each family of models has a subclass in `tokenpool.hosts`. The subclass implements
    `attend` and `feed_forward` with these submodules, and `given` if the model gives more than tokens to its blocks.

    The first block starts the batch, and the last block returns the tokens. So a model that calls its blocks one by one
    needs no change.

    Class attributes that a subclass sets:
        ATTENTION: name of the attention in the block.
        OWN: names of parameters of the block itself. All other parameters belong to its submodules.

    Args:
        host: the model's own block.
        downsampler: the downsampler of this block, or None.
        frame: properties of the patched model.
        setting: the arguments that the model is patched with.
    """

    ATTENTION: ClassVar[str] = "attn"
    OWN: ClassVar[tuple[str, ...]] = ()

    def __init__(self, host: nn.Module, downsampler: Downsampler | None, frame: Frame, setting: Setting) -> None:
        super().__init__()
        adopt(self, host)
        self._host = (host,)  # a tuple, so that PyTorch does not register the block as a submodule
        self.downsampler = downsampler and downsampler.train(host.training)
        self.frame = frame
        self.carry = setting.carry
        self.index = 0
        self.is_first = self.is_last = False
        if frame.positions:
            self.positions = MergedPositions()
        attention = self.get_submodule(self.ATTENTION)
        scored = self.scored_class(attention)
        assert scored is not None  # `Adapter.check` has refused other attentions
        self.add_module(self.ATTENTION, scored(attention, setting.qk_norm, setting.alpha, setting.learn_alpha))

    @classmethod
    def scored_class(cls, attention: nn.Module) -> type[ScoredAttention] | None:
        """Return the scored class of the model's own attention, or None if the attention cannot be pooled."""
        raise NotImplementedError

    @property
    def scored_attention(self) -> ScoredAttention:
        """The attention of this block."""
        return cast(ScoredAttention, self.get_submodule(self.ATTENTION))

    def attend(self, tokens: Tensor, asked: Asked) -> Attended:
        """Compute the attention branch. The block adds its `output` to the tokens.

        Args:
            tokens: (B, P + N, D).
            asked: other inputs of the attention, and the results to return.
        """
        raise NotImplementedError

    def feed_forward(self, tokens: Tensor) -> Tensor:
        """Compute the MLP branch (B, P + K, D) of tokens (B, P + K, D). The block adds it to the tokens."""
        raise NotImplementedError

    def given(self, tokens: Tensor | None, *arguments: Any, **named: Any) -> Given:
        """Read the arguments that the model gives to the block besides the tokens.

        Args:
            tokens: (B, P + N, D), all tokens of the batch, or None in a block that is not the first.
            *arguments: the model's arguments.
            **named: the model's named arguments.

        Raises:
            TypeError: for an argument that a pooled block cannot use.
            ValueError: for an attention mask that is not a mask of padding.
        """
        if arguments or named:
            raise TypeError(f"a pooled block got more than tokens; {NEEDS_PLAIN}")
        return Given()

    def give_back(self) -> nn.Module:
        """Return the model's own block with the current submodules of this block."""
        (host,) = self._host
        give_back(self, host, but=("downsampler", "positions"))
        host.add_module(self.ATTENTION, self.scored_attention.give_back())
        return host

    def forward(self, tokens: Tensor | Batch, *arguments: Any, **named: Any) -> Tensor | Batch:
        if isinstance(tokens, Batch) == self.is_first:
            raise TypeError(f"a pooled block was called on its own; {NEEDS_PLAIN}")
        if isinstance(tokens, Batch):
            given, batch = self.given(None, *arguments, **named), tokens
        else:
            given = self.given(tokens, *arguments, **named)
            batch = self._started(tokens, given)
        if len(batch.streams) > 1 and self._has_hooks():
            batch = batch.joined(torch.inf)
        table = batch.table(given.table)
        batch = batch.map(lambda stream: self._run(stream, table)).joined(micro_batch.BLOCK_FLOATS)
        return batch.tokens(self.frame) if self.is_last else batch

    def _started(self, tokens: Tensor, given: Given) -> Batch:
        """Start a batch: without padding, and in micro-batches on a CPU if they help and do not change the result.

        With gradients, micro-batches save no memory. In a graph, the loop over them would be unrolled. Training draws
        random numbers for the full batch.
        """
        if given.valid is not None and self.frame.drops:
            raise ValueError(
                "this method drops patches, but the head reads the patches by a mask of all patches: use a method that "
                "merges tokens, such as key_medoids, or give images (B, C, H, W) without a mask"
            )
        if given.valid is not None and (is_in_graph() or not given.valid.all()):
            return padding_removed(tokens, given.valid, self.frame)
        masked = given.valid is not None
        differs = given.table is not None and given.table.shape[0] > 1
        images = torch.arange(len(tokens), device=tokens.device) if differs else None
        stream = Stream.start(tokens, self.frame, images, masked)
        unsplit = is_in_graph() or torch.is_grad_enabled() or self.training
        if unsplit or tokens.device.type != "cpu" or tokens.numel() <= micro_batch.BLOCK_FLOATS:
            return Batch([stream], masked)
        size = micro_batch.even_size(len(tokens), tokens.numel(), micro_batch.BLOCK_FLOATS)
        return Batch(stream.split(size), masked)

    def _has_hooks(self) -> bool:
        """Return whether a module of this block has a forward hook. Hooks expect the full batch."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())

    def _run(self, stream: Stream, table: Tensor | None) -> Stream:
        stream = self._attend_and_downsample(stream, table)
        return stream._replace(tokens=stream.tokens + self.feed_forward(stream.tokens))

    def _attend_and_downsample(self, stream: Stream, table: Tensor | None) -> Stream:
        """Compute the part of the block before the MLP. As a separate method, it frees its tensors before the MLP."""
        tokens, sizes, patches, places, _ = stream
        downsampler, prefix = self._downsampler_of(stream), self.frame.prefix
        if downsampler is not None and not downsampler.acts_on(tokens.shape[1] - prefix):
            downsampler = None

        asked = Asked(sizes if self.carry else None, None if table is None else self._table(stream, table))
        if downsampler is not None:
            asked = asked._replace(
                scores=downsampler.uses_scores,
                keys=downsampler.uses_keys,
                class_attention=downsampler.uses_class_attention,
            )
        attended = self.attend(tokens, asked)
        tokens = tokens + attended.output  # (B, P + N, D)
        if downsampler is None:
            return stream._replace(tokens=tokens)

        n = tokens.shape[1] - prefix

        def of_patches(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.narrow(1, prefix, n)

        before, after = tokens.split([prefix, n], dim=1)
        own_sizes = of_patches(sizes)
        hints = {"sizes": own_sizes} if downsampler.uses_sizes else {}
        hints |= {"keys": of_patches(attended.keys)} if asked.keys else {}
        hints |= {"class_attention": of_patches(attended.class_attention)} if asked.class_attention else {}
        found = downsampler(after, of_patches(attended.scores), **hints)
        kept, assignment = found[:2]
        if sizes is not None and own_sizes is not None:
            merged = merged_sizes(own_sizes, assignment, kept.shape[1])
            merged = merged * found.mask if isinstance(found, Masked) else merged
            sizes = torch.cat([sizes.narrow(1, 0, prefix), merged], dim=1)
        if patches is not None:
            patches = compose(patches, assignment)
        if places is not None:
            places = places.gather(1, representatives(after, kept, assignment))
        tokens = torch.cat([before, kept], dim=1)  # (B, P + K, D)
        return Stream(tokens, sizes, patches, places, stream.images)

    def _downsampler_of(self, stream: Stream) -> Downsampler | None:
        """Return the downsampler for the images of a stream."""
        if self.downsampler is None or self.frame.schedule is None:
            return self.downsampler
        assert stream.assignment is not None
        patches = int(stream.assignment.shape[1])
        return self.downsampler.with_keep(self.frame.schedule(patches)[self.index])

    def _table(self, stream: Stream, table: Tensor) -> Tensor:
        """Return the rotary table of the current tokens of a stream."""
        assert stream.assignment is not None
        if stream.images is not None and table.shape[0] > 1:
            table = table[stream.images]
        patches, k = stream.assignment.shape[1], stream.tokens.shape[1] - self.frame.prefix
        table = table[:, :, :patches]  # rows of padding come last
        return table if k == patches else self.positions(table, stream.assignment, stream.places, k)


def padding_removed(tokens: Tensor, valid: Tensor, frame: Frame) -> Batch:
    """Remove padding: images with the same number of patches form a stream.

    So each image has exactly its own result: padding is never attended to, clustered, scored or counted.

    Args:
        tokens: (B, P + N, D).
        valid: (B, N) bool, the patches that are not padding.
        frame: properties of the patched model.

    Raises:
        ValueError: if an image has no patch, or if a graph is captured.
    """
    if is_in_graph():
        raise ValueError(NOT_IN_A_GRAPH)
    counts = valid.sum(dim=1)
    if not counts.all():
        raise ValueError(f"image {int((counts == 0).nonzero()[0])} of the batch has no patch: remove it")
    order = None
    if not torch.equal(valid, torch.arange(valid.shape[1], device=valid.device) < counts[:, None]):
        order = valid.byte().sort(dim=1, descending=True, stable=True).indices  # (B, N)
        tokens = permuted(tokens, order, frame.prefix)
    streams = []
    for count in counts.unique().tolist():
        images = (counts == count).nonzero().flatten()
        streams.append(Stream.start(tokens[images, : frame.prefix + count], frame, images, masked=True))
    return Batch(streams, True, valid.shape[1], order)


class PooledBlocks(nn.Sequential):
    """The blocks of a patched model. They map tokens (B, P + N, D) to tokens (B, P + K, D).

    Args:
        blocks: one pooled block for each block of the model.
        setting: arguments that the model was patched with.
        host: the model's own stack of blocks.
    """

    def __init__(self, blocks: Sequence[PooledBlock], setting: Setting, host: nn.Sequential | nn.ModuleList) -> None:
        super().__init__(*blocks)
        if blocks:
            blocks[0].is_first = blocks[-1].is_last = True
        for index, block in enumerate(blocks):
            block.index = index
        self._host = (host,)  # a tuple, so that PyTorch does not register the stack as a submodule
        self.setting = setting
        self.training = host.training

    def give_back(self) -> nn.Sequential | nn.ModuleList:
        """Return the model's own stack with the current blocks of this stack."""
        (host,) = self._host
        blocks = [block.give_back() for block in cast(Iterable[PooledBlock], self)]
        del host[:]
        host.extend(blocks).training = self.training
        return host

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError(f"pooled blocks cannot be sliced; {NEEDS_PLAIN}")
        return super().__getitem__(index)
