import shutil
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from experiments import artifacts, presets
from experiments.artifacts import needs, status
from experiments.show import illustrations, published
from tokenpool.analysis import plotting
from tokenpool.runs import timing
from tokenpool.runs.study import Study
from tokenpool.tracing import reconstruction_error

RESULTS = Path(__file__).parents[1] / "results"
COMMITTED = ("digits", "pretrained")  # presets whose results are part of the repository
FEW = ("1c", "2", "8")  # figures that are drawn in little time, one of each kind


@pytest.fixture(scope="module")
def committed() -> dict[str, Study]:
    """The studies whose results are part of the repository. Each file is read once."""
    return {preset: Study(presets.get(preset), RESULTS / preset) for preset in COMMITTED}


@pytest.fixture(scope="module")
def digits(committed: dict[str, Study]) -> Study:
    return committed["digits"]


@pytest.fixture
def empty(tmp_path: Path) -> Study:
    return Study(presets.get("digits"), tmp_path / "none")


@pytest.fixture(autouse=True)
def closed() -> None:
    yield
    plt.close("all")


def lines(ax: plt.Axes) -> dict[str, np.ndarray]:
    """The points (n, 2) of each labelled curve."""
    handles, labels = ax.get_legend_handles_labels()
    return {label: np.stack(handle[0].get_data(), 1) for handle, label in zip(handles, labels, strict=True)}


def outside(figure: Figure) -> list[str]:
    """The texts that leave a figure."""
    figure.canvas.draw()  # tick labels beyond the axes' limits are not shown; they do not count
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
    found = []
    for text in filter(lambda text: text.get_text().strip(), texts):
        box = text.get_window_extent()
        if box.x0 < -1 or box.x1 > figure.bbox.width + 1 or box.y0 < -1 or box.y1 > figure.bbox.height + 1:
            found.append(text.get_text())
    return found


@pytest.mark.parametrize(
    "preset, name",
    [pytest.param("digits", name, marks=() if name in FEW else pytest.mark.slow) for name in artifacts.names("figure")]
    + [("pretrained", name) for name in artifacts.names("figure")],
)
def test_every_figure_is_drawn_from_the_committed_runs(preset: str, name: str, committed: dict[str, Study]) -> None:
    """Axes are labelled. No text leaves the figure, whether panels stand side by side or one below the other."""
    study = committed[preset]
    state, _ = status(study, f"figure {name}")
    assert state in ("done", "none")
    wide, stacked = artifacts.draw(study, name), artifacts.draw(study, name, stacked=True)
    if state == "none" and wide is None:
        assert stacked is None
        return
    for ax in wide.axes:
        assert name == "1c" or (ax.get_xlabel() and ax.get_ylabel())
    assert outside(wide) == [] and outside(stacked) == []


def test_curves_are_the_data(digits: Study) -> None:
    paper, own = artifacts.draw(digits, "5a").axes
    printed = published.accuracies()
    expected = printed[(printed["model"] == "deit_small") & (printed["downsampler"] == "wkmedoids")]
    drawn = lines(paper)["Token Pooling, WK-Medoids"]
    assert drawn == pytest.approx(expected[["gmacs", "top1"]].sort_values("gmacs").to_numpy())
    runs = digits.points([run for run in needs(digits, "figure 5a") if run.downsampler == "wkmedoids"])
    means = runs.groupby("level")[["gmacs", "top1"]].mean().sort_values("gmacs").to_numpy()
    assert lines(own)["Token Pooling, WK-Medoids"] == pytest.approx(means * [1000, 1])
    assert "GFLOPs" in paper.get_xlabel() and "MFLOPs" in own.get_xlabel()
    assert "ImageNet" in paper.get_title() and "450 test images, 3 seeds" in own.get_title()


def test_all_points_of_a_figure_have_the_same_seeds(digits: Study) -> None:
    """Otherwise one curve could be better than another for its seeds alone."""
    for name in artifacts.names("figure"):
        seeds: dict[str, set[int]] = {}
        for run in needs(digits, f"figure {name}"):
            seeds.setdefault(f"{run.stage} {run.label}", set()).add(run.seed)
        assert len({frozenset(found) for found in seeds.values()}) == (0 if name == "2" else 1) or name == "12", name


def drawn_means(study: Study, name: str, **conditions: object) -> np.ndarray:
    """What a curve should show: the runs of the figure that meet the conditions, averaged over seeds, by cost."""
    runs = study.points(needs(study, f"figure {name}"))
    for column, value in conditions.items():
        runs = runs[[found == value for found in runs[column]]]
    means = runs.groupby("label")[["gmacs", "top1"]].mean().sort_values("gmacs").to_numpy()
    return means * [1000, 1]


