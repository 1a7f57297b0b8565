"""One run: setting in, weights and one JSON file out. Finished runs are skipped, interrupted ones go on."""

import math
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import tokenpool
from experiments.measurements import MEASURES
from tokenpool import flops, results, soft_selection
from tokenpool.data import DigitsDataModule, ImageFolderDataModule
from tokenpool.module import ClassificationModule
from tokenpool.tracing import ReconstructionErrorCallback

DATA, WEIGHTS = "TOKENPOOL_DATA", "TOKENPOOL_WEIGHTS"  # environment variables, so that results hold no path


@dataclass(frozen=True)
class Run:
    """Everything that the result of a run depends on.

    Attributes:
        stage: "base", "search", "finetune" (section 5, steps 1 to 4), "train", "evaluate" (without fine-tuning), or one
            of `measurements.MEASURES`.
        label: tells runs of one stage and seed apart; part of the file's name.
        data: "digits"; "imagenet", the folder that the environment variable TOKENPOOL_DATA names; or a folder in
            ImageNet's layout.
        model: name of the timm model.
        variant: name of the base model in its study, empty for the main one.
        downsampler: name of the method; "soft_selection" in a search.
        keep: retention schedule.
        budget: instead of `keep`: in 10^9 multiply-adds, see `tokenpool.flops.schedule_for`.
        family: of the schedules that may meet it.
        level: number of the schedule, 0 the mildest; None where there is none.
        start: weights to start from: the name of another run, or a path with a separator; None to start afresh.
        epochs: of training; 0 to evaluate only.
        options: of the downsampler.
        model_options: of the timm model.
        trainer_options: of Lightning's Trainer.
        split: of the data into train and test.
        part: "1/2" for the first of two interleaved halves of the images of a folder, and so on; empty for all.
        (the others: see `ClassificationModule`, `tokenpool.patch` and the data modules)
    """

    stage: str
    label: str
    data: str
    model: str
    variant: str = ""
    downsampler: str = "none"
    keep: tuple[int, ...] | None = None
    budget: float | None = None
    family: str = "decay"
    level: int | None = None
    carry: bool = False
    qk_norm: str | None = None
    alpha: float = 1.0
    learn_alpha: bool = False
    pretrained: bool = False
    start: str | None = None
    epochs: int = 0
    batch_size: int = 32
    learning_rate: float = 5e-4
    warmup_epochs: float = 5
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    retention_penalty: float = 0.0
    retention_learning_rate: float = 1e-2
    seed: int = 0
    split: int = 0
    limit: int = 0
    part: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    trainer_options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return "-".join([self.stage, *([self.label] if self.label else []), f"seed{self.seed}"])

    @property
    def setting(self) -> dict[str, Any]:
        """The run as JSON values."""
        return asdict(self) | {"keep": None if self.keep is None else list(self.keep)}


_DEFAULTS = Run("", "", "", "").setting


def result_path(run: Run, folder: Path) -> Path:
    """File of the run's result."""
    return folder / f"{run.name}.json"


def weights_path(name: str, folder: Path) -> Path:
    """File of the weights that the run of that name ends with."""
    return folder / "weights" / f"{name}.safetensors"


def is_finished(run: Run, folder: Path) -> bool:
    """Whether the run's result is there.

    Raises:
        ValueError: if the file is broken, or holds the result of another setting.
    """
    path = result_path(run, folder)
    if not path.exists():
        return False
    check_same(run, results.read(path)["setting"], path)
    return True


