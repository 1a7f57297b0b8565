"""One run: setting in, weights and one JSON file out. Finished runs are skipped, interrupted ones go on."""

import math
import os
import platform
import resource
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
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
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import tokenpool
from experiments import loggers
from experiments.measurements import MEASURES
from tokenpool import bits, files, flops, results, soft_selection
from tokenpool.data import DigitsDataModule, ImageFolderDataModule
from tokenpool.interruption import InterruptibleCheckpoint, WholeCheckpoints, listening, slurm_job
from tokenpool.module import ClassificationModule
from tokenpool.stored import StoredImageDataModule
from tokenpool.tracing import ReconstructionErrorCallback

DATA, WEIGHTS = "TOKENPOOL_DATA", "TOKENPOOL_WEIGHTS"  # environment variables, so that results hold no path
NAMED = {  # data, and what messages call them
    "imagenet": "ImageNet, a folder in its layout or hf:ILSVRC/imagenet-1k",
    "cifar10": "CIFAR-10: cifar10 to download it, a folder train/<class>/* and test/<class>/*, or hf:uoft-cs/cifar10",
}
AUGMENTATIONS = {"deit": ImageFolderDataModule, "light": StoredImageDataModule}
WORKERS, MINUTES = "TOKENPOOL_WORKERS", "TOKENPOOL_MINUTES"  # what results do not depend on


# Warnings of Lightning and PyTorch that do not apply.
_IRRELEVANT = (
    "does not have many workers",  # the data lie in memory, or the user has chosen
    "number of training batches",
    "it is recommended to use `Trainer.devices=1",  # in evaluation; our samplers share out the images exactly
    "It is recommended to use `self.log.*sync_dist=True",  # they are, before they are logged
    "in eval mode at the start of training",  # the moving average of the weights
    "`srun` command is available",
    "Grad strides do not match bucket view strides",  # of one small parameter
    "`isinstance.treespec, LeafSpec.` is deprecated",
)


