import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from tokenpool.analysis import results
from tokenpool.runs import execute, loggers
from tokenpool.runs.run import Run
from tokenpool.training.recipe import Recipe

TINY = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4}
RECIPE = Recipe(epochs=1, batch_size=256, warmup_epochs=0)
RUN = Run("train", "x", "digits", "deit_digits_patch2_16", recipe=RECIPE, model_options=TINY)


def test_csv_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loggers.VARIABLE, raising=False)
    assert isinstance(loggers.create("x", tmp_path), CSVLogger)


def test_what_is_unknown_or_not_installed_is_named(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"--output={tmp_path}"
    for arguments in (["train"], ["reproduce"], ["figure", "1b"], ["table", "1"]):
        done = in_process(*arguments, place, "--logger=tensorbord")
        assert done.stderr.endswith("unknown logger 'tensorbord'; known are csv, tensorboard, wandb\n")
        assert done.returncode == 1
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert (
        "error: the logger wandb needs the package wandb: pip install wandb"
        in in_process("run", "base-seed0", "--logger=wandb").stderr
    )
    monkeypatch.setenv(loggers.VARIABLE, "tensorboard")
    with pytest.raises(ValueError, match="needs the package tensorboard: pip install tensorboard"):
        execute.execute(RUN, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_results_do_not_depend_on_the_logger(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's own, if it is installed; else a CSV log in its place, which shows that the choice arrives."""
    made = []
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        monkeypatch.setattr(loggers, "find_spec", lambda name: name)
        monkeypatch.setattr(
            loggers, "TensorBoardLogger", lambda folder, name: made.append(name) or CSVLogger(folder, f"tb-{name}")
        )
    options = [f"--model-option={key}={value}" for key, value in TINY.items()]
    train = ["train", "--name=x", "--epochs=1", "--batch-size=256", *options]
    for name in ("csv", "tensorboard"):
        done = in_process(*train, f"--output={tmp_path / name}", f"--logger={name}")
        assert done.returncode == 0, done.stderr
    first, second = (results.read(tmp_path / name / "train-x-seed0.json") for name in ("csv", "tensorboard"))
    assert first["setting"] == second["setting"] and first["metrics"] == second["metrics"]
    assert list((tmp_path / "csv" / "logs").rglob("metrics.csv"))
    logged = list((tmp_path / "tensorboard" / "logs").rglob("events.*")) or made
    assert logged
    assert "finished already" in in_process(*train, f"--output={tmp_path / 'tensorboard'}").stdout  # the same run


def test_each_run_has_a_log_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb keeps one run a process, which must end with ours."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv(loggers.VARIABLE, "wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    execute.execute(RUN, tmp_path)
    assert wandb.run is None and list((tmp_path / "logs" / RUN.name).rglob("offline-run-*/*.wandb"))
    assert "wandb" in sys.modules
