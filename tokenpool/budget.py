"""Find the retention schedule that meets a budget: search a family of schedules, use up the rest, check the result.

A schedule with fewer tokens can cost more, because a block that keeps all tokens does not cluster them. So the cost is
not monotone within a family of schedules, and the search checks its result.
"""

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenpool import hosts, schedules
from tokenpool.downsampling import Downsampler, Placed, find
from tokenpool.flops import OnImages, macs_by_module

MIN_SHARE = 0.98  # minimum share of the budget to use, unless one more token in any block would exceed the budget

Cost = Callable[[Sequence[int]], int]


def schedule_for(
    gmacs: float,
    model: nn.Module,
    downsampler: str | type[Downsampler] = "key_medoids",
    family: str = "decay",
    *,
    dense: bool = False,
    positions: str = "mean",
    **options: Any,
) -> list[int]:
    """Find the schedule that uses a budget, clustering included: `keep` for `tokenpool.patch`.

    The patched model costs between 0.98 and 1.0 of the budget, as counted by `flops.count`. It costs less only if one
    more token in any block would exceed the budget. If a schedule of the family meets the budget, the result is from
    the family. See `meet`.

    Args:
        gmacs: budget of one image's forward pass, in units of 10^9 multiply-adds.
        model: a model of a family in `tokenpool.hosts`, patched or plain. It is not changed.
        downsampler: see `tokenpool.patch`.
        family: "decay", "step" or "stages", see `schedules_of`.
        dense: see `tokenpool.patch`.
        positions: see `tokenpool.patch`.
        **options: arguments of the downsampler's class.

    Returns:
        The maximum number of patch tokens after each block.

    Raises:
        TypeError: if the model belongs to no supported family.
        ValueError: if the budget is too small even for one token after the first block, or more than the plain model
            costs. Also for an unknown family, method or option, or for a method without a schedule.
    """
    name, method = find(downsampler)
    if method is None or issubclass(method, Placed):
        raise ValueError(f"downsampler {name!r} has no schedule that could meet a budget of {gmacs!r} GMACs")
    if not isinstance(gmacs, Real) or isinstance(gmacs, bool) or not 0 < gmacs < math.inf:
        raise ValueError(f"gmacs = {gmacs!r} must be a positive number")
    cost = ScheduleCost(model, method, dense, positions, **options)
    schedule = schedules_of(family, cost.tokens, len(cost.blocks))
    macs = math.floor(float(gmacs) * 1e9 * (1 + 1e-15))  # a whole number that was divided by 1e9 stays whole
    plain = cost.backbone(schedule(0.0))
    if macs > plain:
        raise ValueError(
            f"gmacs = {float(gmacs):.10g} is more than the plain model costs, {plain / 1e9:.10g}: give a smaller budget"
        )
    return meet(macs, cost, cost.backbone, schedule)


class BlockCost(NamedTuple):
    """Multiply-adds of a block.

    Attributes:
        entering: cost for each token that enters the block.
        leaving: cost for each token that leaves the downsampler.
        pair: cost for each pair of query and key.
        key_width: width d of the keys. The cost of some downsamplers depends on it.
        table: cost for each patch of the image to merge rotary positions, if the block gets fewer tokens than patches.
    """

    entering: int
    leaving: int
    pair: int
    key_width: int
    table: int