@dataclass(frozen=True)
class Run:
    """Everything that the result of a run depends on.

    Attributes:
        stage: "base", "search", "finetune" (section 5, steps 1 to 4), "train", "evaluate" (without fine-tuning), or one
            of `measurements.MEASURES`.
        label: tells runs of one stage and seed apart; part of the file's name.
        data: "digits"; "imagenet" or "cifar10", the images that the environment variable TOKENPOOL_DATA names; or a
            folder in ImageNet's layout.
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
        crop_pct: share of the resized image that evaluation crops; 0 for the model's own in timm.
        augmentation: of images in training: "deit", DeiT's, or "light", flips and shifts of images that are decoded and
            resized once (`tokenpool.stored`).
        train_per_class: train on the first so many images of each class; 0 for all.
        test_per_class: the same for evaluation.
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
    final_learning_rate: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1
    ema_decay: float = 0.0
    crop_pct: float = 0.0
    augmentation: str = "deit"
    train_per_class: int = 0
    test_per_class: int = 0
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
    """File of the weights that the run of that name ends with; their moving average is in `name.ema.safetensors`."""
    return folder / "weights" / f"{name}.safetensors"


def checkpoint_path(run: Run, folder: Path) -> Path:
    """File of the state of the run's training, until it is finished."""
    return folder / "checkpoints" / f"{run.name}.ckpt"


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
    record = _Record(run, prints=not progress and not parent_process())
    surroundings = environment()
    seed_everything(run.seed, verbose=False)
    data = data_module(run)
    model = build_model(run, folder)
    data.setup("test")
    if data.num_classes != model.num_classes:
        raise ValueError(f"the data have {data.num_classes} classes, but the model has {model.num_classes}")
    module = training_module(run, model)
    checkpoint = checkpoint_path(run, folder)
    if run.stage in MEASURES:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        metrics, is_first = MEASURES[run.stage](model.to(device).eval(), data), True
    else:
        metrics, is_first = _train_and_test(run, module, data, folder, checkpoint, record, on_epoch, progress)
    outcome = {
        "setting": run.setting,
        "metrics": metrics,
        "cost": _cost(model),
        "seconds": record.seconds,
        **record.training(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": surroundings,
    }
    if is_first:
        if run.epochs:
            save_weights(model, weights_path(run.name, folder))
            if module.ema is not None:
                save_weights(module.ema.module, weights_path(f"{run.name}.ema", folder))
        results.save(outcome, path)  # last: that it exists means that the run is done
        checkpoint.unlink(missing_ok=True)
    return outcome


def training_module(run: Run, model: nn.Module) -> ClassificationModule:
    """What trains and tests the run's model."""
    return ClassificationModule(
        model,
        num_classes=model.num_classes,
        learning_rate=run.learning_rate,
        weight_decay=run.weight_decay,
        warmup_epochs=run.warmup_epochs,
        label_smoothing=run.label_smoothing,
        retention_penalty=run.retention_penalty,
        retention_learning_rate=run.retention_learning_rate,
        seed=run.seed,
        final_learning_rate=run.final_learning_rate,
        ema_decay=run.ema_decay if run.epochs else 0.0,
    )


def _train_and_test(
    run: Run,
    module: ClassificationModule,
    data: LightningDataModule,
    folder: Path,
    checkpoint: Path,
    record: "_Record",
    on_epoch: Callable[[], None] | None,
    progress: bool,
) -> tuple[dict[str, Any], bool]:
    """Metrics, and whether this is the first of the processes that train together."""
    errors = ReconstructionErrorCallback()
    with warnings.catch_warnings(), listening() as signals:
        for message in _IRRELEVANT:
            warnings.filterwarnings("ignore", message=f".*{message}")
        callbacks = [record, InterruptibleCheckpoint(checkpoint, signals, minutes=_minutes())]
        callbacks += [errors] if run.stage == "evaluate" else []
        trainer = _trainer(run, folder, callbacks, on_epoch, progress)
        try:
            if run.epochs:
                fit(trainer, module, data, run, checkpoint)
            metrics = trainer.test(module, datamodule=data, verbose=progress)[0]
        finally:
            loggers.close(trainer.logger)

    measured = _accuracy(metrics, module.correct)
    if module.ema is not None:
        averaged = _accuracy(metrics, module.ema_correct, prefix="test_ema_")
        measured |= {f"ema_{name}": value for name, value in averaged.items() if name != "images"}
    if tokenpool.vit.is_patched(module.model) and run.stage == "evaluate":
        measured["relative_error"] = errors.relative
    if run.downsampler == "soft_selection":
        measured["learned_keep"] = soft_selection.learned_schedule(module.model)
    return measured, trainer.is_global_zero


def _accuracy(metrics: dict[str, float], correct: Tensor, prefix: str = "test_") -> dict[str, Any]:
    """Accuracies in percent, with the standard error that comes of the finite number of images.

    `correct` says which images were right, see `tokenpool.bits`; it is what pairs runs by image.
    """
    images = len(correct)
    top1, loss = correct.sum().item() / images, metrics[f"{prefix}loss"]
    return {
        "top1": 100 * top1,
        "top1_error": 100 * (top1 * (1 - top1) / images) ** 0.5,
        "top5": 100 * metrics[f"{prefix}top5"],
        "loss": loss if math.isfinite(loss) else None,
        "images": images,
        "correct": bits.encode(correct.numpy()),
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
        Interrupted: if a signal does.
        ValueError: if the checkpoint cannot be read, or is of another setting; the message names it.
        FloatingPointError: if the loss is not finite; the message says where to go on.
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
    except FloatingPointError as error:
        last = (
            f"the last checkpoint with finite weights is {checkpoint}"
            if checkpoint.exists()
            else "there is no checkpoint yet"
        )
        raise FloatingPointError(f"{error}; {last}. Try a lower learning rate") from error


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
        tokenpool.load_weights(model, Path(weights), other_classes="num_classes" in run.model_options)
    if run.start is not None:
        tokenpool.load_weights(model, Path(run.start) if os.sep in run.start else weights_path(run.start, folder))
    return model


def data_module(run: Run) -> LightningDataModule:
    """The run's data."""
    if run.data == "digits":
        if run.limit or run.part or run.train_per_class or run.test_per_class:
            raise ValueError("the digits are few; only image folders can be limited or parted")
        return DigitsDataModule(split=run.split, **_batches(run))
    config = timm.get_pretrained_cfg(run.model) or timm.models.PretrainedCfg()
    if run.augmentation not in AUGMENTATIONS:
        raise ValueError(f"augmentation = {run.augmentation!r} must be {' or '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[run.augmentation](
        image_source(run),
        image_size=run.model_options.get("img_size", config.input_size[-1]),
        workers=_workers(),
        mean=config.mean,
        std=config.std,
        crop_pct=run.crop_pct or config.crop_pct or 0.9,
        limit=run.limit,
        part=run.part,
        train_per_class=run.train_per_class,
        test_per_class=run.test_per_class,
        **_batches(run),
    )


def prepare_data(runs: Sequence[Run]) -> None:
    """Open the images of all runs, and store those that are to be stored, before anything is trained.

    Raises:
        ValueError, OSError: as of `data_module` and its `setup`.
    """
    names = ("data", "model", "augmentation", "train_per_class", "test_per_class", "crop_pct")
    users: dict[tuple, Run] = {}
    for run in sorted(runs, key=lambda run: -run.epochs):
        key = (*(getattr(run, name) for name in names), str(run.model_options.get("img_size")))
        if run.data != "digits":
            users.setdefault(key, run)
    for run in users.values():
        data_module(run).setup("fit" if run.epochs else "test")


def image_source(run: Run) -> str:
    """Where the run's images are: a folder, or what `tokenpool.images.open_images` takes.

    Raises:
        ValueError: if nothing names them.
    """
    root = os.environ.get(DATA) if run.data in NAMED else run.data
    if not root:
        raise ValueError(f"no images: --data or the variable {DATA} must name {NAMED[run.data]}")
    return root


def _batches(run: Run) -> dict[str, Any]:
    return {name: getattr(run, name) for name in ("batch_size", "seed", "mixup", "cutmix", "repeats")}


def _workers() -> int:
    """Processes that load data for one that trains: $TOKENPOOL_WORKERS; one for each other core from Slurm; or 2."""
    if parent_process():
        return 0  # a study has processes enough, and starting more costs it seconds a run
    return _number(WORKERS, max(int(os.environ.get("SLURM_CPUS_PER_TASK", 3)) - 1, 0))


def _minutes() -> float:
    """Between checkpoints in the middle of an epoch: $TOKENPOOL_MINUTES, or 10."""
    return _number(MINUTES, 10.0)


def _number(variable: str, default: float) -> Any:
    text = os.environ.get(variable)
    try:
        number = type(default)(text or default)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"${variable} = {text!r} must be a number, 0 or more")
    return number


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state: the file is there whole or not at all."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with files.whole(path) as temporary:
        safetensors.torch.save_file(state, temporary)


def environment() -> dict[str, Any]:
    """Versions, commit and machine."""
    versions = {"python": platform.python_version(), "tokenpool": tokenpool.__version__}
    versions |= {
        name: version(name) for name in ("torch", "lightning", "timm", "torchmetrics", "fvcore", "scikit-learn")
    }
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}
    job = {"slurm_job": slurm_job()} if slurm_job() else {}
    return {"versions": versions, "commit": commit(), "machine": machine, "threads": torch.get_num_threads()} | job


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
        callbacks.append(flops.FlopsCallback())
    if on_epoch:
        callbacks.append(_EpochReporter(on_epoch))
    defaults = {
        "max_epochs": run.epochs or 1,
        "logger": loggers.create(run.name, folder) if run.epochs else False,
        "default_root_dir": folder,
        "enable_progress_bar": progress,
        "enable_model_summary": progress,
        "enable_checkpointing": True,
        "log_every_n_steps": 50,
        "deterministic": "warn",
        "num_sanity_val_steps": 0,
        "plugins": [WholeCheckpoints()],
    }
    if SLURMEnvironment.detect():
        # Nodes and tasks are as sbatch was told. Lightning's own requeueing can hang (its issue 21406).
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        defaults |= {"num_nodes": nodes, "devices": int(os.environ.get("SLURM_NTASKS", nodes)) // nodes}
        defaults["plugins"].append(SLURMEnvironment(auto_requeue=False))
    try:
        return Trainer(callbacks=callbacks, **defaults | run.trainer_options)
    except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
        raise ValueError(f"Lightning's Trainer does not take these options: {error}") from error


class _Record(Checkpoint):
    """Writes into checkpoints what the result will tell of the training, and goes on where a checkpoint stopped.

    A Checkpoint, because Lightning calls those when the epoch's metrics are known; it stands before the one that saves.
    """

    def __init__(self, run: Run, prints: bool) -> None:
        self.run = run
        self.prints = prints  # a line an epoch, for logs
        self.started = time.perf_counter()
        self.epochs: list[dict[str, Any]] = []
        self.images = 0  # trained on, and the seconds that it took, validation left out
        self.busy = 0.0
        self.processes = self.restarts = 0
        self._mark, self._validated = time.perf_counter(), False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def training(self) -> dict[str, Any]:
        """Entries of the result: number of processes, throughput and memory, and a row for each epoch."""
        if not self.epochs:
            return {}
        return {
            "processes": self.processes,
            "restarts": self.restarts,
            "training_images_per_second": self.images / self.busy if self.busy else None,
            "peak_memory_gib": _peak_memory(),
            "epochs": self.epochs,
        }

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.processes = trainer.world_size

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._mark = time.perf_counter()
        self._print(
            trainer,
            f"training from step {trainer.global_step}, with {trainer.num_training_batches} batches an epoch, in "
            f"{trainer.world_size} process{'es' if trainer.world_size > 1 else ''}",
        )

    def _print(self, trainer: Trainer, line: str) -> None:
        if self.prints and trainer.is_global_zero:
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {self.run.name}: {line}", flush=True)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        self.images += len(batch[0]) * trainer.world_size
        now = time.perf_counter()
        self.busy += now - self._mark  # with the time that it took to load the batch
        self._mark = now

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("train_") or (name.startswith("val_") and self._validated)  # in this epoch
        }
        self._validated = False
        self.epochs.append(
            {"epoch": trainer.current_epoch + 1, "learning_rate": trainer.optimizers[0].param_groups[0]["lr"]}
            | {name: round(value, 6) for name, value in metrics.items() if math.isfinite(value)}
        )
        top1 = f"top-1 {100 * metrics['val_top1']:.2f} %, " if "val_top1" in metrics else ""
        rate = self.images / self.busy if self.busy else math.nan
        self._print(
            trainer,
            f"epoch {len(self.epochs)}/{self.run.epochs}, training loss {metrics['train_loss']:.4f}, {top1}"
            f"{rate:.0f} images/s",
        )

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = _plain(self.run.setting)
        checkpoint["seconds"] = self.seconds
        checkpoint["record"] = {name: getattr(self, name) for name in ("epochs", "images", "busy", "restarts")}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.started -= checkpoint["seconds"]
        for name, value in checkpoint.get("record", {}).items():
            setattr(self, name, value)
        self.restarts += 1


def _peak_memory() -> float:
    """The most memory that this process has used, in GiB: of the GPU if it has one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
