"""The verdicts on the paper's claims: the rule, the differences behind them, and claims that the data do not carry."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import tokenpool
from experiments import artifacts, presets
from experiments.artifacts import needs
from experiments.show import claims, estimates
from experiments.show.estimates import CONTRADICTED, MIXED, NO_DATA, OPEN, REPRODUCED, Estimate, Target
from tokenpool.analysis import bits
from tokenpool.runs.study import Study

RESULTS = Path(__file__).parents[1] / "results"
NUMBERS = st.floats(-100, 100)


def study(name: str, folder: Path = RESULTS) -> Study:
    return Study(presets.get(name), folder / name, named=False)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return claims.table([(study(name), needed(name)) for name in ("cifar10_128", "pretrained", "digits")])


@given(st.tuples(NUMBERS, NUMBERS).map(sorted), st.tuples(NUMBERS, NUMBERS).map(sorted), st.sampled_from([None, 1, 3]))
def test_the_rule(target: list[float], interval: list[float], seeds: int | None) -> None:
    """Reproduced: every number of the interval is in the target; contradicted: none is; with one seed neither."""
    verdict = Target(*target).verdict(Estimate(interval[0], *interval, seeds))
    inside = [target[0] < value < target[1] for value in interval]
    apart = interval[1] <= target[0] or interval[0] >= target[1]
    if seeds == 1:
        assert verdict == OPEN
    else:
        assert verdict == (REPRODUCED if all(inside) else CONTRADICTED if apart else OPEN)


def test_over_data_sets_a_contradiction_is_never_hidden() -> None:
    assert estimates.overall([REPRODUCED, OPEN, NO_DATA]) == REPRODUCED
    assert estimates.overall([REPRODUCED, CONTRADICTED]) == MIXED
    assert estimates.overall([CONTRADICTED, OPEN]) == CONTRADICTED
    assert estimates.overall([OPEN, NO_DATA]) == OPEN
    assert estimates.overall([NO_DATA]) == NO_DATA


def test_differences_are_those_of_paired_tests() -> None:
    """Stored bits: `compare`. Several seeds without bits: Student's t. One seed without: independent errors."""
    frame = needed("cifar10_128")
    ours, theirs = (frame[frame["downsampler"] == name] for name in ("wkmedoids", "power_bert"))
    ours, theirs = (each[(each["stage"] == "finetune") & ~each["carry"].astype(bool)] for each in (ours, theirs))
    ours = ours[ours["options"].map(len) == 0]
    found = estimates.difference(ours, theirs)
    expected = tokenpool.compare(pd.concat([ours, theirs]), "wkmedoids", "power_bert")
    assert found == (expected.difference, expected.low, expected.high, expected.seeds)

    values = np.random.default_rng(0).normal(80, 2, (2, 3))
    several = [
        pd.DataFrame(
            {"run": [f"{side}{seed}" for seed in range(3)], "seed": range(3), "level": 1, "stage": "finetune"}
        ).assign(top1=top1, top1_error=1.5, gmacs=1.0)
        for side, top1 in zip("ab", values, strict=True)
    ]
    found = estimates.difference(*several)
    interval = stats.ttest_rel(*values).confidence_interval(0.95)
    assert found == pytest.approx((np.diff(values[::-1], axis=0).mean(), interval.low, interval.high, 3))
    one = estimates.difference(*(each[:1] for each in several))
    assert one.high - one.low == pytest.approx(2 * stats.norm.ppf(0.975) * 1.5 * 2**0.5) and one.seeds == 1
    assert estimates.difference(several[0], several[1].assign(level=2)) is None


def needed(name: str) -> pd.DataFrame:
    found = study(name)
    return found.points(needs(found, "table claims"))


