"""Paired differences against scipy, a simulation, and what must be refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import tokenpool
from tokenpool.analysis import bits, results

COMMITTED = Path(__file__).parents[1] / "results" / "cifar10_128"


def frame_of(correct: dict[str, np.ndarray], **columns: object) -> pd.DataFrame:
    """Runs by method, from whether each image is right, (seeds, images)."""
    rows = [
        {"run": f"{method}-{seed}", "stage": "finetune", "downsampler": method, "seed": seed, "level": 1}
        | {"data": "cifar10", "test_images": "x", "images": len(right), "correct": bits.encode(right)}
        | columns
        for method, by_seed in correct.items()
        for seed, right in enumerate(by_seed)
    ]
    return pd.DataFrame(rows)


def draw(seed: int, seeds: int, images: int, gain: float, spread: float = 0.0) -> dict[str, np.ndarray]:
    """Two methods on images of different difficulty, the one better by `gain` on the average, by seed more or less."""
    values = np.random.default_rng(seed)
    ease = values.uniform(0.2, 0.7, images)
    gains = gain + spread * values.standard_normal((seeds, 1))
    return {name: values.random((seeds, images)) < ease + plus for name, plus in (("a", gains), ("b", 0.0))}


def test_one_seed_is_the_paired_t_test_and_mcnemars() -> None:
    drawn = draw(0, 1, 400, 0.05)
    found = tokenpool.compare(frame_of(drawn), "a", "b")
    a, b = (drawn[name][0].astype(float) for name in "ab")
    expected = stats.ttest_rel(100 * a, 100 * b).confidence_interval(0.95)
    assert found[:3] == pytest.approx((100 * (a - b).mean(), expected.low, expected.high))
    better, worse = int((a > b).sum()), int((a < b).sum())
    assert found.p == pytest.approx(stats.binomtest(better, better + worse).pvalue)
    assert found[4:] == (1, 1, 400)
    other = tokenpool.compare(frame_of(drawn), "b", "a")
    assert other[:3] == pytest.approx((-found.difference, -found.high, -found.low)) and other.p == found.p


def test_of_many_seeds_without_noise_of_images_it_is_the_t_test_over_seeds() -> None:
    """All images of a seed alike: only seeds differ."""
    right = np.array([[True] * 8, [True] * 8, [False] * 8, [True] * 8])
    found = tokenpool.compare(frame_of({"a": right, "b": np.zeros_like(right)}), "a", "b")
    expected = stats.ttest_1samp([100.0, 100.0, 0.0, 100.0], 0).confidence_interval(0.95)
    assert found[:3] == pytest.approx((75, expected.low, expected.high))


@pytest.mark.slow
@pytest.mark.parametrize("seeds, spread", [(1, 0.0), (3, 0.0), (3, 0.05)])
def test_the_interval_covers_the_truth(seeds: int, spread: float) -> None:
    covered = 0
    for trial in range(200):
        found = tokenpool.compare(frame_of(draw(trial, seeds, 300, 0.05, spread)), "a", "b")
        covered += found.low <= 5 <= found.high
    assert covered >= 183  # 190 expected of an exact one; 183 has a probability of 0.999


def test_schedules_are_paired() -> None:
    drawn = draw(1, 2, 50, 0.1)
    mild, strong = frame_of(drawn), frame_of(drawn, level=2)
    both = tokenpool.compare(pd.concat([mild, strong]), "a", "b")
    assert both.pairs == 4 and both.difference == pytest.approx(tokenpool.compare(mild, "a", "b").difference)
    lacking = pd.concat([mild, strong[strong["downsampler"] == "a"]])
    assert tokenpool.compare(lacking, "a", "b").pairs == 2
    chosen = {"downsampler": "a", "level": 2}, {"downsampler": "b", "level": 2}
    assert tokenpool.compare(pd.concat([mild, strong]), *chosen).pairs == 2


def test_at_equal_cost_the_curve_is_linear_between_neighbours() -> None:
    """A quarter of the way between two runs, and on one of them; outside of the curve there is nothing to compare."""
    drawn = draw(3, 2, 60, 0.1) | {"cheap": draw(4, 2, 60, 0.0)["b"]}
    costs = {"a": 1.25, "cheap": 1.0, "b": 2.0}
    frame = frame_of(drawn).assign(gmacs=lambda frame: frame["downsampler"].map(costs))
    twice = frame.assign(downsampler=frame["downsampler"].replace("cheap", "b"))
    curve = twice.assign(level=frame["level"].where(frame["downsampler"] != "cheap", 7))
    a, b, cheap = (drawn[name].astype(float) for name in ("a", "b", "cheap"))
    expected = 100 * (a - (0.75 * cheap + 0.25 * b))
    found = tokenpool.compare(curve, "a", "b", at="cost")
    assert found.difference == pytest.approx(expected.mean()) and found.pairs == 2 and found.seeds == 2
    images = expected.mean(axis=0).std(ddof=1) ** 2 / 60
    seeds = expected.mean(axis=1).std(ddof=1) ** 2 / 2
    freedom = (images + seeds) ** 2 / (images**2 / 59 + seeds**2)
    half = stats.t.ppf(0.975, freedom) * (images + seeds) ** 0.5
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half))
    on_a_run = tokenpool.compare(curve.assign(gmacs=curve["gmacs"].replace(1.25, 2.0)), "a", "b", at="cost")
    assert on_a_run.difference == pytest.approx(100 * (a - b).mean())
    with pytest.raises(ValueError, match="no runs of 'a' and 'b' have a seed and cost in common"):
        tokenpool.compare(curve.assign(gmacs=curve["gmacs"].replace(1.25, 2.5)), "a", "b", at="cost")
    with pytest.raises(ValueError, match="cost the same, so they cannot be on one curve"):
        tokenpool.compare(curve.assign(gmacs=1.0), "a", "b", at="cost")
    with pytest.raises(ValueError, match="'b' selects both b-0 and cheap-0: select by more columns"):
        tokenpool.compare(twice, "a", "b", at="cost")
    with pytest.raises(ValueError, match="at = 'flops' must be"):
        tokenpool.compare(curve, "a", "b", at="flops")


def test_what_cannot_be_paired_is_refused() -> None:
    frame = frame_of(draw(2, 2, 50, 0.1))
    with pytest.raises(ValueError, match="no run has downsampler 'c'"):
        tokenpool.compare(frame, "c", "b")
    with pytest.raises(ValueError, match="no runs of .* have a seed and schedule in common"):
        tokenpool.compare(frame, {"run": "a-0"}, {"run": "b-1"})
    with pytest.raises(ValueError, match="'a' selects both a-0 and a-"):
        tokenpool.compare(pd.concat([frame, frame]), "a", "b")
    with pytest.raises(ValueError, match="that differ: test_images is x or y"):
        tokenpool.compare(frame.assign(test_images=["x", "x", "y", "y"]), "a", "b")
    with pytest.raises(ValueError, match="run a-0 does not store its test images"):
        tokenpool.compare(frame.assign(test_images=[None, "x", "x", "x"]), "a", "b")
    with pytest.raises(ValueError, match="run a-0 does not store which images were correct"):
        tokenpool.compare(frame.drop(columns="correct"), "a", "b")
    with pytest.raises(ValueError, match="no column 'method'"):
        tokenpool.compare(frame, {"method": "a"}, "b")
    digits = frame.assign(data="digits", split=frame["seed"])
    with pytest.raises(ValueError, match="differ: split is 0 or 1"):
        tokenpool.compare(digits, "a", "b")


def test_the_papers_claim_on_natural_images() -> None:
    """Stored bits give the stored accuracies, and clustering beats selection once both are fine-tuned (section 5.2)."""
    frame = results.load(COMMITTED)
    tested = frame[frame["correct"].notna()]
    assert len(tested) > 100 and (tested["images"] == 10_000).all()
    for run in tested.itertuples():
        assert 100 * bits.decode(run.correct, 10_000).mean() == pytest.approx(run.top1)
    frame = frame[(frame["options"].map(len) == 0) & ~frame["carry"]]
    for method in ("kmeans", "kmedoids", "wkmeans", "wkmedoids"):
        found = tokenpool.compare(frame, method, "power_bert")
        assert found.low > 1.5 and found.p < 1e-50 and found.pairs == 15 and found.images == 10_000
    assert tokenpool.compare(frame, "wkmedoids", "kmedoids").high < 0  # weights do not help here