def check_same(run: Run, before: dict[str, Any], path: Path) -> None:
    """Compare a run with the setting that a file holds.

    Raises:
        ValueError: if they differ; the message names the file and the differences.
    """
    before = _DEFAULTS | before  # a setting that is younger than the file had its default then
    differing = [key for key, value in run.setting.items() if _plain(before.get(key)) != _plain(value)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {run.setting[key]!r}" for key in differing)
        raise ValueError(f"{path} holds another setting ({changes}): choose another name or folder, or delete the file")


def execute(
    run: Run,
    folder: Path,
    on_epoch: Callable[[], None] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train (if it has epochs) and test one run; write its weights, then its result.

    Training goes on from the last checkpoint, where an interrupted run has left one.

    Args:
        run: the setting.
        folder: for results; weights, checkpoints and logs go into sub-folders.
        on_epoch: called after each epoch of training.
        progress: show Lightning's progress bar.

    Returns:
        What the JSON file holds.
    """
    path = result_path(run, folder)
    clock, surroundings = _Clock(run), environment()
    seed_everything(run.seed, verbose=False)
    data = data_module(run)
    model = build_model(run, folder)
    data.setup("test")
    if data.num_classes != model.num_classes:
        raise ValueError(f"the data have {data.num_classes} classes, but the model has {model.num_classes}")
    checkpoint = folder / "checkpoints" / f"{run.name}.ckpt"
    if run.stage in MEASURES:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        metrics, is_first = MEASURES[run.stage](model.to(device).eval(), data), True
    else:
        metrics, is_first = _train_and_test(run, model, data, folder, checkpoint, clock, on_epoch, progress)
    outcome = {
        "setting": run.setting,
        "metrics": metrics,
        "cost": _cost(model),
        "seconds": clock.seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": surroundings,
    }
    if is_first:
        if run.epochs:
            save_weights(model, weights_path(run.name, folder))
        results.save(outcome, path)  # last: that it exists means that the run is done
        checkpoint.unlink(missing_ok=True)
    return outcome


def _train_and_test(
    run: Run,
    model: nn.Module,
    data: LightningDataModule,
    folder: Path,
    checkpoint: Path,
    clock: "_Clock",
    on_epoch: Callable[[], None] | None,
    progress: bool,
) -> tuple[dict[str, Any], bool]:
    """Metrics, and whether this is the first of the processes that train together."""
    module = ClassificationModule(
        model,
        num_classes=model.num_classes,
        learning_rate=run.learning_rate,
        weight_decay=run.weight_decay,
        warmup_epochs=run.warmup_epochs,
        label_smoothing=run.label_smoothing,
        retention_penalty=run.retention_penalty,
        retention_learning_rate=run.retention_learning_rate,
        seed=run.seed,
    )
    errors = ReconstructionErrorCallback()
    trainer = _trainer(run, folder, [clock, errors] if run.stage == "evaluate" else [clock], on_epoch, progress)
    with warnings.catch_warnings():
        # Lightning's advice on the number of workers is not for data that lie in memory.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        if run.epochs:
            fit(trainer, module, data, run, checkpoint)
        metrics = trainer.test(module, datamodule=data, verbose=progress)[0]

    measured = _accuracy(metrics, images=len(trainer.test_dataloaders.dataset))
    if tokenpool.vit.is_patched(model) and run.stage == "evaluate":
        measured["relative_error"] = errors.relative
    if run.downsampler == "soft_selection":
        measured["learned_keep"] = soft_selection.learned_schedule(model)
    return measured, trainer.is_global_zero


def _accuracy(metrics: dict[str, float], images: int) -> dict[str, Any]:
    """Accuracies in percent, with the standard error that comes of the finite number of images."""
    top1, loss = metrics["test_top1"], metrics["test_loss"]
    return {
        "top1": 100 * top1,
        "top1_error": 100 * (top1 * (1 - top1) / images) ** 0.5,
        "top5": 100 * metrics["test_top5"],
        "loss": loss if math.isfinite(loss) else None,
        "images": images,
    }


def _cost(model: nn.Module) -> dict[str, Any]:
    count = flops.count(model)
    return {
        "gmacs": count.gmacs,
        "backbone_gmacs": count.backbone_gmacs,
        "clustering_gmacs": count.clustering_gmacs,
        "parts": count.parts,
    }


def fit(trainer: Trainer, module: LightningModule, data: LightningDataModule, run: Run, checkpoint: Path) -> None:
    """Train; go on from the checkpoint if it exists.

    Raises:
        KeyboardInterrupt: if the user stops it.
        ValueError: if the checkpoint cannot be read, or is of another setting; the message names it.
    """
    if checkpoint.exists():
        try:
            before = torch.load(checkpoint, map_location="cpu", weights_only=True)["run"]
        except Exception as error:
            raise ValueError(f"cannot read checkpoint {checkpoint} ({error}); delete it to start anew") from error
        check_same(run, before, checkpoint)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None)
    except SystemExit as error:  # what Lightning makes of an interrupt
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise


def build_model(run: Run, folder: Path) -> nn.Module:
    """The run's model with the weights that it starts from."""
    downsampler = soft_selection.SoftSelection if run.downsampler == "soft_selection" else run.downsampler
    weights = os.environ.get(WEIGHTS) if run.pretrained else None
    keep = run.keep
    if run.budget is not None:
        plain = tokenpool.create_model(run.model, **run.model_options)
        keep = flops.schedule_for(run.budget, plain, run.downsampler, run.family, **run.options)
    model = tokenpool.create_model(
        run.model,
        downsampler,
        keep,
        carry=run.carry,
        pretrained=run.pretrained and weights is None,
        qk_norm=run.qk_norm,
        alpha=run.alpha,
        learn_alpha=run.learn_alpha,
        **run.options,
        **run.model_options,
    )
    if weights is not None:
        tokenpool.load_weights(model, Path(weights))
    if run.start is not None:
        tokenpool.load_weights(model, Path(run.start) if os.sep in run.start else weights_path(run.start, folder))
    return model


def data_module(run: Run) -> LightningDataModule:
    """The run's data."""
    if run.data == "digits":
        if run.limit or run.part:
            raise ValueError("the digits are few; only image folders can be limited or parted")
        return DigitsDataModule(batch_size=run.batch_size, split=run.split, seed=run.seed)
    folder = os.environ.get(DATA) if run.data == "imagenet" else run.data
    if not folder:
        raise ValueError(f"no images: --data FOLDER or the variable {DATA} must name a folder in ImageNet's layout")
    config = timm.get_pretrained_cfg(run.model) or timm.models.PretrainedCfg()
    return ImageFolderDataModule(
        folder,
        image_size=run.model_options.get("img_size", config.input_size[-1]),
        batch_size=run.batch_size,
        workers=0 if parent_process() else 2,  # a study has processes enough, and starting more costs it seconds a run
        seed=run.seed,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct or 0.9,
        limit=run.limit,
        part=run.part,
    )


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    safetensors.torch.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
    os.replace(temporary, path)


def environment() -> dict[str, Any]:
    """Versions, commit and machine."""
    versions = {"python": platform.python_version(), "tokenpool": tokenpool.__version__}
    versions |= {
        name: version(name) for name in ("torch", "lightning", "timm", "torchmetrics", "fvcore", "scikit-learn")
    }
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}
    return {"versions": versions, "commit": commit(), "machine": machine, "threads": torch.get_num_threads()}


@cache  # of the code that is running, whatever is committed meanwhile
def commit() -> str | None:
    """The commit of this code, with "-dirty" if it has changed since; None outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _trainer(
    run: Run, folder: Path, callbacks: list[Callback], on_epoch: Callable[[], None] | None, progress: bool
) -> Trainer:
    if run.epochs:
        callbacks += [
            ModelCheckpoint(folder / "checkpoints", filename=run.name, enable_version_counter=False),
            flops.FlopsCallback(),
        ]
    if on_epoch:
        callbacks.append(_EpochReporter(on_epoch))
    defaults = {
        "max_epochs": run.epochs or 1,
        "logger": CSVLogger(folder / "logs", name=run.name) if run.epochs else False,
        "enable_progress_bar": progress,
        "enable_model_summary": progress,
        "enable_checkpointing": bool(run.epochs),
        "log_every_n_steps": 50,
        "deterministic": "warn",
        "num_sanity_val_steps": 0,
    }
    try:
        return Trainer(callbacks=callbacks, **defaults | run.trainer_options)
    except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
        raise ValueError(f"Lightning's Trainer does not take these options: {error}") from error


class _Clock(Callback):
    """Writes the setting and the time used so far into checkpoints, and goes on counting where a checkpoint stopped."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = _plain(self.run.setting)
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.started -= checkpoint["seconds"]


class _EpochReporter(Callback):
    def __init__(self, report: Callable[[], None]) -> None:
        self.report = report

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.report()


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
