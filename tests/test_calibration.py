"""Calibrated schedules: they meet the budget, are never worse than the start, and do not depend on interruptions."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from scipy.spatial.distance import cosine
from scipy.special import rel_entr, softmax
from timm.models.vision_transformer import VisionTransformer

import tokenpool
from tokenpool import budget, calibration, flops

SHARE = 0.6  # of the plain model's cost


def gmacs(model: VisionTransformer) -> float:
    return SHARE * flops.count(model).gmacs


def mean_divergence(model: VisionTransformer, images: torch.Tensor, keep: list[int], method: str) -> float:
    """Kullback-Leibler divergence by SciPy, image by image."""
    with torch.inference_mode():
        expected = [softmax(model(image[None])[0].double().numpy()) for image in images]
        tokenpool.patch(model, method, keep)
        found = [softmax(model(image[None])[0].double().numpy()) for image in images]
    tokenpool.unpatch(model)
    return float(np.mean([rel_entr(p, q).sum() for p, q in zip(expected, found, strict=True)]))


def told(lines: list[str]) -> tuple[float, float]:
    """The last divergence that progress tells of, and the divergence at the start."""
    start, best = re.findall(r"^divergence ([\d.]+) at the start, now ([\d.]+)$", "\n".join(lines), re.MULTILINE)[-1]
    return float(best), float(start)


def measurements(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("measurement")]


@pytest.mark.parametrize("method", ["key_medoids", "tome", "power_bert"])
def test_the_budget_is_met_and_the_start_is_not_better(
    method: str, small: VisionTransformer, photos: torch.Tensor
) -> None:
    lines: list[str] = []
    state = torch.get_rng_state()
    keep = tokenpool.calibrate(small, photos, method, gmacs(small), report=lines.append)
    assert torch.equal(torch.get_rng_state(), state) and not tokenpool.is_patched(small)
    start = tokenpool.schedule_for(gmacs(small), small, method)
    cost = budget.ScheduleCost(small, tokenpool.METHODS[method])
    assert 0.98 * gmacs(small) <= cost(keep) / 1e9 <= gmacs(small)
    ours, before = (mean_divergence(small, photos, each, method) for each in (keep, start))
    assert keep != start and ours < before
    assert told(lines) == pytest.approx((ours, before), abs=2e-5)
    assert tokenpool.schedules.calibrate(small, photos, method, gmacs(small), report=None) == keep


def test_no_schedule_is_measured_twice_and_poor_ones_not_on_all_images(
    small: VisionTransformer, photos: torch.Tensor, tmp_path: Path
) -> None:
    path, lines = tmp_path / "state.json", []
    keep = tokenpool.calibrate(small, photos, "key_medoids", gmacs(small), state=path, report=lines.append)
    measured = json.loads(path.read_text())["divergences"]
    assert len(measured) == len(measurements(lines))
    images: dict[str, list[float]] = {}
    for name, found in measured.items():
        images.setdefault(name.split()[0], []).extend(found)
    names = [",".join(map(str, each)) for each in (keep, tokenpool.schedule_for(gmacs(small), small))]
    ours, start = (np.array(images[name]) for name in names)
    assert ours.mean() < start.mean() and np.sqrt(ours).mean() < np.sqrt(start).mean()
    complete = [name for name, found in images.items() if len(found) == len(photos)]
    assert set(names) <= set(complete) and len(complete) < len(images) / 2


class Interruption(Exception):
    pass


def interrupted_after(lines: int) -> Callable[[str], None]:
    said = []

    def report(line: str) -> None:
        said.append(line)
        if len(said) == lines:
            raise Interruption

    return report


def test_an_interrupted_search_goes_on_where_it_stopped(
    small: VisionTransformer, photos: torch.Tensor, tmp_path: Path
) -> None:
    arguments = {"model": small, "images": photos, "downsampler": "tome", "gmacs": gmacs(small)}
    every: list[str] = []
    expected = tokenpool.calibrate(**arguments, report=every.append)
    path, before = tmp_path / "deep" / "state.json", 0
    for stop in (1, 2, 19):
        with pytest.raises(Interruption):
            tokenpool.calibrate(**arguments, state=path, report=interrupted_after(stop))
        before += stop
    rest: list[str] = []
    assert tokenpool.calibrate(**arguments, state=path, report=rest.append) == expected
    assert 0 < before < len(measurements(every)) and measurements(rest) == measurements(every)[before:]
    rest.clear()
    assert tokenpool.calibrate(**arguments, state=path, report=rest.append) == expected and not measurements(rest)


def test_a_state_serves_one_search_only(small: VisionTransformer, photos: torch.Tensor, tmp_path: Path) -> None:
    path, budget_ = tmp_path / "state.json", gmacs(small)
    arguments = {"images": photos, "downsampler": "kmedoids", "gmacs": budget_, "state": path}
    with pytest.raises(Interruption):
        tokenpool.calibrate(small, **arguments, report=interrupted_after(1))
    before = path.read_bytes()
    for key, changes in {
        "images": {"images": photos + 1e-3},
        "downsampler": {"downsampler": "wkmedoids"},
        "setting": {"iterations": 2},
        "gmacs": {"gmacs": 0.9 * budget_},
    }.items():
        with pytest.raises(ValueError, match=rf"state.json is the state of another calibration \({key} was"):
            tokenpool.calibrate(small, **arguments | changes, report=interrupted_after(1))
    with torch.no_grad():
        small.head.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r"another calibration \(model was"):
        tokenpool.calibrate(small, **arguments, report=None)
    assert path.read_bytes() == before
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"state.json is not the state of a calibration: delete it"):
        tokenpool.calibrate(small, **arguments, report=None)


def test_a_patched_model_stays_as_it_is(small: VisionTransformer, photos: torch.Tensor) -> None:
    arguments = {"images": photos[:2], "downsampler": "tome", "gmacs": gmacs(small), "report": None}
    expected = tokenpool.calibrate(small, **arguments)
    tokenpool.patch(small, "kmeans", [20, 10, 5, 2]).train()
    setting = small.blocks.setting
    assert tokenpool.calibrate(small, **arguments) == expected
    assert small.training and small.blocks.setting == setting


def test_features_are_compared_by_angle(photos: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, embed_dim=48, depth=4, num_heads=3, num_classes=0)
    lines: list[str] = []
    tokenpool.calibrate(model, photos, "tome", gmacs(model), report=lines.append)
    keep = tokenpool.schedule_for(gmacs(model), model, "tome")
    with torch.inference_mode():
        expected = model.eval()(photos)
        found = tokenpool.patch(model, "tome", keep)(photos)
    mean = np.mean([cosine(a, b) for a, b in zip(expected.double().numpy(), found.double().numpy(), strict=True)])
    assert told(lines)[1] == pytest.approx(mean, abs=2e-5) and mean > 1e-4


class Output(NamedTuple):
    """The kind of output that models of other libraries have."""

    logits: torch.Tensor


def test_the_logits_of_a_named_output_are_compared(small: VisionTransformer, photos: torch.Tensor) -> None:
    arguments = {"images": photos[:2], "downsampler": "tome", "gmacs": gmacs(small), "report": None}
    expected = tokenpool.calibrate(small, **arguments)
    small.register_forward_hook(lambda module, inputs, output: Output(output))
    assert tokenpool.calibrate(small, **arguments) == expected
    small.register_forward_hook(lambda module, inputs, output: (output.logits,))
    with pytest.raises(TypeError, match="the model returns a tuple, expected a tensor of logits or features"):
        tokenpool.calibrate(small, **arguments)


def test_divergences_of_dense_outputs_are_means() -> None:
    outputs, expected = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    each = [
        [rel_entr(softmax(q), softmax(p)).sum() for p, q in zip(*pair, strict=True)]
        for pair in zip(outputs.double().numpy(), expected.double().numpy(), strict=True)
    ]
    found = calibration.divergence(outputs, expected)
    np.testing.assert_allclose(found, np.mean(each, axis=1), rtol=1e-4)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[int]], list[float]]], None]:
    """Replaces the divergences of the model by a function of the schedule."""

    def plant(function: Callable[[list[int]], list[float]]) -> None:
        last: list[list[int]] = []

        def patch(model: VisionTransformer, downsampler: str, keep: list[int], **setting: object) -> VisionTransformer:
            last[:] = [keep]
            return tokenpool.patch(model, downsampler, keep, **setting)

        def divergence(outputs: torch.Tensor, expected: torch.Tensor, classifies: bool) -> torch.Tensor:
            return torch.tensor(function(last[0]), dtype=torch.float64)[: len(outputs)]

        monkeypatch.setattr(calibration, "patch", patch)
        monkeypatch.setattr(calibration, "divergence", divergence)

    return plant


def test_the_search_comes_near_to_a_planted_schedule(planted, small: VisionTransformer, photos: torch.Tensor) -> None:
    """The planted schedule costs the same and removes most tokens in the first block, contrary to the start."""
    cost = budget.ScheduleCost(small, tokenpool.METHODS["tome"])
    target = budget.meet(
        int(1e9 * gmacs(small)), cost, cost.backbone, lambda steepness: [max(round(36 - 35 * steepness), 1)] * 4
    )
    assert len(set(target)) == 1

    def distance(keep: list[int]) -> float:
        return sum((limit - aim) ** 2 for limit, aim in zip(keep, target, strict=True))

    planted(lambda keep: [distance(keep)])
    keep = tokenpool.calibrate(small, photos[:1], "tome", gmacs(small), report=None)
    start = tokenpool.schedule_for(gmacs(small), small, "tome")
    assert distance(keep) < 0.5 * distance(start), (start, keep, target)


def test_a_larger_mean_divergence_is_refused(planted, small: VisionTransformer, photos: torch.Tensor) -> None:
    """One image of five has almost all of the divergence; the mean square root falls where its divergence rises."""
    start = tokenpool.schedule_for(gmacs(small), small, "tome")

    def heavy(keep: list[int]) -> list[float]:
        return [0.0 if keep[0] > start[0] else 1.0] * 4 + [100.0 if keep == start else 110.0]

    planted(heavy)
    images = photos[:1].expand(25, -1, -1, -1)  # five images in each part
    assert tokenpool.calibrate(small, images, "tome", gmacs(small), report=None) == start


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"images": torch.zeros(0, 3, 96, 96)},
            r"images must be a tensor \(B, C, H, W\) of one image or more, got \(0",
        ),
        ({"images": torch.zeros(3, 96, 96)}, r"images must be .*, got \(3, 96, 96\)"),
        ({"images": [1]}, r"images must be .*, got list"),
        (
            {"images": torch.full((1, 3, 96, 96), torch.nan), "downsampler": "tome"},
            "outputs are not finite with keep = ",
        ),
        ({"gmacs": None}, "gmacs = None must be a positive number"),
        ({"gmacs": 9.0}, "gmacs = 9 is more than the plain model costs"),
        ({"gmacs": 1e-4}, "GMACs are too few"),
        ({"downsampler": "none"}, "'none' has no schedule"),
        ({"downsampler": "convolution"}, "'convolution' has no schedule"),
        ({"downsampler": "random", "generator": torch.Generator()}, "needs options that are JSON values: .*Generator"),
        ({"iteration": 3}, "'kmedoids': .*unexpected keyword"),
        ({"state": "https://host/state.json"}, "https://host/state.json is a URL, expected a path"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str, small: VisionTransformer, photos: torch.Tensor) -> None:
    arguments = {"images": photos, "downsampler": "kmedoids", "gmacs": gmacs(small), "report": None}
    with pytest.raises(ValueError, match=message):
        tokenpool.calibrate(small, **arguments | changes)


def test_the_whole_budget_keeps_all_tokens(small: VisionTransformer, photos: torch.Tensor) -> None:
    assert tokenpool.calibrate(small, photos, "tome", flops.count(small).gmacs, report=None) == [36] * 4
