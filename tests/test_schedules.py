import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tokenpool
from tokenpool import schedules
from tokenpool.schedules import by_decay, by_rate, by_step, paper, resolve, scaled


@pytest.mark.parametrize("model", ["deit_small", "deit_e318", "deit_e252"])
@pytest.mark.parametrize("level", range(8))
def test_scaling_to_the_papers_own_size_changes_nothing(model: str, level: int) -> None:
    assert scaled(model, level, tokens=196, depth=12) == paper(model, level)


def test_scaling() -> None:
    doubled = scaled("deit_small", 3, tokens=392, depth=12)
    assert doubled == [2 * limit for limit in paper("deit_small", 3)]
    deep = scaled("deit_small", 3, tokens=196, depth=24)
    assert deep[1::2] == paper("deit_small", 3) and sorted(deep, reverse=True) == deep
    between = scaled("deit_small", 2.5, tokens=196, depth=12)
    assert all(
        low <= k <= high for low, k, high in zip(paper("deit_small", 3), between, paper("deit_small", 2), strict=True)
    )
    assert scaled("deit_e252", 7, tokens=10, depth=2)[1] == 0


def test_rates_and_steps() -> None:
    assert by_rate(0.5, 196, 4) == [98, 49, 24, 12]
    assert by_rate(0.7, 196, 12, at=[3, 6, 9]) == [196] * 3 + [137] * 3 + [96] * 3 + [67] * 3
    assert by_rate(0.01, 196, 3) == [2, 1, 1] and by_rate(1, 196, 2) == [196, 196]
    assert by_step(13, 196, 12) == [196 - 13 * block for block in range(1, 13)]
    assert by_step(100, 196, 3) == [96, 1, 1] and by_step(0.5, 10, 4) == [10, 9, 8, 8]


def test_decay() -> None:
    assert by_decay(0, 196, 3) == [196] * 3
    assert by_decay(math.log(4), 100, 2) == [round(100 * 4**-0.25), 25]
    assert by_decay(1e6, 196, 3) == [1, 1, 1]
    falls = -np.diff([196, *by_decay(2.0, 196, 12)])
    assert falls[0] < falls[3] < falls[6]


@pytest.mark.parametrize("schedule", [by_step, by_decay])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, True, "2"])
def test_a_bad_steepness_is_named(schedule: Callable, value: object) -> None:
    with pytest.raises(ValueError, match=f"must be a number that is not negative, got {value!r}"):
        schedule(value, 196, 3)


@pytest.mark.parametrize(
    "keep, expected",
    [
        ([10, 5], [10, 5]),
        (0.5, [18, 9]),
        ("0.5", [18, 9]),
        ("0.5@1", [36, 18]),
        ("-13", [23, 10]),
        ("12,7", [12, 7]),
        ("deit_small:7", [1, 0]),
        (torch.tensor([3, 2]), [3, 2]),
    ],
)
def test_spellings(keep: object, expected: list[int]) -> None:
    found = resolve(keep, tokens=36, depth=2)
    assert found == expected and json.loads(json.dumps(found)) == expected  # a plain list


@pytest.mark.parametrize(
    "keep, message",
    [
        (0.0, "must be above 0 and at most 1, got 0.0"),
        (1.5, "must be above 0 and at most 1, got 1.5"),
        ("-x", "keep = '-x'"),
        ("deit_small:9", r"level = 9.0 must be a number in 0..7"),
        ("deit_huge:1", "the paper has no schedule for 'deit_huge'"),
        ("many", 'expected a list, 0.9 or "0.7@3,6,9" \\(a share\\), "-13" \\(a step\\)'),
        ("0.7@2", "block 2 must be a whole number in 0..1"),
        ([1, 2, 3], "keep has 3 entries, but the model has 2 blocks"),
        (7, "must be a list of 2 whole numbers"),
    ],
)
def test_bad_spellings_are_named(keep: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(keep, tokens=36, depth=2)


def test_rates_at_bad_blocks_are_named() -> None:
    with pytest.raises(ValueError, match="block 12 must be a whole number in 0..11"):
        by_rate(0.7, 196, 12, at=[3, 12])


def test_patch_takes_every_spelling(small: VisionTransformer, photos: torch.Tensor) -> None:
    for keep in (0.7, "-5", "deit_e252:3", [30, 20, 10, 5]):
        tokenpool.patch(small, "wkmedoids", keep)
        assert small.blocks.setting.keep == tuple(schedules.resolve(keep, 36, 4))
        assert small(photos).isfinite().all()
