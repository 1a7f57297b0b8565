"""The schedule that meets a budget: searched in a family of schedules, completed where need be, and checked.

A steeper schedule may cost more: a block that kept all its tokens, and now loses one, has to cluster them. A search
that takes costs to be monotone may end anywhere, so this one checks what it returns.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from tokenpool import schedules

LEAST = 0.98  # the share of a budget that is used, unless a single token more would be too much

Cost = Callable[[Sequence[int]], int]


def family(name: str, tokens: int, depth: int) -> Callable[[float], list[int]]:
    """The schedules of a family by their steepness, from 0, all tokens, to 1, one token after the first block.

    Args:
        name: "decay" (`schedules.by_decay`) or "step" (`schedules.by_step`).
        tokens: patch tokens of an image.
        depth: blocks.

    Raises:
        ValueError: for another name.
    """
    if name == "decay":
        return lambda steepness: schedules.by_decay(steepness * depth**2 * math.log(2 * tokens), tokens, depth)
    if name == "step":
        return lambda steepness: schedules.by_step(steepness * tokens, tokens, depth)
    raise ValueError(f'family = {name!r} must be "decay" or "step"')


def meet(budget: int, total: Cost, backbone: Cost, schedule: Callable[[float], list[int]]) -> list[int]:
    """A schedule that costs between `LEAST` of the budget and all of it, or to which no block can add a token.

    It is the family's, if that has one. Otherwise blocks get more tokens, the last ones first.

    Args:
        budget: multiply-adds of one image, not more than those of all tokens.
        total: what a schedule costs, clustering included.
        backbone: what it costs without clustering; grows with each entry.
        schedule: see `family`.

    Raises:
        ValueError: if even one token after the first block costs more.
    """
    every, one = schedule(0.0), schedule(1.0)
    if total(every) <= budget:
        return every
    if total(one) > budget:
        raise ValueError(
            f"{budget / 1e9:.6g} GMACs are too few: with one token left after the first block, it costs "
            f"{total(one) / 1e9:.4g}"
        )
    keep = _of_family(budget, total, backbone, schedule)
    if total(keep) < LEAST * budget:
        keep = _filled(keep, every[0], budget, total)
    _check(keep, every[0], budget, total)
    return keep


def _of_family(budget: int, total: Cost, backbone: Cost, schedule: Callable[[float], list[int]]) -> list[int]:
    """A schedule of the family that fits and whose milder neighbour does not.

    The mildest whose backbone leaves what is reserved for clustering. How much that is: what clustering cost the last
    time, or, should that lead nowhere, halfway between what was too little and what was enough.
    """

    def within(limit: int) -> list[int]:
        """The mildest schedule whose backbone costs no more."""
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
        if spent == reserved or enough - too_little <= 1 or (attempt >= 5 and total(best) >= LEAST * budget):
            break
        reserved = (reserved + spent) // 2 if attempt else spent
        if attempt >= 5 or not too_little < reserved < enough:
            reserved = (too_little + enough) // 2
    return best


def _filled(keep: list[int], tokens: int, budget: int, total: Cost) -> list[int]:
    """Give more tokens to blocks until `LEAST` of the budget is used, or until none can have one more."""
    while total(keep) < LEAST * budget:
        for blocks, room in _places(keep, tokens):
            # With all that enter, the block does not cluster, and that may be cheaper than with fewer.
            fit = room if total(_raised(keep, blocks, room)) <= budget else 0
            fit = fit or bisect_right(range(1, room), budget, key=lambda by: total(_raised(keep, blocks, by)))
            if fit:
                keep = _raised(keep, blocks, fit)
                break
        else:
            break
    return keep


def _places(keep: Sequence[int], tokens: int) -> Iterator[tuple[range, int]]:
    """Blocks in a row that can keep more tokens, and how many more, the last ones first.

    First blocks that keep equally many, all of them, so that no further block clusters; then the first ones of them.
    """
    entering = [tokens, *keep]
    starts = [block for block, limit in enumerate(keep) if limit < entering[block]]
    rows = [range(*ends) for ends in zip(starts, [*starts[1:], len(keep)], strict=True)][::-1]
    parts = [row[:length] for row in rows for length in range(len(row) - 1, 0, -1)]
    for blocks in rows + parts:
        yield blocks, entering[blocks[0]] - keep[blocks[0]]


def _raised(keep: Sequence[int], blocks: range, by: int) -> list[int]:
    return [limit + by if block in blocks else limit for block, limit in enumerate(keep)]


def _check(keep: Sequence[int], tokens: int, budget: int, total: Cost) -> None:
    """Raise a ValueError unless the promise of `meet` is kept."""
    cost = total(keep)
    if cost <= budget and cost >= LEAST * budget:
        return
    if cost > budget or any(total(_raised(keep, blocks, 1)) <= budget for blocks, _ in _places(keep, tokens)):
        raise ValueError(
            f"no schedule found that meets {budget / 1e9:.6g} GMACs: the best costs {cost / 1e9:.6g}; give keep instead"
        )
