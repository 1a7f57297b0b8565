"""Training in several processes, as `--trainer devices=2` starts them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.commands import COMMANDS
from tokenpool.analysis import bits, results
from tokenpool.commands.shell import application

app = application(COMMANDS, "")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = ["embed_dim=16", "depth=3", "num_heads=2", "patch_size=4", "weight_init=jax", "drop_path_rate=0.3"]


def experiments(verb: str, folder: Path, processes: int, *options: str) -> dict:
    """The result of `python -m experiments VERB`, which starts a Python only where several processes are asked for."""
    line = [verb, "--name=run", f"--output={folder}", "--batch-size=64", *options]
    line += [f"--model-option={option}" for option in SMALL]
    line += ["--trainer=accelerator=cpu", f"--trainer=devices={processes}", "--trainer=enable_progress_bar=False"]
    if processes == 1:
        with torch.random.fork_rng():
            app(line, standalone_mode=False)
    else:
        command = [sys.executable, "-W", "ignore", "-m", "experiments", *line]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    return results.read(folder / f"{verb}-run-seed0.json")


def train(folder: Path, processes: int) -> dict:
    options = ["--epochs=2", "--mixup=0.8", "--cutmix=1", "--repeats=3", "--ema-decay=0.9"]
    return experiments("train", folder, processes, *options)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder, 1)


def test_the_number_of_processes_changes_nothing_but_rounding(alone, tmp_path: Path) -> None:
    folder, one = alone
    many = train(tmp_path, 2)
    assert many["processes"] == 2 and one["processes"] == 1
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


def test_an_evaluation_shared_out_unevenly_counts_each_image_once(alone, tmp_path: Path) -> None:
    """450 images on four processes, of which two have a batch more than the others."""
    weights = alone[0] / "weights" / "train-run-seed0.safetensors"
    options = ["--data=digits", "--model=deit_digits_patch2_16", f"--weights={weights}"]
    options += ["--downsampler=wkmedoids", "--keep=9,4,1"]
    one, four = (experiments("evaluate", tmp_path / str(count), count, *options)["metrics"] for count in (1, 4))
    assert one["images"] == four["images"] == 450
    assert four["correct"] == one["correct"]  # in the order of the images, whoever has evaluated them
    right = bits.decode(one["correct"], 450).sum()
    assert 20 < right < 430 and one["top1"] == four["top1"] == 100 * (right / 450)
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["relative_error"] == pytest.approx(one["relative_error"], rel=1e-4)
