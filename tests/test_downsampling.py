"""Downsampling methods: the contract that all of them keep, ToMe's matching against an oracle, and the registry.

How methods behave inside a model is tested in `test_blocks.py`.
"""

import copy
import dataclasses
import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenpool
from experiments import artifacts, presets
from experiments.needed import protocol_runs
from experiments.show import tables
from tokenpool import downsampling, flops
from tokenpool.analysis import plotting
from tokenpool.downsampling import METHODS, REGISTRY, BipartiteMatching, Downsampled, Method
from tokenpool.runs.run import Run
from tokenpool.runs.study import Study

ROOT = Path(__file__).parents[1]
# Their result depends on the order of the tokens. (K-Medoids: of the two tokens of a cluster the first is the medoid.)
BY_POSITION = ("random", "importance", "kmedoids", "tome", "mctf", "tofu")
NOT_MEANS = ("tofu", "ward", "hvt")  # two stretch means, and HVT's windows overlap; they have tests of their own
GRID, WIDTH = (3, 5), 6
ALL = [name for name in METHODS if name != "none"]


def inputs(seed: int, batch: int, n: int = GRID[0] * GRID[1]) -> dict[str, Tensor]:
    """Everything that a downsampler may ask for, in float64, so that rounding decides nothing."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randn(batch, n, WIDTH, generator=generator, dtype=torch.float64),
        "scores": torch.rand(batch, n, generator=generator, dtype=torch.float64) + 0.01,
        "sizes": torch.randint(1, 5, (batch, n), generator=generator).double(),
        "keys": torch.randn(batch, n, 4, generator=generator, dtype=torch.float64),
        "class_attention": torch.rand(batch, n, generator=generator, dtype=torch.float64).softmax(dim=1),
    }


def apply(name: str, keep: int, given: dict[str, Tensor]) -> Downsampled:
    """The method with `keep` on the inputs; a convolution takes no `keep`."""
    method = METHODS[name]
    torch.manual_seed(0)
    arguments = {"keep": keep, "width": WIDTH, "grid": GRID}
    layer = (
        method(**{name: arguments[name] for name in signature(method).parameters if name in arguments}).double().eval()
    )
    hints = {hint: given[hint] for hint in ("sizes", "keys", "class_attention") if getattr(layer, f"uses_{hint}")}
    with torch.no_grad():
        return layer(given["tokens"], given["scores"] if layer.uses_scores else None, **hints)


ANY = settings(max_examples=15, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)
KEEPS = st.integers(1, GRID[0] * GRID[1] - 1)


@pytest.mark.parametrize("name", ALL)
@ANY
@given(seed=SEEDS, keep=KEEPS)
def test_each_output_token_is_made_of_the_tokens_assigned_to_it(name: str, seed: int, keep: int) -> None:
    given = inputs(seed, batch=3)
    found = apply(name, keep, given)
    batch, n, _ = given["tokens"].shape
    k = found.tokens.shape[1]
    assert k == keep or (k < n and not REGISTRY[name].has_schedule)
    assert found.tokens.shape == (batch, k, WIDTH) and found.tokens.dtype == torch.float64
    assert found.assignment.shape == (batch, n) and found.assignment.dtype == torch.int64
    assert found.assignment.min() >= (0 if METHODS[name].merges else -1) and found.assignment.max() < k
    for tokens, kept, assignment in zip(given["tokens"], *found, strict=True):
        members = [tokens[assignment == index] for index in range(k)]
        assert sum(map(len, members)) == (assignment >= 0).sum()  # the sizes that are carried on
        for one, token in zip(members, kept, strict=True) if name not in NOT_MEANS else ():
            # A mean lies between its members. A token without members stays where it was.
            within = one if len(one) else tokens
            assert (token >= within.amin(0) - 1e-6).all() and (token <= within.amax(0) + 1e-6).all()


@pytest.mark.parametrize("name", [name for name in ALL if REGISTRY[name].kind == "selection"])
@ANY
@given(seed=SEEDS, keep=KEEPS)
def test_a_selection_keeps_tokens_as_they_are_and_in_their_order(name: str, seed: int, keep: int) -> None:
    given = inputs(seed, batch=3)
    found = apply(name, keep, given)
    for tokens, kept, assignment in zip(given["tokens"], *found, strict=True):
        assert torch.equal(tokens[assignment >= 0], kept)
        assert assignment[assignment >= 0].tolist() == list(range(keep))


@pytest.mark.parametrize("name", ALL)
@ANY
@given(seed=SEEDS, keep=KEEPS)
def test_an_image_alone_gives_the_same_as_in_a_batch(name: str, seed: int, keep: int) -> None:
    given = inputs(seed, batch=4)
    together = apply(name, keep, given)
    for image in range(4):
        alone = apply(name, keep, {key: value[image : image + 1] for key, value in given.items()})
        assert torch.equal(alone.assignment, together.assignment[image : image + 1])
        torch.testing.assert_close(alone.tokens, together.tokens[image : image + 1])


@pytest.mark.parametrize("name", [name for name in downsampling.with_schedule() if name not in BY_POSITION])
@ANY
@given(seed=SEEDS, keep=KEEPS)
def test_permuted_tokens_give_the_same_groups(name: str, seed: int, keep: int) -> None:
    given = inputs(seed, batch=2)
    order = torch.randperm(given["tokens"].shape[1], generator=torch.Generator().manual_seed(seed))
    found, permuted = apply(name, keep, given), apply(name, keep, {key: each[:, order] for key, each in given.items()})
    assert torch.equal(same_group(found.assignment)[:, order][:, :, order], same_group(permuted.assignment))
    torch.testing.assert_close(tokenpool.unpool(*found)[:, order], tokenpool.unpool(*permuted))


def same_group(assignment: Tensor) -> Tensor:
    """Which tokens went to the same output token: (B, N, N), False for those that were dropped."""
    return (assignment[:, :, None] == assignment[:, None]) & (assignment >= 0)[:, None]


@pytest.mark.parametrize("name", downsampling.with_schedule())
def test_keeping_all_changes_nothing_and_keeping_none_drops_all(name: str) -> None:
    given = inputs(0, batch=2)
    n = given["tokens"].shape[1]
    for keep in (n, n + 3):
        found = apply(name, keep, given)
        assert torch.equal(found.tokens, given["tokens"])
        assert found.assignment.tolist() == [list(range(n))] * 2
    found = apply(name, 0, given)
    assert found.tokens.shape == (2, 0, WIDTH) and (found.assignment == -1).all()


# ToMe's matching against a loop over tokens, written from the paper's words (Bolya et al. 2023, section 3).


def matched_by_hand(tokens: Tensor, keys: Tensor, sizes: Tensor, keep: int) -> tuple[Tensor, list[int]]:
    """One image: tokens (N, D), keys (N, d), sizes (N,)."""
    groups = [[index] for index in range(len(tokens))]
    while len(groups) > keep:
        mean_of = [[float(sizes[i]) for i in group] for group in groups]
        key = torch.stack(
            [
                sum(w * keys[i] for w, i in zip(weights, group, strict=True)) / sum(weights)
                for weights, group in zip(mean_of, groups, strict=True)
            ]
        )
        edges = []
        for a in range(0, len(groups), 2):
            similarity = [F.cosine_similarity(key[a], key[b], dim=0).item() for b in range(1, len(groups), 2)]
            best = max(range(len(similarity)), key=similarity.__getitem__) if similarity else None
            if best is not None:
                edges.append((similarity[best], a, 2 * best + 1))
        edges.sort(reverse=True)
        merged = set()
        for _, a, b in edges[: min(len(groups) - keep, len(groups) // 2)]:
            groups[b] = groups[b] + groups[a]
            merged.add(a)
        groups = [group for index, group in enumerate(groups) if index not in merged]
    weights = [torch.tensor([float(sizes[i]) for i in group]) for group in groups]
    means = torch.stack(
        [(w[:, None] * tokens[group]).sum(0) / w.sum() for w, group in zip(weights, groups, strict=True)]
    )
    assignment = [next(k for k, group in enumerate(groups) if i in group) for i in range(len(tokens))]
    return means, assignment


@pytest.mark.parametrize("n, keep", [(12, 8), (13, 7), (12, 6), (20, 3), (9, 1), (5, 4)])
def test_the_matching_equals_a_loop(n: int, keep: int) -> None:
    generator = torch.Generator().manual_seed(n)
    tokens, keys = torch.randn(3, n, 5, generator=generator), torch.randn(3, n, 4, generator=generator)
    sizes = torch.randint(1, 6, (3, n), generator=generator).float()
    found = BipartiteMatching(keep)(tokens, None, sizes=sizes, keys=keys)
    for image in range(3):
        means, assignment = matched_by_hand(tokens[image], keys[image], sizes[image], keep)
        assert found.assignment[image].tolist() == assignment
        torch.testing.assert_close(found.tokens[image], means)


# The registry.


@pytest.fixture
def registry() -> Iterator[dict[str, Method]]:
    """The registry, which is put back after the test."""
    before = dict(REGISTRY)
    yield REGISTRY
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.fixture
def first(registry: dict[str, Method], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    """The method that docs/how-to/new-method.md shows, in a file of its own."""
    (code,) = re.findall(
        r"```python\n# my_method.py\n(.*?)```", (ROOT / "docs/how-to/new-method.md").read_text(), re.DOTALL
    )
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_method")
    yield registry["first"]
    del sys.modules["my_method"]


def test_a_registered_method_is_known_to_the_library(first: Method, small, photos, tmp_path: Path) -> None:
    plain, power_bert = flops.count(small).gmacs, tokenpool.patch(copy.deepcopy(small), "power_bert", [30, 17, 5, 2])
    tokenpool.patch(small, "first", [30, 17, 5, 2])
    assert [block.tokens for block in tokenpool.trace(small, photos).blocks] == [30, 17, 5, 2]
    assert flops.count(small).gmacs == flops.count(power_bert).gmacs < plain  # neither has a cost of its own
    tokenpool.patch(small, first.downsampler, gmacs=0.7 * plain)
    assert small.blocks.setting.downsampler == "first" and flops.count(small).gmacs <= 0.7 * plain
    tokenpool.save(small, tmp_path / "model.safetensors")
    assert torch.equal(tokenpool.load(tmp_path / "model.safetensors").eval()(photos), small(photos))
    assert tokenpool.METHODS["first"] is first.downsampler
    assert plotting.STYLES["first"] == {"label": "First tokens", "color": "#117733", "marker": "1"}


def test_tests_of_all_methods_run_a_registered_one(first: Method) -> None:
    assert "first" in downsampling.with_schedule()  # the list of the tests of budgets, families and models
    exported = runpy.run_path(str(ROOT / "tests" / "test_export.py"))["SETTINGS"]
    assert "first" in [setting["downsampler"] for setting in exported]


def test_help_describes_a_registered_method(first: Method, in_process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for verb in ("train", "evaluate", "explain"):
        shown = in_process(verb, "--help").stdout
        for method in REGISTRY.values():
            assert f"{method.name} - {method.description}" in shown
    assert "first - the first K tokens" in shown


@pytest.mark.slow
def test_a_registered_method_is_in_the_study(first: Method, tmp_path: Path) -> None:
    """Runs, figures and tables of its kind, drawn from results that are made from the shipped ones of PoWER-BERT."""
    study = Study(presets.get("digits"), tmp_path)
    tuned = {run.name for run in study.finetunes(["first"], study.seeds)}
    for runs in (protocol_runs(study), artifacts.everything(study), *needed(study, "table 3", "figure 5a")):
        assert tuned <= {run.name for run in runs}
    for runs in needed(study, "figure 3a", "figure 9", "figure reconstruction"):
        assert any(run.downsampler == "first" for run in runs)
    for runs in needed(study, "figure 5b", "figure 1b", "table 2"):
        assert not any(run.downsampler == "first" for run in runs)
    with_results_of_power_bert(study, ROOT / "results" / "digits")
    for name in ("5a", "9", "reconstruction"):
        assert "First tokens" in legend(artifacts.draw(study, name)), name
    shown = artifacts.sections([study], "3")[-1].shown
    assert (shown["method"] == "first").sum() == len(study.levels) == (shown["method"] == "power_bert").sum()
    found = study.points(protocol_runs(study))
    ax = plotting.cost_accuracy(tables.cost_accuracy(found[found["stage"] == "finetune"]))
    assert "First tokens" in ax.get_legend_handles_labels()[1]
    assert "first" in tables.differences_markdown(tables.differences(found))


@pytest.mark.parametrize("kind", ["clustering", "matching"])
def test_a_registered_method_that_merges_is_beside_the_clusterings(first: Method, registry: dict, kind: str) -> None:
    registry["first"] = dataclasses.replace(first, kind=kind)
    study = Study(presets.get("digits"), Path("nowhere"))
    (clusterings, selections, untuned) = needed(study, "figure 5b", "figure 5a", "figure 9")
    assert any(run.downsampler == "first" for run in clusterings)
    assert not any(run.downsampler == "first" for run in selections)
    assert {run.carry for run in untuned if run.downsampler == "first"} == {False, True}


def needed(study: Study, *names: str) -> list[list[Run]]:
    return [artifacts.needs(study, name) for name in names]


def legend(figure: object) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def with_results_of_power_bert(study: Study, shipped: Path) -> None:
    """Fill the study's folder with shipped results, and with PoWER-BERT's once more as those of "first"."""
    for path in shipped.glob("*.json"):
        (study.folder / path.name).write_text(path.read_text())
        if "-power_bert-" in path.name:
            outcome = json.loads(path.read_text())
            outcome["setting"] |= {"downsampler": "first"}
            outcome["setting"] |= {"label": outcome["setting"]["label"].replace("power_bert", "first")}
            (study.folder / path.name.replace("power_bert", "first")).write_text(json.dumps(outcome))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({}, ValueError, "method 'first' is registered already; choose another name"),
        ({"name": "a-b"}, ValueError, "method name 'a-b' must consist of letters, digits and _"),
        ({"name": "b", "kind": "pooling"}, ValueError, "kind = 'pooling' must be one of plain, convolution, selection"),
        (
            {"name": "b", "kind": "convolution"},
            ValueError,
            "method 'b' cannot be studied: .* convolution have no sched",
        ),
        ({"name": "b", "downsampler": torch.nn.Linear}, TypeError, "Linear.* must be a subclass of tokenpool.Downsamp"),
        ({"name": "b", "downsampler": None}, TypeError, "None must be a subclass of tokenpool.Downsampler"),
    ],
    ids=str,
)
def test_an_unusable_entry_is_refused(first: Method, changes: dict, kind: type[Exception], message: str) -> None:
    before = dict(REGISTRY)
    with pytest.raises(kind, match=message):
        downsampling.register(dataclasses.replace(first, **changes))
    assert before == REGISTRY


def test_the_paper_s_rule_of_idle_clustering_leaves_other_methods_alone(registry: dict, small) -> None:
    """`idle_clustering` counts K-Medoids of the paper also where it does not run, but no other method."""
    downsampling.register(
        Method("mine", type("Mine", (METHODS["kmedoids"],), {}), kind="clustering", label="", description="")
    )

    def counted(name: str) -> list[float]:
        tokenpool.patch(small, name, [36, 36, 9, 9])
        return [flops.count(small, idle_clustering=idle).gmacs for idle in (False, True)]

    honest, idle = counted("mine")
    assert honest == idle
    honest, idle = counted("kmedoids")
    assert honest < idle


@pytest.mark.parametrize(
    "found, message",
    [
        (
            lambda tokens: tokens[:, :3],
            r"Own.reduce must return tokenpool.Downsampled\(tokens, assignment\), not Tensor",
        ),
        (lambda tokens: tokenpool.Downsampled(tokens[:, :3, :2], torch.zeros(2, 8)), r"tokens \(B, K, 4\) with K <= 8"),
        (lambda tokens: tokenpool.Downsampled(tokens[:, :3], torch.zeros(2, 3)), r"not \(2, 3, 4\) and \(2, 3\)"),
    ],
)
def test_a_wrong_result_of_a_class_of_ones_own_is_refused(found: Callable, message: str) -> None:
    class Own(tokenpool.Downsampler):
        def reduce(self, tokens: Tensor, scores: Tensor) -> tokenpool.Downsampled:
            return found(tokens)

    with pytest.raises((TypeError, ValueError), match=message):
        Own(3)(torch.randn(2, 8, 4), torch.rand(2, 8))