@pytest.mark.slow
def test_curves_of_other_figures_are_their_runs(digits: Study) -> None:
    """Each of these once showed, or could show, the runs of its neighbour."""
    own = lines(artifacts.draw(digits, "6").axes[-1])
    random = [{"init": "random"}, {}]
    for label, options in zip(
        ("Token Pooling, K-Medoids, random centres", "Token Pooling, K-Medoids"), random, strict=True
    ):
        assert own[label] == pytest.approx(drawn_means(digits, "6", downsampler="kmedoids", options=options))
    own = lines(artifacts.draw(digits, "7").axes[-1])
    assert own["DeiT, base model"] == pytest.approx(_plain(digits, "base"))
    assert own["DeiT, fine-tuned as long as the others"] == pytest.approx(_plain(digits, "finetune"))
    without, carried = (lines(ax) for ax in artifacts.draw(digits, "9").axes)
    for drawn, carry in ((without, False), (carried, True)):
        expected = drawn_means(digits, "9", downsampler="wkmeans", carry=carry)
        assert drawn["Token Pooling, WK-Means"] == pytest.approx(expected)
    for name, variant in (("10a", "alpha1"), ("10b", "alpha")):
        own = lines(artifacts.draw(digits, name).axes[-1])
        expected = drawn_means(digits, name, downsampler="power_bert", variant=variant)
        assert own["PoWER-BERT, normalised"] == pytest.approx(expected)
        assert own["PoWER-BERT, not normalised"] == pytest.approx(
            drawn_means(digits, name, downsampler="power_bert", variant="")
        )
    own = lines(artifacts.draw(digits, "8").axes[-1])
    assert sum(len(own[f"{count} convolution{'s' if count > 1 else ''}"]) for count in (1, 2, 3)) == 27
    front = own["Convolution, best placements"]
    assert (np.diff(front, axis=0) > 0).all()
    own = lines(artifacts.draw(digits, "12").axes[-1])
    times = digits.points([run for run in needs(digits, "figure 12") if run.stage == "throughput"])
    speed = times[times["downsampler"] == "power_bert"].set_index("level")["speed_up"]
    expected = (speed * times["plain_images_per_second"].median()).to_numpy()
    assert sorted(own["PoWER-BERT"][:, 0]) == pytest.approx(sorted(expected))


def _plain(study: Study, stage: str) -> np.ndarray:
    runs = study.points(needs(study, "figure 7"))
    runs = runs[runs["stage"] == stage]
    return runs.groupby("variant")[["gmacs", "top1"]].mean().sort_values("gmacs").to_numpy() * [1000, 1]


@pytest.mark.parametrize(
    "pattern", ["finetune-none-*", "finetune-wkmedoids-level*", "throughput-*", "search-*", "clusters-*"]
)
@pytest.mark.slow
def test_every_figure_copes_with_one_study(pattern: str, tmp_path: Path) -> None:
    for path in (RESULTS / "digits").glob(f"{pattern}.json"):
        shutil.copy(path, tmp_path)
    study = Study(presets.get("digits"), tmp_path)
    drawn = {name for name in artifacts.names("figure") if artifacts.draw(study, name) is not None}
    assert {"1b", "2", "3a", "3b"} <= drawn and "9" not in drawn
    assert study.missing(needs(study, "figure 5a"))


def test_a_curve_of_ambiguous_rows_is_refused() -> None:
    rows = pd.DataFrame({"downsampler": "kmedoids", "gmacs": [1.0, 2.0], "top1": [70, 80], "carry": [False, True]})
    with pytest.raises(
        ValueError, match="one curve cannot .* downsampler kmedoids that differ: carry is empty or True"
    ):
        plotting.cost_accuracy(rows)
    with pytest.raises(ValueError, match="one picture cannot .* differ: seed is 0 or 1"):
        plotting.cost_accuracy(rows.assign(seed=[0, 1], carry=False))
    plotting.cost_accuracy(rows.assign(downsampler=["kmeans", "kmedoids"]))
    pairs = rows.assign(level=0, error=[1.0, 2.0])
    with pytest.raises(ValueError, match="a rank correlation cannot .* carry is empty or True"):
        illustrations.rank_correlations(pairs)


def test_figure_1b_has_the_papers_saving(digits: Study) -> None:
    """Abstract: "the same ImageNet top-1 accuracy using 42 % fewer computations"."""
    texts = [text.get_text() for text in artifacts.draw(digits, "1b").axes[0].texts]
    assert "\N{MINUS SIGN}42 %" in texts


def test_the_paper_is_drawn_without_any_run(empty: Study) -> None:
    assert len(artifacts.draw(empty, "3b").axes) == 1
    assert artifacts.draw(empty, "9") is None and artifacts.draw(empty, "1c") is None
    assert {"DynamicViT", "HVT"} <= lines(artifacts.draw(empty, "3b").axes[0]).keys()