class ScheduleCost:
    """The cost of a model as a function of its schedule. It equals `flops.count`, but does not run the whole model.

    fvcore counts each layer once, for a few tokens. The cost of linear layers is proportional to the number of tokens,
    and the cost of attention to the number of pairs of tokens. `Downsampler.macs` gives the cost of a downsampler.
    Downsamplers without it are traced, as with `patch(carry=True)`.

    Args:
        model: a model of a family in `tokenpool.hosts`, patched or plain. It is not changed.
        method: class of the downsampler.
        dense: see `tokenpool.patch`.
        positions: see `tokenpool.patch`.
        **options: arguments of the downsampler's class.

    Attributes:
        tokens: number of patch tokens of an image.
        blocks: cost of each block.
    """

    def __init__(
        self,
        model: nn.Module,
        method: type[Downsampler],
        dense: bool = False,
        positions: str = "mean",
        **options: Any,
    ) -> None:
        adapter = hosts.of(model)
        self.host, self.method, self.options = adapter.host(dense), method, options
        self.prefix = adapter.prefix
        self.tokens = math.prod(adapter.grid(adapter.image_shape[1:]))
        known: dict[Hashable, int] = {}
        self.blocks = [_block_cost(adapter.layers(block), positions, known) for block in adapter.blocks]
        self._traced: dict[tuple[int, int, int], tuple[int, int]] = {}

        merges = any(layer is not None and layer.merges for layer in self._layers([1] * len(self.blocks)))
        self._head_reads = self.tokens if self.host.unpools and merges else None
        first = _FirstTokens(0)
        rest = adapter.copy_with_blocks(nn.Sequential(first)).cpu().float().eval()
        self._outside = []
        for n in [self.tokens] if self._head_reads else [1, 2, 3] if self.host.reads_patches else [1]:
            first.limit = self.prefix + n
            self._outside.append(_macs(OnImages(rest, adapter), adapter.blank_image()))

    def __call__(self, keep: Sequence[int]) -> int:
        """Return the multiply-adds of one image, clustering included, for a schedule."""
        macs, n = 0, self.tokens
        kept: list[int] = []
        for index, layer in enumerate(self._layers(keep)):
            macs += self.tokens * self.blocks[index].table if n < self.tokens else 0
            spent, n = self._downsampling_cost(index, layer, n)
            macs, kept = macs + spent, [*kept, n]
        return macs + self._network(kept)

    def backbone(self, keep: Sequence[int]) -> int:
        """Return the multiply-adds of one image, without clustering, for a schedule."""
        return self._network(schedules.tokens_kept(keep, self.tokens))

    def _network(self, kept: Sequence[int]) -> int:
        macs, n = self._embedding_and_head(kept[-1]), self.tokens + self.prefix
        for block, left in zip(self.blocks, kept, strict=True):
            macs += n * block.entering + n * n * block.pair
            n = left + self.prefix
            macs += n * block.leaving
        return macs

    def _embedding_and_head(self, n: int) -> int:
        """Return the cost of embedding and head. It is at most quadratic in n, so three counts determine it."""
        if len(self._outside) == 1:  # it does not depend on n
            return self._outside[0]
        one, two, three = self._outside
        return one + (n - 1) * (two - one) + (n - 1) * (n - 2) // 2 * (three - 2 * two + one)

    def _layers(self, keep: Sequence[int]) -> list[Downsampler | None]:
        device = "meta" if "macs" in vars(self.method) else "cpu"  # no weights for layers that do not run
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):  # some downsamplers have random weights
                return self.method.for_blocks(self.host, list(keep), **self.options)
        except TypeError as error:
            raise ValueError(f"downsampler {find(self.method)[0]!r}: {error}") from error

    def _downsampling_cost(self, index: int, layer: Downsampler | None, n: int) -> tuple[int, int]:
        """Return the multiply-adds of a block's downsampler on n tokens, and the number of tokens that it keeps."""
        if layer is None or not layer.acts_on(n):
            return 0, n
        width, key_width = self.host.width, self.blocks[index].key_width
        if "macs" in vars(type(layer)):
            return layer.macs(n, width, key_width) if layer.keep else 0, layer.keep
        key = (index, n, layer.keep)
        if key not in self._traced:
            # If nothing reads the assignment, the graph of `flops.count` does not contain its computation.
            is_read = index < len(self.blocks) - 1 or self._head_reads is not None
            self._traced[key] = traced_cost(layer, n, width, key_width, is_read)
        return self._traced[key]


