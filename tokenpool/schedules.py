"""Retention schedules K = (K_1 .. K_L): the maximum number of patch tokens after the attention of each block.

The class token is not counted: 0 means that only the class token remains. All functions return plain lists.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

# Marin et al. 2021, Tables 3-5, sparsity levels 0 to 7. DeiT-S level 0 has only eleven entries in print. With 173 as
# the twelfth entry, its FLOPs equal the printed ones.
_PAPER = {
    "deit_small": (
        (196, 196, 195, 194, 189, 180, 173, 173, 173, 173, 173, 173),
        (196, 195, 193, 188, 169, 140, 121, 110, 73, 38, 7, 0),
        (196, 195, 190, 177, 141, 108, 84, 69, 35, 18, 3, 0),
        (196, 194, 187, 163, 118, 85, 58, 47, 20, 12, 2, 0),
        (196, 193, 179, 142, 97, 64, 46, 34, 13, 9, 1, 0),
        (194, 183, 142, 89, 41, 20, 10, 7, 0, 0, 0, 0),
        (186, 162, 102, 56, 13, 4, 2, 2, 0, 0, 0, 0),
        (162, 129, 66, 33, 4, 1, 1, 0, 0, 0, 0, 0),
    ),
    "deit_e318": (
        (196, 196, 196, 194, 192, 184, 181, 181, 170, 170, 170, 170),
        (196, 195, 195, 190, 171, 147, 132, 122, 66, 43, 15, 0),
        (196, 195, 193, 180, 143, 109, 92, 77, 40, 21, 4, 0),
        (196, 195, 190, 165, 119, 84, 65, 50, 26, 14, 3, 0),
        (196, 194, 184, 149, 97, 65, 47, 33, 12, 9, 2, 0),
        (196, 186, 153, 93, 40, 15, 12, 9, 0, 0, 0, 0),
        (193, 173, 109, 52, 16, 4, 4, 4, 0, 0, 0, 0),
        (183, 145, 80, 33, 5, 1, 1, 2, 0, 0, 0, 0),
    ),
    "deit_e252": (
        (196, 196, 196, 195, 193, 189, 177, 177, 177, 177, 177, 177),
        (196, 196, 195, 189, 176, 161, 123, 122, 76, 48, 17, 0),
        (196, 196, 193, 179, 154, 123, 88, 79, 39, 22, 5, 0),
        (196, 195, 188, 167, 131, 96, 63, 52, 13, 11, 2, 0),
        (196, 194, 181, 147, 111, 75, 48, 36, 5, 7, 2, 0),
        (196, 187, 129, 88, 54, 20, 10, 10, 0, 1, 0, 0),
        (194, 163, 83, 44, 22, 6, 1, 3, 0, 0, 0, 0),
        (188, 122, 58, 28, 12, 2, 0, 2, 0, 0, 0, 0),
    ),
}

# Chen et al. 2023 (DiffRate), counts learned for DeiT at the given 10^9 multiply-adds: tokens after pruning and after
# merging in each block, with the class token. Source: compression_rate.json of github.com/OpenGVLab/DiffRate.
_DIFFRATE = {
    "diffrate_deit_tiny": {
        "0.6": (
            (197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3),
            (197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3),
        ),
        "0.7": (
            (197, 196, 194, 180, 150, 123, 98, 82, 68, 60, 52, 3),
            (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3),
        ),
        "0.8": (
            (197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
            (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
        ),
        "0.9": (
            (197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3),
            (197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3),
        ),
        "1.0": (
            (197, 197, 196, 194, 188, 184, 178, 164, 156, 137, 129, 21),
            (197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21),
        ),
    },
    "diffrate_deit_small": {
        "2.3": (
            (197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
            (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3),
        ),
        "2.5": (
            (197, 192, 174, 156, 131, 115, 111, 99, 76, 50, 39, 3),
            (197, 186, 160, 133, 119, 107, 96, 82, 66, 43, 37, 3),
        ),
        "2.7": (
            (197, 196, 182, 160, 141, 127, 115, 105, 88, 66, 49, 3),
            (197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3),
        ),
        "2.9": (
            (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
            (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
        ),
        "3.1": (
            (197, 197, 194, 180, 160, 147, 137, 129, 115, 92, 76, 3),
            (197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3),
        ),
    },
    "diffrate_deit_base": {
        "8.7": (
            (197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3),
            (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3),
        ),
        "10.0": (
            (197, 194, 182, 168, 148, 129, 113, 101, 82, 49, 25, 3),
            (197, 186, 174, 156, 137, 117, 105, 90, 66, 31, 19, 3),
        ),
        "10.4": (
            (197, 196, 188, 174, 156, 141, 121, 103, 90, 58, 25, 3),
            (197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3),
        ),
        "11.5": (
            (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
            (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3),
        ),
        "12.5": (
            (197, 197, 196, 192, 184, 170, 154, 139, 129, 94, 58, 3),
            (197, 196, 194, 190, 176, 160, 145, 131, 115, 68, 47, 3),
        ),
    },
}

MODELS = tuple(_PAPER)
DIFFRATE = {model: tuple(published) for model, published in _DIFFRATE.items()}  # models, and 10^9 multiply-adds of each
LEVELS = 8  # sparsity levels of each model


def paper(model: str, level: int) -> list[int]:
    """Return a schedule of the paper, for 12 blocks and 196 patch tokens (Marin et al. 2021, Tables 3, 4 and 5).

    Args:
        model: "deit_small", "deit_e318" or "deit_e252".
        level: sparsity level, 0..7.

    Raises:
        ValueError: if the paper has no schedule for the model or level.
    """
    if model not in _PAPER:
        raise ValueError(f"the paper has no schedule for {model!r}; it has {', '.join(_PAPER)}")
    if isinstance(level, bool) or not isinstance(level, Integral) or not 0 <= level < len(_PAPER[model]):
        raise ValueError(f"level = {level} must be a whole number in 0..{len(_PAPER[model]) - 1}")
    return list(_PAPER[model][level])


def scaled(model: str, level: float, tokens: int, depth: int) -> list[int]:
    """Scale a schedule of the paper (see `paper`) to another depth, number of tokens or fractional level.

    The share of tokens K / 196 is a function of the relative depth and of the level, and is interpolated linearly. For
    196 tokens, 12 blocks and whole levels, the result is the paper's schedule.

    Args:
        model: "deit_small", "deit_e318" or "deit_e252".
        level: sparsity level, a number in 0..7.
        tokens: number of patch tokens of an image.
        depth: number of blocks.

    Raises:
        ValueError: if the paper has no schedule for the model or level.
    """
    if not isinstance(level, Real) or not 0 <= level <= LEVELS - 1:
        raise ValueError(f"level = {level!r} must be a number in 0..{LEVELS - 1}")
    low = int(level)
    mild, strong = (np.array(paper(model, index)) / 196 for index in (low, min(low + 1, LEVELS - 1)))
    return _scaled(mild + (level - low) * (strong - mild), tokens, depth)


class PrunedAndMerged(NamedTuple):
    """The numbers of patch tokens that remain in each block, after pruning and then after merging."""

    pruned: list[int]
    merged: list[int]


def diffrate(model: str, gflops: str | float, tokens: int = 196, depth: int = 12) -> PrunedAndMerged:
    """Return a schedule of DiffRate (Chen et al. 2023) for DeiT, scaled like `scaled`. Class tokens are not counted.

    A published number can be higher than an earlier one. No tokens come back: the result never rises.

    Args:
        model: "diffrate_deit_tiny", "diffrate_deit_small" or "diffrate_deit_base".
        gflops: the cost of the model for which the schedule was learned, in 10^9 multiply-adds. `DIFFRATE` has all.
        tokens: number of patch tokens of an image.
        depth: number of blocks.

    Raises:
        ValueError: if there is no such schedule.
    """
    if model not in _DIFFRATE:
        raise ValueError(f"DiffRate has no schedule {model!r}; it has {', '.join(_DIFFRATE)}")
    known = _DIFFRATE[model].items()
    found = [published for cost, published in known if str(gflops) in (cost, f"{float(cost):g}")]
    if not found:
        raise ValueError(f"{model} has no schedule for {gflops} GFLOPs; it has {', '.join(_DIFFRATE[model])}")
    pruned, merged = (np.array(counts) - 1 for counts in found[0])  # without the class token
    merged = np.minimum.accumulate(np.minimum(pruned, merged))
    pruned = np.minimum(pruned, [196, *merged[:-1]])
    return PrunedAndMerged(*(_scaled(counts / 196, tokens, depth) for counts in (pruned, merged)))


def _scaled(shares: np.ndarray, tokens: int, depth: int) -> list[int]:
    """Return numbers of tokens for shares (12,) of the tokens after each of 12 blocks."""
    places = (np.arange(depth) + 1) * 12 / depth
    at_places = np.interp(places, np.arange(13), [1, *shares])
    # The result is zero only where the published schedule is zero.
    return [max(round(tokens * share), int(share > 0)) for share in at_places.tolist()]


def by_rate(rate: float, tokens: int, depth: int, at: Sequence[int] | None = None) -> list[int]:
    """Keep a constant share of the remaining tokens in each block, but at least one token.

    Args:
        rate: share of the remaining tokens that a block keeps, 0 < rate <= 1.
        tokens: number of patch tokens of an image.
        depth: number of blocks.
        at: indices of the blocks that remove tokens, starting at 0. Default: all blocks.

    Raises:
        ValueError: if the rate or a block is out of range.
    """
    if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 < rate <= 1:
        raise ValueError(f"the keep rate must be above 0 and at most 1, got {rate!r}")
    at = range(depth) if at is None else at
    wrong = [block for block in at if not isinstance(block, Integral) or not 0 <= block < depth]
    if wrong:
        raise ValueError(f"block {wrong[0]!r} must be a whole number in 0..{depth - 1}")
    keep, left = [], float(tokens)
    for block in range(depth):
        left = max(left * rate, 1.0) if block in at else left
        keep.append(round(left))
    return keep


def by_step(step: float, tokens: int, depth: int) -> list[int]:
    """Remove a constant number of tokens in each block, but keep at least one token (r in Bolya et al. 2023).

    Args:
        step: number of tokens that a block removes, not negative. It may be fractional; the entries are rounded.
        tokens: number of patch tokens of an image.
        depth: number of blocks.

    Raises:
        ValueError: for a negative step.
    """
    _check_not_negative("step", step)
    return [max(round(tokens - step * (block + 1)), 1) for block in range(depth)]


def by_decay(rate: float, tokens: int, depth: int) -> list[int]:
    """Remove few tokens in early blocks and many in late blocks: tokens * exp(-rate (l / depth)^2) after block l.

    At least one token remains. This family of schedules is an extension. Its shape is similar to the schedules that the
    paper learns. A model that is not fine-tuned is more accurate with it than with constant steps of the same cost
    (table `off_the_shelf`).

    Args:
        rate: not negative. 0 keeps all tokens.
        tokens: number of patch tokens of an image.
        depth: number of blocks.

    Raises:
        ValueError: for a negative rate.
    """
    _check_not_negative("rate", rate)
    return [max(round(tokens * math.exp(-rate * ((block + 1) / depth) ** 2)), 1) for block in range(depth)]


def resolve(keep: Sequence[int] | float | str, tokens: int, depth: int, least: int = 0) -> list[int]:
    """Convert any form of a schedule to a list.

    Args:
        keep: one of these forms: a list with one entry for each block; 0.9, the share of the remaining tokens that each
            block keeps; "0.7@3,6,9", the same for some blocks only (indices start at 0); "-13", the number of tokens
            that each block removes; "deit_small:3", the paper's schedule of this level, scaled to the model;
            "diffrate_deit_small:2.9", DiffRate's schedule of this cost, scaled to the model (see `diffrate`).
        tokens: number of patch tokens of an image.
        depth: number of blocks.
        least: the smallest entry of the result, if `keep` is a text. The paper's schedules end with zero tokens.

    Raises:
        ValueError: for any other value. The message contains the value.
    """
    if isinstance(keep, Real) and not isinstance(keep, Integral):
        return by_rate(float(keep), tokens, depth)
    if not isinstance(keep, str):
        return checked(keep, depth)
    try:
        return [max(limit, least) for limit in _parsed(keep, tokens, depth)]
    except ValueError as error:
        raise ValueError(
            f'keep = {keep!r}: {error}; expected a list, 0.9 or "0.7@3,6,9" (a share), "-13" (a step) or '
            '"deit_small:3" (the paper\'s)'
        ) from error


def _parsed(keep: str, tokens: int, depth: int) -> list[int]:
    model, colon, level = keep.partition(":")
    rate, at, blocks = keep.partition("@")
    if model in DIFFRATE:
        return diffrate(model, level, tokens, depth).merged
    if colon:
        return scaled(model, float(level), tokens, depth)
    if at:
        return by_rate(float(rate), tokens, depth, [int(block) for block in blocks.split(",")])
    if keep.startswith("-"):
        return by_step(int(keep[1:]), tokens, depth)
    return by_rate(float(keep), tokens, depth) if "." in keep else checked([int(k) for k in keep.split(",")], depth)


def tokens_kept(keep: Sequence[int], tokens: int) -> list[int]:
    """Return the number of tokens that remain after each block. A larger later entry does not restore tokens.

    Args:
        keep: retention schedule.
        tokens: number of patch tokens of an image.
    """
    kept = []
    for limit in keep:
        tokens = min(tokens, limit)
        kept.append(tokens)
    return kept


def checked(keep: Sequence[int] | float, depth: int, name: str = "keep") -> list[int]:
    """Return `keep` as a list of Python integers, one for each of `depth` blocks.

    Args:
        keep: a sequence of whole numbers, a NumPy array or a tensor. Any other value is an error.
        depth: number of blocks.
        name: name of the argument, for messages.

    Raises:
        ValueError: if `keep` is no sequence or has the wrong length, or if an entry is negative or not a whole number.
            The message names the entry.
    """
    if hasattr(keep, "tolist"):  # NumPy's arrays and PyTorch's tensors
        keep = keep.tolist()
    if isinstance(keep, str) or not isinstance(keep, Sequence):
        raise ValueError(f"{name} = {keep!r} must be a list of {depth} whole numbers, one a block")
    if len(keep) != depth:
        raise ValueError(f"{name} has {len(keep)} entries, but the model has {depth} blocks: give one entry a block")
    for block, limit in enumerate(keep):
        if isinstance(limit, bool) or not isinstance(limit, Integral):
            raise ValueError(f"{name}[{block}] = {limit!r} must be a whole number")
        if limit < 0:
            raise ValueError(f"{name}[{block}] = {limit} must not be negative")
    return [int(limit) for limit in keep]


def _check_not_negative(name: str, value: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"the {name} must be a number that is not negative, got {value!r}")


def __getattr__(name: str) -> Any:
    if name != "calibrate":
        raise AttributeError(f"module 'tokenpool.schedules' has no attribute {name!r}")
    return import_module("tokenpool.calibration").calibrate  # imported when first used, because it needs this module