def test_stacked_panels(digits: Study) -> None:
    wide, narrow = artifacts.draw(digits, "5b"), artifacts.draw(digits, "5b", stacked=True)
    assert wide.get_figwidth() > 1.5 * narrow.get_figwidth() and narrow.get_figheight() > wide.get_figheight()


def test_the_same_runs_give_the_same_file(digits: Study, tmp_path: Path) -> None:
    one, other = (plotting.save(artifacts.draw(digits, "8"), tmp_path / name) for name in ("a", "b"))
    assert [file.suffix for file in one] == [".png", ".pdf"] and all(file.stat().st_size > 5000 for file in one)
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]


def test_figure_2_is_what_section_3_2_says(digits: Study) -> None:
    """The highest scores are all in the left lobe; clustering reaches the right one, with a much lower error."""
    tokens, scores = illustrations.two_lobes()
    errors, reaches = {}, {}
    for method in (illustrations.PowerBert(4), illustrations.KMeans(4, iterations=50)):
        kept = method(tokens, scores)
        brute = sum(min((a - b) ** 2 for b in kept.tokens.flatten().tolist()) for a in tokens.flatten().tolist())
        errors[type(method)] = brute
        assert reconstruction_error(tokens, kept).item() == pytest.approx(brute, rel=1e-4)
        reaches[type(method)] = bool((kept.tokens > 0.55).any())
    assert reaches == {illustrations.PowerBert: False, illustrations.KMeans: True}
    assert errors[illustrations.KMeans] < errors[illustrations.PowerBert] / 10
    titles = "".join(ax.get_title() for ax in artifacts.draw(digits, "2").axes)
    assert all(f"{error:.3f}" in titles for error in errors.values())


def test_rank_correlation_against_scipy() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"level": [0] * 6 + [1] * 6, "downsampler": list("abcdef") * 2})
    frame["error"], frame["top1"] = rng.random(12), 100 * rng.random(12)
    nothing_left = pd.DataFrame({"level": 2, "downsampler": list("ab"), "error": [1.0, 2.0], "top1": [0.1, 0.2]})
    found = illustrations.rank_correlations(pd.concat([frame, nothing_left]))
    assert list(found.index) == [0, 1]
    for level, rows in frame.groupby("level"):
        assert found[level] == pytest.approx(spearmanr(rows["error"], rows["top1"]).statistic)


def test_clusters_are_parted_and_dropped_patches_hatched() -> None:
    image = np.linspace(0, 1, 8 * 8 * 3).reshape(8, 8, 3)
    ax = plotting.patches(image, [0, 0, 1, -1], (2, 2))
    (borders,) = [artist for artist in ax.collections if isinstance(artist, LineCollection)]
    assert len(borders.get_segments()) == 3  # 0|0 has none; 0/1, 0/-1 and 1|-1 have one each
    assert [patch.get_xy() for patch in ax.patches] == [(1, 1)]
    painted = np.asarray(ax.images[0].get_array())
    assert painted[0, 0] == pytest.approx(image[:4].reshape(-1, 3).mean(0))
    assert (painted[4:, 4:] == 0).all()
    with pytest.raises(ValueError, match=r"assignment has 4 patches, but the grid \(2, 3\) has 6"):
        plotting.patches(image, [0, 0, 1, -1], (2, 3))


def test_an_unknown_figure_lists_the_known_ones(digits: Study) -> None:
    with pytest.raises(ValueError, match="unknown figure '13'; known are 1b, 1c, 2, 3a"):
        artifacts.draw(digits, "13")


def test_styles_differ_without_colour() -> None:
    """Marker or line tells the methods apart in black and white, too."""
    looks = [(style["marker"], style.get("linestyle")) for style in plotting.STYLES.values()]
    assert len(set(looks)) == len(looks)


def test_throughput_alternates() -> None:
    order: list[str] = []

    class Spy(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, images: torch.Tensor) -> None:
            order.append(self.name)

    found = timing.measure(Spy("model"), Spy("plain"), torch.zeros(4, 1, 2, 2), repeats=3, warm_up=1)
    assert order == ["model", "plain"] * 4
    assert found["measured_batch"] == 4 and found["speed_up"] > 0
    assert found["speed_up"] == pytest.approx(found["images_per_second"] / found["plain_images_per_second"])


def test_convit_is_counted() -> None:
    """The cost of ConViT is not in its README: it is counted on timm's model."""
    rows = published.by_others().set_index("model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(timm.create_model("convit_tiny").eval(), torch.zeros(1, 3, 224, 224))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counted = analysis.by_operator()
    macs = sum(counted[name] for name in ("conv", "linear", "matmul", "bmm"))
    assert rows.at["ConViT-Ti", "gmacs"] == pytest.approx(macs / 1e9, abs=0.005)
    assert rows.at["ConViT-Ti", "top1"] == 73.1