@pytest.mark.slow
def test_verdicts_follow_from_the_stored_bits(rows: pd.DataFrame) -> None:
    """The claim that the paper is about holds on natural images; weights do not help there; digits decide neither."""
    by_claim = rows.set_index(["claim", "data"])
    main = "WK-Medoids beats PoWER-BERT with the same schedule"
    assert by_claim.at[(main, "cifar10_128"), "verdict"] == REPRODUCED and by_claim.at[(main, "cifar10_128"), "low"] > 1
    assert by_claim.at[(main, "digits"), "verdict"] == OPEN
    assert by_claim.at[(main, "pretrained"), "verdict"] == NO_DATA
    weights = "Weights help K-Medoids"
    assert by_claim.at[(weights, "cifar10_128"), "verdict"] == CONTRADICTED
    share = by_claim.loc["Fully-connected layers take over 80 % of the multiply-adds"]
    assert (share["low"] == share["high"]).all() and share.at["pretrained", "value"] == pytest.approx(83.4, abs=0.1)
    single = rows[rows["seeds"] == 1]
    assert len(single) > 5 and (single["verdict"] == OPEN).all()
    decided = rows[rows["verdict"].isin([REPRODUCED, CONTRADICTED])]
    assert decided[["value", "low", "high"]].notna().all(axis=None)
    assert rows.groupby("claim")["data"].nunique().eq(3).all()


def test_at_equal_cost_clustering_is_paid_for(rows: pd.DataFrame) -> None:
    """Each method that clusters gains less at equal cost than with the same schedule."""
    frame = needed("cifar10_128")
    tuned = frame[(frame["stage"] == "finetune") & ~frame["carry"].astype(bool) & (frame["options"].map(len) == 0)]
    for method, title in (("kmeans", "K-Means"), ("wkmeans", "WK-Means")):
        gain = rows[(rows["claim"].str.startswith(f"{title} beats PoWER-BERT")) & (rows["data"] == "cifar10_128")]
        assert gain["value"].item() < tokenpool.compare(tuned, method, "power_bert").difference


def test_a_study_without_runs_reproduces_nothing(tmp_path: Path) -> None:
    assert artifacts.sections([study("cifar10_128", tmp_path)], "claims") == []
    part = artifacts.sections([study("cifar10_128", tmp_path), study("digits")], "claims")[0]
    assert part.name == "digits" and "CIFAR" not in part.markdown()


def test_the_table_shows_every_number_with_its_verdict(rows: pd.DataFrame) -> None:
    shown = claims.shown(rows, {name: name for name in rows["data"].unique()})
    assert len(shown) == len(claims.claims()) == rows["claim"].nunique()
    for row in rows.itertuples():
        cell = shown.set_index("claim").at[row.claim, row.data]
        assert (cell == "-") == (row.verdict == NO_DATA) == math.isnan(row.value)
        assert cell == "-" or (f"{row.value:.1f}" in cell and claims.MARKS[row.verdict] in cell)


def test_the_saving_is_of_default_options_and_rests_on_one_seed() -> None:
    """A run with random centres or normalised attention that is cheap and good changes nothing."""
    digits, runs = study("digits"), needed("digits")
    found = estimates.saving(digits, runs)
    assert found.seeds == 1 and estimates.ABOVE.verdict(found) == OPEN
    tuned = runs[(runs["stage"] == "finetune") & (runs["downsampler"] == "wkmedoids") & (runs["seed"] == 0)]
    others = tuned[(tuned["options"].map(len) > 0) | tuned["qk_norm"].eq("l2")]
    assert set(others["variant"]) == {"", "alpha", "alpha1"}
    better = runs.assign(top1=runs["top1"].where(~runs["run"].isin(others["run"]), 100.0))
    assert estimates.saving(digits, better) == found


def test_convolutions_are_chosen_by_other_images_than_they_are_compared_by() -> None:
    """Right on every image of the first half of the pairs and on none of the rest: chosen, and then worth nothing."""
    runs = needed("cifar10_128")
    lucky = (
        runs[runs["downsampler"].eq("convolution") & runs["stage"].eq("finetune")].nsmallest(1, "gmacs")["run"].item()
    )
    right = bits.encode(np.arange(10_000) % 2 == 0)
    cheated = runs.assign(correct=runs["correct"].where(runs["run"] != lucky, right))
    cheated["top1"] = cheated["top1"].where(cheated["run"] != lucky, 50.0)
    found = estimates.above_convolution(study("cifar10_128"), cheated)
    honest = estimates.above_convolution(study("cifar10_128"), runs)
    assert found.value > honest.value and found.seeds == 1