class _FirstTokens(nn.Module):
    """Return the first `limit` tokens."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, tokens: Tensor, *ignored: Any, **also_ignored: Any) -> Tensor:
        return tokens[:, : self.limit]


def _block_cost(layers: hosts.Layers, positions: str, known: dict[Hashable, int]) -> BlockCost:
    """Count the layers of a block. `known` stores the cost of each layer structure."""

    def per_token(layer: nn.Module, width: int) -> int:
        kinds = tuple((name, type(part)) for name, part in layer.named_modules())
        shapes = tuple((name, value.shape) for name, value in layer.state_dict().items() if torch.is_tensor(value))
        if (structure := (kinds, shapes)) not in known:
            known[structure] = _macs(copy.deepcopy(layer).cpu().float().eval(), torch.zeros(1, 1, width))
        return known[structure]

    before, after = (sum(per_token(*layer) for layer in part) for part in (layers.before, layers.after))
    table = layers.table if positions == "mean" else 0
    return BlockCost(before, after, 2 * layers.heads * layers.head_dim, layers.head_dim, table)


def traced_cost(
    layer: Downsampler, n: int, width: int, key_width: int, with_assignment: bool = True
) -> tuple[int, int]:
    """Run a downsampler on n tokens to count its multiply-adds and the tokens that it keeps.

    Args:
        layer: the downsampler. It is copied.
        n: number of tokens.
        width: width D of the tokens.
        key_width: width d of the keys.
        with_assignment: whether to count the computation of the assignment.

    Returns:
        Multiply-adds, and the number of tokens that remain.
    """
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(0))  # the cost does not depend on the values
    hints = {"sizes": torch.ones(1, n)} if layer.uses_sizes else {}
    hints |= {"keys": draw(1, n, key_width)} if layer.uses_keys else {}
    hints |= {"class_attention": draw(1, n)} if layer.uses_class_attention else {}
    inputs = draw(1, n, width), draw(1, n)
    traceable = _WithHints(copy.deepcopy(layer), hints, with_assignment)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return _macs(traceable, inputs), traceable(*inputs)[0].shape[1]


class _WithHints(nn.Module):
    """A downsampler with fixed hints. Its only arguments are tensors, because tracing requires this."""

    def __init__(self, layer: Downsampler, hints: dict[str, Tensor], with_assignment: bool) -> None:
        super().__init__()
        self.layer, self.hints, self.outputs = layer.eval(), hints, 2 if with_assignment else 1

    def forward(self, tokens: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layer(tokens, scores, **self.hints)[: self.outputs])


def _macs(module: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> int:
    return sum(macs_by_module(module, inputs).values())


def schedules_of(family: str, tokens: int, depth: int) -> Callable[[float], list[int]]:
    """Return a function from steepness to schedule.

    Steepness 0 keeps all tokens. Steepness 1 keeps one token after the first block that removes tokens.

    Args:
        family: "decay" (`schedules.by_decay`); "step" (`schedules.by_step`); or "stages": the blocks depth / 4,
            depth / 2 and 3 depth / 4 (indices start at 0) keep the same share of their tokens (`schedules.by_rate`), as
            in EViT (Liang et al. 2022).
        tokens: number of patch tokens of an image.
        depth: number of blocks.

    Raises:
        ValueError: for an unknown family.
    """
    if family == "decay":
        return lambda steepness: schedules.by_decay(steepness * depth**2 * math.log(2 * tokens), tokens, depth)
    if family == "step":
        return lambda steepness: schedules.by_step(steepness * tokens, tokens, depth)
    if family == "stages":
        at = [depth * quarter // 4 for quarter in (1, 2, 3)]
        least = 1 / (2 * tokens)  # the share that keeps one token
        return lambda steepness: schedules.by_rate(max(1 - steepness, least), tokens, depth, at)
    raise ValueError(f'family = {family!r} must be "decay", "step" or "stages"')


def meet(budget: int, total: Cost, backbone: Cost, schedule: Callable[[float], list[int]]) -> list[int]:
    """Find a schedule that costs at least `MIN_SHARE` of the budget and at most the budget.

    The result may cost less than `MIN_SHARE` if one more token in any block would exceed the budget. If a schedule of
    the family meets the budget, the result is from the family. Otherwise, some blocks keep more tokens than in the
    family. The last blocks are tried first.

    Args:
        budget: multiply-adds of one image, at most the cost of the plain model.
        total: returns the cost of a schedule, clustering included.
        backbone: returns the cost of a schedule without clustering. The cost increases with each entry.
        schedule: see `schedules_of`.

    Raises:
        ValueError: if the model costs more even with one token after the first block that removes tokens.
    """
    every, one = schedule(0.0), schedule(1.0)
    if total(every) <= budget:
        return every
    if total(one) > budget:
        raise ValueError(
            f"{budget / 1e9:.6g} GMACs are too few: the model costs {total(one) / 1e9:.4g} with one token after "
            f"block {one.index(min(one))}; give a larger budget"
        )
    keep = _search_family(budget, total, backbone, schedule)
    if total(keep) < MIN_SHARE * budget:
        keep = _use_up(keep, every[0], budget, total)
    _check(keep, every[0], budget, total)
    return keep


def _search_family(budget: int, total: Cost, backbone: Cost, schedule: Callable[[float], list[int]]) -> list[int]:
    """Find the schedule of the family with the most expensive backbone that meets the budget.

    The search reserves a part of the budget for clustering, and tries the least steep schedule whose backbone fits into
    the rest. The next reserve is the cost of clustering in this attempt. If this does not converge, the next reserve is
    the middle between a reserve that was too small and a reserve that was large enough.
    """

    def within(limit: int) -> list[int]:
        """Return the least steep schedule whose backbone costs at most `limit`."""
        mild, steep = 0.0, 1.0
        if backbone(schedule(mild)) <= limit:
            return schedule(mild)
        for _ in range(40):
            middle = (mild + steep) / 2
            mild, steep = (middle, steep) if backbone(schedule(middle)) > limit else (mild, middle)
        return schedule(steep)

    best = schedule(1.0)
    too_little, enough, reserved = 0, budget - backbone(best), 0
    for attempt in range(60):
        keep = within(budget - reserved)
        spent = total(keep) - backbone(keep)
        if backbone(keep) + spent <= budget:
            enough = reserved
            best = max(best, keep, key=backbone)
        else:
            too_little = reserved
        if spent == reserved or enough - too_little <= 1 or (attempt >= 5 and total(best) >= MIN_SHARE * budget):
            break
        reserved = (reserved + spent) // 2 if attempt else spent
        if attempt >= 5 or not too_little < reserved < enough:
            reserved = (too_little + enough) // 2
    return best


def _use_up(keep: list[int], tokens: int, budget: int, total: Cost) -> list[int]:
    """Let blocks keep more tokens until `MIN_SHARE` of the budget is used, or until no block can keep one more."""
    while total(keep) < MIN_SHARE * budget:
        for blocks, room in _extendable_ranges(keep, tokens):
            # A block that keeps all tokens does not cluster, so it can cost less than a block that keeps fewer.
            fit = room if total(_extended(keep, blocks, room)) <= budget else 0
            fit = fit or bisect_right(range(1, room), budget, key=lambda by: total(_extended(keep, blocks, by)))
            if fit:
                keep = _extended(keep, blocks, fit)
                break
        else:
            break
    return keep


def _extendable_ranges(keep: Sequence[int], tokens: int) -> Iterator[tuple[range, int]]:
    """Yield ranges of blocks that can keep more tokens, with the number of additional tokens, last blocks first.

    Neighbouring blocks with the same number of tokens are one range. Complete ranges come first, because extending them
    does not make a further block cluster. Parts of each range, from its first block on, follow.
    """
    entering = [tokens, *keep]
    starts = [block for block, limit in enumerate(keep) if limit < entering[block]]
    rows = [range(*ends) for ends in zip(starts, [*starts[1:], len(keep)], strict=True)][::-1]
    parts = [row[:length] for row in rows for length in range(len(row) - 1, 0, -1)]
    for blocks in rows + parts:
        yield blocks, entering[blocks[0]] - keep[blocks[0]]


def _extended(keep: Sequence[int], blocks: range, by: int) -> list[int]:
    return [limit + by if block in blocks else limit for block, limit in enumerate(keep)]


def _check(keep: Sequence[int], tokens: int, budget: int, total: Cost) -> None:
    """Raise a ValueError if the schedule does not fulfil the description of `meet`."""
    cost = total(keep)
    if cost <= budget and cost >= MIN_SHARE * budget:
        return
    if cost > budget or any(
        total(_extended(keep, blocks, 1)) <= budget for blocks, _ in _extendable_ranges(keep, tokens)
    ):
        raise ValueError(
            f"no schedule found that meets {budget / 1e9:.6g} GMACs: the best costs {cost / 1e9:.6g}; give keep instead"
        )
