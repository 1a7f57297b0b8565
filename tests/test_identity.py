"""A result is never shown for other images, other weights or another schedule than those that it was made from."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from experiments import presets
from experiments.artifacts import needs
from tokenpool import files
from tokenpool.analysis import results
from tokenpool.runs import execute
from tokenpool.runs.data_sets import DATA
from tokenpool.runs.run import WEIGHTS, Run, is_finished, result_path, weights_path
from tokenpool.runs.study import Study
from tokenpool.training import fingerprint
from tokenpool.training.images import open_images
from tokenpool.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
SMALL = {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv(files.CACHE, str(folder))
    for variable in (DATA, WEIGHTS):
        monkeypatch.delenv(variable, raising=False)
    return folder


def make_images(root: Path, seed: int = 0, classes: str = "ab", count: int = 3) -> Path:
    values = np.random.default_rng(seed)
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                image = Image.fromarray(values.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(root / part / name / f"{index}.bmp")  # not compressed: always of the same size
    return root


def make_weights(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = timm.create_model("deit_tiny_patch16_224", **SMALL)
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def evaluate(in_process, output: Path, data: Path, weights: Path, *more: str):
    options = [f"--model-option={key}={value}" for key, value in SMALL.items() if key != "num_classes"]
    return in_process(
        *("evaluate", "--model", "deit_tiny_patch16_224", "--data", str(data), "--weights", str(weights)),
        *("--output", str(output), "--model-option=num_classes=2", *options, *more),
    )


def change_pixels(root: Path) -> None:
    """Another image of the same name and size, and with the times of the old one."""
    path = root / "val" / "a" / "0.bmp"
    before = path.stat()
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_classes(root: Path) -> None:
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (root / "val" / old).rename(root / "val" / new)


@pytest.mark.parametrize(
    "change",
    [
        change_pixels,
        swap_classes,
        lambda root: (root / "val" / "a" / "2.bmp").unlink(),
        lambda root: shutil.copy(root / "val" / "a" / "0.bmp", root / "val" / "b" / "9.bmp"),
        lambda root: (root / "val" / "b" / "1.bmp").rename(root / "val" / "a" / "9.bmp"),
    ],
    ids=["pixels", "classes", "removed", "added", "moved"],
)
def test_changed_images_are_told_apart(change, tmp_path: Path) -> None:
    make_images(tmp_path)
    before = fingerprint.of_images(open_images(tmp_path, "val"))
    assert fingerprint.of_images(open_images(tmp_path, "val")) == before
    change(tmp_path)
    assert fingerprint.of_images(open_images(tmp_path, "val")) != before


def test_a_copy_elsewhere_is_the_same_and_nothing_is_read_twice(tmp_path: Path, cache: Path, monkeypatch) -> None:
    make_images(tmp_path / "one")
    images = open_images(tmp_path / "one", "val")
    before = fingerprint.of_images(images)
    assert before.startswith("6 images of 2 classes, ")
    copied = open_images(shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile), "val")
    assert fingerprint.of_images(copied) == before
    monkeypatch.setattr(type(images), "content", None)
    assert fingerprint.of_images(images) == before
    shutil.rmtree(cache)
    with pytest.raises(TypeError):
        fingerprint.of_images(images)


def test_of_large_data_some_content_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(make_images(tmp_path, count=10), "val")
    monkeypatch.setattr(fingerprint, "READ_BYTES", images.size(0) * 5)
    read: list[int] = []
    content = type(images).content
    monkeypatch.setattr(type(images), "content", lambda self, index: read.append(index) or content(self, index))
    before = fingerprint.of_images(images)
    assert read == [0, 4, 8, 12, 16]
    path, _ = images.source(1)  # not read, but of another size
    path.write_bytes(path.read_bytes() + b"\0")
    assert fingerprint.of_images(open_images(tmp_path, "val")) != before


def test_evaluate_never_shows_the_number_of_other_weights_or_images(tmp_path: Path, in_process) -> None:
    data, weights = make_images(tmp_path / "images"), make_weights(tmp_path / "weights.safetensors")
    first = evaluate(in_process, tmp_path / "out", data, weights)
    assert first.returncode == 0, first.stderr
    again = evaluate(in_process, tmp_path / "out", data, weights)
    assert "finished already" in again.stdout
    (result,) = (tmp_path / "out").glob("*.json")
    stored = result.read_text()

    make_weights(weights, seed=1)  # the same file, overwritten
    other = evaluate(in_process, tmp_path / "out", data, weights)
    assert other.returncode == 1 and "made with other weights to start from" in other.stderr
    assert fingerprint.of_weights(weights) in other.stderr and "--output" in other.stderr
    assert evaluate(in_process, tmp_path / "other", data, weights).returncode == 0
    make_weights(weights)
    change_pixels(data)
    other = evaluate(in_process, tmp_path / "out", data, weights)
    assert other.returncode == 1 and "made with other test images (6 images of 2 classes" in other.stderr
    assert result.read_text() == stored  # nothing finished is lost

    older = json.loads(stored)
    del older["identity"]
    results.save(older, result)
    untold = evaluate(in_process, tmp_path / "out", data, weights)
    assert untold.returncode == 1 and "does not tell its test images" in untold.stderr


def test_weights_by_the_variable_are_told_apart(tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_images(tmp_path / "images")
    for seed, expected in ((0, 0), (1, 1)):
        monkeypatch.setenv(WEIGHTS, str(make_weights(tmp_path / f"{seed}.safetensors", seed)))
        said = in_process(
            *("evaluate", "--model", "deit_tiny_patch16_224", "--data", str(data), "--pretrained"),
            *("--output", str(tmp_path / "out"), *(f"--model-option={key}={value}" for key, value in SMALL.items())),
        )
        assert said.returncode == expected, said.stderr
    assert "made with other pretrained weights" in said.stderr


def test_shipped_results_are_not_shown_for_named_images(tmp_path: Path, in_process, monkeypatch) -> None:
    data, weights = make_images(tmp_path / "images"), make_weights(tmp_path / "weights.safetensors")
    place = ["--output", str(tmp_path / "pictures")]
    shown = in_process("table", "off_the_shelf", "--preset", "pretrained", *place)
    assert shown.returncode == 0 and "from results/pretrained: " in shown.stdout
    assert "runs are older than fingerprints and do not tell (ImageNet photographs, DeiT-Ti" in shown.stdout
    named = ["--data", str(data), "--weights", str(weights)]
    for verb in (["figure", "9"], ["table", "off_the_shelf"], ["figure", "redundancy"]):
        own = in_process(*verb, "--preset", "pretrained", *named, *place)
        assert own.returncode == 1 and f"in {Path('runs') / 'pretrained-full'}" in own.stderr.replace("\n", " ")
        forced = in_process(*verb, "--preset", "pretrained", *named, *place, "--results", "results/pretrained")
        assert forced.returncode == 1 and "does not tell its" in forced.stderr and "--results" in forced.stderr
    monkeypatch.setenv(DATA, str(data))
    assert in_process("figure", "9", "--preset", "pretrained", *place).returncode == 1


def test_runs_of_different_images_are_not_mixed(small: object, tmp_path: Path) -> None:
    study = Study(presets.get("digits"), tmp_path)
    runs = needs(study, "figure 7")[:2]
    for run, told in zip(runs, ("1 image, a", "1 image, b"), strict=True):
        found = results.read(ROOT / "results" / "digits" / f"{run.name}.json")
        results.save(found | {"identity": {"test_images": told}}, tmp_path / f"{run.name}.json")
    with pytest.raises(ValueError, match=r"made with other test images \(1 image, a, now 1797 handwritten digits"):
        study.points(runs)
    os.environ.pop(DATA, None)
    named = dataclasses.replace(presets.get("digits"), data="cifar10")
    mixed = Study(named, tmp_path)
    for run in needs(mixed, "figure 7")[:2]:
        path = result_path(run, tmp_path)
        found = results.read(path)
        found["setting"]["data"] = "cifar10"
        results.save(found, path)
    with pytest.raises(ValueError, match=r"mixes runs of different test images: .* 1 image, a; .* 1 image, b"):
        mixed.points(needs(mixed, "figure 7")[:2])


def test_the_penalty_names_a_schedule_not_the_level(tmp_path: Path) -> None:
    """A quick study's level 1 is another schedule than the full one's: their runs have the same names."""
    digits = presets.get("digits")
    quick, full = Study(digits, tmp_path, full=False), Study(digits, tmp_path)
    run = quick.finetunes(["power_bert"], [0])[1]
    assert run.name == full.finetunes(["power_bert"], [0])[1].name and run.schedule == "lambda0.001"
    found = results.read(ROOT / "results" / "digits" / f"{run.name}.json")
    found["setting"] |= {"schedule": run.schedule}
    results.save(found, result_path(run, tmp_path))
    assert len(Study(digits, tmp_path, full=False).points([run])) == 1
    other = Study(digits, tmp_path).finetunes(["power_bert"], [0])[1]
    assert other.keep is None  # it teaches the full study nothing
    with pytest.raises(ValueError, match="schedule was 'lambda0.001', now 'lambda0.0003'"):
        Study(digits, tmp_path).check_finished(other)


TINY = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4}


def digits_run(stage: str, **changes) -> Run:
    common = {"data": "digits", "model": "deit_digits_patch2_16", "batch_size": 512, "model_options": TINY}
    return Run.from_setting({"stage": stage, "label": ""} | common | changes)


def test_a_run_knows_the_weights_that_it_started_from(tmp_path: Path) -> None:
    base = digits_run("base", epochs=1, warmup_epochs=0)
    tuned = digits_run("finetune", epochs=1, warmup_epochs=0, start=base.name)
    ended = execute.execute(base, tmp_path)["trained_weights"]
    assert execute.execute(tuned, tmp_path)["identity"]["start_weights"] == ended
    assert is_finished(tuned, tmp_path)

    path = weights_path(base.name, tmp_path)
    whole = path.read_bytes()
    shutil.copy(weights_path(tuned.name, tmp_path), path)
    with pytest.raises(ValueError, match=r"base-seed0\.safetensors holds other weights"):
        is_finished(tuned, tmp_path)
    path.write_bytes(whole)

    # The base model is trained anew by another recipe: what was tuned from the old one is not its.
    result_path(base, tmp_path).unlink()
    execute.execute(digits_run("base", epochs=1, warmup_epochs=0, learning_rate=1e-2), tmp_path)
    with pytest.raises(ValueError, match="made with other weights to start from"):
        is_finished(tuned, tmp_path)


def test_a_base_model_made_again_must_end_the_same(tmp_path: Path) -> None:
    base = digits_run("base", epochs=1, warmup_epochs=0)
    execute.execute(base, tmp_path)
    result, weights = result_path(base, tmp_path), weights_path(base.name, tmp_path)
    weights.unlink()
    execute.execute(base, tmp_path)  # lost, and made again
    assert weights.exists()
    weights.unlink()
    found = results.read(result) | {"trained_weights": "0123456789abcdef"}  # as another machine may have it
    results.save(found, result)
    with pytest.raises(ValueError, match="trained again, base-seed0 ends with other weights"):
        execute.execute(base, tmp_path)
    assert results.read(result) == found and not weights.exists()


def test_a_checkpoint_does_not_go_on_with_other_images(tmp_path: Path) -> None:
    data = make_images(tmp_path / "images")
    run = Run(
        "train", "x", str(data), "deit_tiny_patch16_224", recipe=Recipe(epochs=2, batch_size=6), model_options=SMALL
    )

    def stop() -> None:
        raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        execute.execute(run, tmp_path, on_epoch=lambda calls=[]: calls.append(1) or (len(calls) == 2 and stop()))
    make_images(data, seed=1)
    with pytest.raises(ValueError, match=r"train-x-seed0\.ckpt was made with other test images"):
        execute.execute(run, tmp_path)


def test_a_notebook_shows_shipped_results_whatever_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(WEIGHTS, str(make_weights(tmp_path / "weights.safetensors")))
    folder, preset = ROOT / "results" / "pretrained", presets.get("pretrained")
    study = Study(preset, folder, named=False)
    assert len(study.points(study.redundancies())) == 1
    with pytest.raises(ValueError, match="does not tell its pretrained weights"):
        Study(preset, folder).points(study.redundancies())


def test_old_results_are_read_and_said_to_be_old() -> None:
    study = Study(presets.get("digits"), ROOT / "results" / "digits")
    runs = needs(study, "figure 5a")
    assert len(study.points(runs)) == len(runs)
    assert f"{len(runs)} of {len(runs)} runs are older than fingerprints" in study.made_from(runs)
