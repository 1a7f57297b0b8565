"""`evaluate --calibrate`: which images it takes, and that it goes on where it was interrupted."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import tokenpool
from tokenpool import flops
from tokenpool.analysis import results
from tokenpool.runs import execute
from tokenpool.runs.calibrating import CalibrationImages
from tokenpool.runs.run import Run

SMALL = {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 2}
MODEL = "deit_tiny_patch16_224"


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL, **SMALL).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten grey images in val, of the values 0, 10, 20, ..., and one image in train."""
    for part, values in (("val", range(0, 100, 10)), ("train", (200,))):
        for index, value in enumerate(values):
            path = tmp_path / part / "ab"[index >= 5] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64, 3), value, dtype=np.uint8)).save(path)
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "train" / "a" / "0.png").rename(tmp_path / "train" / "b" / "0.png")
    Image.fromarray(np.full((64, 64, 3), 210, dtype=np.uint8)).save(tmp_path / "train" / "a" / "1.png")
    safetensors.torch.save_file(model().state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


def run_of(folder: Path, **changes: object) -> Run:
    return Run("evaluate", "x", str(folder), MODEL, downsampler="tome", model_options=SMALL, **changes)


def greys(images: torch.Tensor) -> list[int]:
    """The grey value of each image, before normalisation."""
    return (255 * (images[:, 0, 0, 0] * 0.229 + 0.485)).round().int().tolist()


@pytest.mark.parametrize(
    "part, count, expected",
    [("1/2", 99, [0, 20, 40, 60, 80]), ("2/2", 3, [10, 50, 90]), ("", 9, [210, 200]), ("", 1, [210])],
)
def test_the_images_are_those_of_train_or_of_a_part_of_val(
    part: str, count: int, expected: list[int], folder: Path
) -> None:
    tested = {"1/2": "2/2", "2/2": "1/2", "": ""}[part]
    assert greys(CalibrationImages(str(folder), part, count).load(run_of(folder, part=tested))) == expected


def test_images_of_the_test_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--calibrate-part 1/2 has images of the test: .*--part 2/2"):
        CalibrationImages(str(folder), "1/2", 9).load(run_of(folder))
    other_name = folder.parent / "other-name"
    other_name.symlink_to(folder)
    with pytest.raises(ValueError, match="--calibrate-part 1/2 has images of the test"):
        CalibrationImages(str(other_name), "1/2", 9).load(run_of(folder))
    assert len(CalibrationImages(str(other_name), "1/2", 9).load(run_of(folder, part="2/2"))) == 5


def test_of_digits_the_training_images_are_taken() -> None:
    run = Run("evaluate", "x", "digits", "deit_digits_patch2_16", split=1)
    data = execute.data_module(run)
    data.setup("test")
    assert torch.equal(
        CalibrationImages("digits", "", 2).load(run), torch.stack([data.train_set[i][0] for i in (0, 1346)])
    )


def test_a_calibrated_schedule_is_evaluated(folder: Path, in_process) -> None:
    gmacs = 0.7 * flops.count(model()).gmacs
    options = [f"--model-option={key}={value}" for key, value in SMALL.items()]
    command = ["evaluate", f"--model={MODEL}", f"--data={folder}", f"--weights={folder}/weights.safetensors", *options]
    command += ["--downsampler=tome", f"--gmacs={gmacs}", "--carry", "--part=2/2", f"--output={folder}/out", "--name=c"]
    command += [f"--calibrate={folder}", "--calibrate-part=1/2", "--calibrate-images=4"]
    first = in_process(*command, "--agreement")
    assert first.returncode == 0, first.stderr
    assert "calibrating on 4 images" in first.stdout and "measurement 1: the start, divergence" in first.stdout
    outcome = results.read(folder / "out" / "agreement-c-seed0.json")
    images = CalibrationImages(str(folder), "1/2", 4).load(run_of(folder, part="2/2"))
    expected = tokenpool.calibrate(model(), images, "tome", gmacs, report=None)
    assert outcome["setting"]["keep"] == expected and outcome["metrics"]["images"] == 5
    assert f"--keep {','.join(map(str, expected))}" in first.stdout
    assert f"divergence {outcome['metrics']['divergence']:.4f} of 5 images" in first.stdout
    again = in_process(*command)  # another stage, the same calibration
    assert again.returncode == 0 and "measurement 1" not in again.stdout and "top-5" in again.stdout


def test_a_calibration_needs_a_budget(folder: Path, in_process) -> None:
    refused = in_process("evaluate", f"--model={MODEL}", f"--data={folder}", "--pretrained", f"--calibrate={folder}")
    assert refused.returncode and "--calibrate needs the budget --gmacs" in refused.stderr
