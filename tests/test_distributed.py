"""Training in several processes, as `--trainer devices=2` starts them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tokenpool.analysis import bits, results

ROOT = Path(__file__).parents[1]
SMALL = ["embed_dim=16", "depth=3", "num_heads=2", "patch_size=4", "weight_init=jax", "drop_path_rate=0.3"]


def train(folder: Path, processes: int) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "experiments", "train", "--output", str(folder), "--name", "run"]
    command += [f"--model-option={option}" for option in SMALL]
    command += ["--epochs=2", "--batch-size=64", "--mixup=0.8", "--cutmix=1", "--repeats=3", "--ema-decay=0.9"]
    command += ["--trainer=accelerator=cpu", f"--trainer=devices={processes}", "--trainer=enable_progress_bar=False"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return results.read(folder / "train-run-seed0.json")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder, 1)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.slow
def test_the_number_of_processes_changes_nothing_but_rounding(alone, processes: int, tmp_path: Path) -> None:
    folder, one = alone
    many = train(tmp_path, processes)
    assert many["processes"] == processes and one["processes"] == 1
    for first, second in zip(one["epochs"], many["epochs"], strict=True):
        assert first.keys() == second.keys()
        for name in first:
            # Top-1 of an image may turn where two classes are as likely; the others differ by rounding.
            assert second[name] == pytest.approx(first[name], abs=3 / 450 if "top" in name else 1e-5), name
    assert many["metrics"]["images"] == one["metrics"]["images"] == 450
    for name in ("", "ema_"):
        differing = bits.decode(many["metrics"][f"{name}correct"], 450) ^ bits.decode(
            one["metrics"][f"{name}correct"], 450
        )
        assert differing.sum() <= 3
    assert many["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], abs=1e-5)
    for name in ("train-run-seed0", "train-run-seed0.ema"):
        first, second = (load_file(place / "weights" / f"{name}.safetensors") for place in (folder, tmp_path))
        assert all(np.allclose(first[key], second[key], atol=2e-4) for key in first)


@pytest.mark.slow
def test_an_evaluation_shared_out_unevenly_counts_each_image_once(alone, tmp_path: Path) -> None:
    """450 images on four processes, of which two have a batch more than the others."""
    folder, _ = alone
    found = []
    for processes in (1, 4):
        command = [sys.executable, "-W", "ignore", "-m", "experiments", "evaluate", "--data=digits", "--batch-size=64"]
        command += ["--model=deit_digits_patch2_16", *(f"--model-option={option}" for option in SMALL)]
        command += [f"--weights={folder}/weights/train-run-seed0.safetensors", "--downsampler=wkmedoids"]
        command += ["--keep=9,4,1", "--name=run", f"--output={tmp_path}/{processes}"]
        command += ["--trainer=accelerator=cpu", f"--trainer=devices={processes}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(results.read(tmp_path / str(processes) / "evaluate-run-seed0.json")["metrics"])
    one, four = found
    assert one["images"] == four["images"] == 450
    assert four["correct"] == one["correct"]  # in the order of the images, whoever has evaluated them
    right = bits.decode(one["correct"], 450).sum()
    assert 20 < right < 430 and one["top1"] == four["top1"] == 100 * (right / 450)
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["relative_error"] == pytest.approx(one["relative_error"], rel=1e-4)
