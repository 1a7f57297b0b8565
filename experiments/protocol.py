"""One run: setting in, weights and one JSON file out. Finished runs are skipped, interrupted ones go on."""

import math
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import tokenpool
from experiments import loggers
from experiments.measurements import MEASURES
from experiments.run import (  # noqa: F401 - the names of a run are also found here
    DATA,
    NAMED,
    WEIGHTS,
    Identities,
    Run,
    check_identity,
    check_same,
    checkpoint_path,
    empty_model,
    image_source,
    is_finished,
    is_path,
    plain,
    preprocessing,
    result_path,
    weights_path,
)
from tokenpool import files, flops
from tokenpool.analysis import bits, results
from tokenpool.training import fingerprint, soft_selection
from tokenpool.training.callbacks import FlopsCallback, ReconstructionErrorCallback
from tokenpool.training.data import DigitsDataModule, ImageFolderDataModule
from tokenpool.training.interruption import AtomicCheckpointIO, InterruptibleCheckpoint, recorded_signals, slurm_job
from tokenpool.training.labels import outputs_of
from tokenpool.training.module import ClassificationModule
from tokenpool.training.stored import StoredImageDataModule

AUGMENTATIONS = {"deit": ImageFolderDataModule, "light": StoredImageDataModule}
ENOUGH_IMAGES = 30  # to say of an accuracy that it is no better than a guess
COMMIT = "TOKENPOOL_COMMIT"  # for copies of the code without its history, as in containers
SLURM_RESERVED = 0xFFFFFFF0  # from here on the numbers of steps mean a batch script, an interactive shell, and so on
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
    identity = Identities(folder).of(run)
    seed_everything(run.seed, verbose=False)
    data = data_module(run)
    model = build_model(run, folder)
    data.setup("test")
    outputs = outputs_of(data.classes, model.num_classes)
    module = training_module(run, model, outputs)
    if run.stage in MEASURES:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        metrics, is_first = MEASURES[run.stage](model.to(device).eval(), data), True
    else:
        metrics, is_first = _train_and_test(run, module, data, folder, identity, record, on_epoch, progress)
    outcome = {
        "setting": run.setting,
        "identity": identity,
        "metrics": metrics,
        "cost": _cost(model),
        "seconds": record.seconds,
        **record.training(),
        **_restriction(outputs, model.num_classes),
        **_doubts(run, metrics, len(data.classes)),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": surroundings,
    }
    if is_first:
        if run.recipe.epochs:
            outcome["trained_weights"] = save_weights(model, weights_path(run.name, folder), _ended_before(path))
            if module.ema is not None:
                save_weights(module.ema.module, weights_path(f"{run.name}.ema", folder))
        results.save(outcome, path)  # last: that it exists means that the run is done
        files.delete(checkpoint_path(run, folder))
    return outcome


def training_module(run: Run, model: nn.Module, outputs: list[int] | None = None) -> ClassificationModule:
    """What trains and tests the run's model; `outputs` are those of the data's classes, None for all."""
    return ClassificationModule(
        model,
        num_classes=model.num_classes if outputs is None else len(outputs),
        recipe=run.recipe if run.recipe.epochs else replace(run.recipe, ema_decay=0.0),
        seed=run.seed,
        outputs=outputs,
    )


def _train_and_test(
    run: Run,
    module: ClassificationModule,
    data: LightningDataModule,
    folder: Path,
    identity: dict[str, str],
    record: "_Record",
    on_epoch: Callable[[], None] | None,
    progress: bool,
) -> tuple[dict[str, Any], bool]:
    """Metrics, and whether this is the first of the processes that train together."""
    errors, checkpoint = ReconstructionErrorCallback(), checkpoint_path(run, folder)
    record.identity = identity
    with warnings.catch_warnings(), recorded_signals() as signals:
        for message in _IRRELEVANT:
            warnings.filterwarnings("ignore", message=f".*{message}")
        callbacks = [record, InterruptibleCheckpoint(checkpoint, signals, minutes=_minutes())]
        callbacks += [errors] if run.stage == "evaluate" else []
        trainer = _trainer(run, folder, callbacks, on_epoch, progress)
        if trainer.world_size > 1:
            signals.use_default_handlers()  # until all processes have met
        try:
            if run.recipe.epochs:
                fit(trainer, module, data, run, checkpoint, identity)
            tested = trainer.test(module, datamodule=data, verbose=progress)
        finally:
            loggers.close(trainer.logger)
        if not tested:
            raise ValueError(f"no image was tested with the Trainer's options {run.trainer_options}")
        metrics = tested[0]

    measured = _accuracy(metrics, module.correct)
    if module.ema is not None:
        averaged = _accuracy(metrics, module.ema_correct, prefix="test_ema_")
        measured |= {f"ema_{name}": value for name, value in averaged.items() if name != "images"}
    if tokenpool.is_patched(module.model) and run.stage == "evaluate":
        measured["relative_error"] = errors.relative
    if run.downsampler == "soft_selection":
        measured["learned_keep"] = soft_selection.learned_schedule(module.model)
    return measured, trainer.is_global_zero


def _accuracy(metrics: dict[str, float], correct: Tensor, prefix: str = "test_") -> dict[str, Any]:
    """Accuracies in percent, with the standard error that comes of the finite number of images.

    `correct` says which images were right, see `tokenpool.analysis.bits`; it is what pairs runs by image.
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


def _restriction(outputs: list[int] | None, num_classes: int) -> dict[str, Any]:
    """Entry of the result where some of the model's classes only took part: which ones."""
    return {} if outputs is None or len(outputs) == num_classes else {"among_classes": outputs}


def _doubts(run: Run, metrics: dict[str, Any], classes: int) -> dict[str, str]:
    """Entry of the result where a model with weights from elsewhere is no better than a guess: likely reasons."""
    from_elsewhere = run.pretrained or is_path(run.start)
    images, guess = metrics.get("images", 0), 1 / classes
    if run.recipe.epochs or not from_elsewhere or "top1" not in metrics or images < ENOUGH_IMAGES or classes < 2:
        return {}
    top1, loss, by_guess = metrics["top1"], metrics.get("loss"), math.log(classes)
    if top1 <= 100 * (guess + 3 * (guess * (1 - guess) / images) ** 0.5):
        found = f"top-1 {top1:.2f} % of {images} images is what a guess among {classes} classes has"
    elif loss is not None and loss > by_guess:
        found = f"the loss {loss:.2f} is above that of a guess among {classes} classes, {by_guess:.2f}"
    else:
        return {}
    reasons = (
        "the classes of the data stand in another order than the model's (their folders are numbered in natural order, "
        "but for WordNet ids with ImageNet's classes); the images are not preprocessed as the model expects "
        "(`experiments.protocol.preprocessing`); or the weights have no head for these classes"
    )
    pooled = "; or too few tokens are kept" if run.downsampler != "none" else ""
    return {"warning": f"{found}. Likely reasons: {reasons}{pooled}"}


def _cost(model: nn.Module) -> dict[str, Any]:
    count = flops.count(model)
    return {
        "gmacs": count.gmacs,
        "backbone_gmacs": count.backbone_gmacs,
        "clustering_gmacs": count.clustering_gmacs,
        "parts": count.parts,
    }


def fit(
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule,
    run: Run,
    checkpoint: Path,
    identity: dict[str, str],
) -> None:
    """Train; go on from the checkpoint if it exists.

    Raises:
        KeyboardInterrupt: if the user stops it.
        Interrupted: if a signal does.
        ValueError: if the checkpoint cannot be read, or is of another setting, other images or other weights; the
            message names it.
        FloatingPointError: if the loss is not finite; the message says where to go on.
    """
    if checkpoint.exists():
        try:
            before = torch.load(checkpoint, map_location="cpu", weights_only=True)
            setting = before["run"]
        except Exception as error:
            raise ValueError(f"cannot read checkpoint {checkpoint} ({error}); delete it to start anew") from error
        check_same(run, setting, checkpoint)
        check_identity(run, identity, before.get("identity"), checkpoint)
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
        keep = tokenpool.schedule_for(run.budget, plain, run.downsampler, run.family, **run.options)
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
        tokenpool.load_weights(model, Path(weights), other_classes="num_classes" in run.model_options, ema=run.ema)
    if run.start is not None:
        start = Path(run.start) if is_path(run.start) else weights_path(run.start, folder)
        tokenpool.load_weights(model, start, ema=run.ema)
    return model


def data_module(run: Run) -> LightningDataModule:
    """The run's data."""
    recipe = run.recipe
    if run.data == "digits":
        if run.limit or run.part or recipe.train_per_class or recipe.test_per_class:
            raise ValueError("the digits are few; only image folders can be limited or parted")
        return DigitsDataModule(recipe, split=run.split, seed=run.seed)
    source, prepared = image_source(run), preprocessing(run)
    return AUGMENTATIONS[recipe.augmentation](
        source,
        image_size=tuple(prepared.pop("input_size")[1:]),
        recipe=recipe,
        workers=_workers(),
        seed=run.seed,
        limit=run.limit,
        part=run.part,
        allow_empty=run.allow_empty_classes,
        allow_truncated=run.allow_truncated,
        **prepared,
    )


def prepare_data(runs: Sequence[Run]) -> None:
    """Open the images of all runs, and store those that are to be stored, before anything is trained.

    Raises:
        ValueError, OSError: as of `data_module` and its `setup`.
    """
    names = ("augmentation", "train_per_class", "test_per_class", "crop_pct")
    users: dict[tuple, Run] = {}
    for run in sorted(runs, key=lambda run: -run.recipe.epochs):
        key = (
            run.data,
            run.model,
            *(getattr(run.recipe, name) for name in names),
            str(run.model_options.get("img_size")),
        )
        if run.data != "digits":
            users.setdefault(key, run)
    for run in users.values():
        data_module(run).setup("fit" if run.recipe.epochs else "test")


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


def save_weights(model: nn.Module, path: Path, expected: str = "") -> str:
    """Write a model's state: the file is there whole or not at all.

    Args:
        model: whose state it is.
        path: of the file.
        expected: fingerprint that the file must have; empty for any.

    Returns:
        The file's fingerprint.

    Raises:
        ValueError: if it is not the expected one; nothing is written then.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with files.atomic_write(path) as temporary:
        safetensors.torch.save_file(state, temporary)
        found = fingerprint.of_weights(temporary)
        if expected not in ("", found):
            raise ValueError(
                f"trained again, {path.stem} ends with other weights ({found}) than its result tells of ({expected}), "
                "as on another machine or version; other runs may have started from the latter: choose another folder"
            )
    return found


def _ended_before(path: Path) -> str:
    """Fingerprint of the weights that an earlier result of the run tells of, where they are lost; else empty."""
    return (results.read_or_none(path) or {}).get("trained_weights", "")


def environment() -> dict[str, Any]:
    """Versions, commit and machine."""
    versions = {"python": platform.python_version(), "tokenpool": tokenpool.__version__}
    versions |= {
        name: version(name) for name in ("torch", "lightning", "timm", "torchmetrics", "fvcore", "scikit-learn")
    }
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = {"system": platform.system(), "processor": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count()}
    machine["gpus"] = gpus
    job = {"slurm_job": slurm_job()} if slurm_job() else {}
    return {"versions": versions, "commit": commit(), "machine": machine, "threads": torch.get_num_threads()} | job


def _cpu() -> str | None:
    """Name of the CPU's model, as Linux has it; elsewhere what Python knows; None if that is nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or None


@cache  # of the code that is running, whatever is committed meanwhile
def commit() -> str | None:
    """The commit of this code, "-dirty" if it has changed since; outside of a repository $TOKENPOOL_COMMIT, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT)


def _trainer(
    run: Run, folder: Path, callbacks: list[Callback], on_epoch: Callable[[], None] | None, progress: bool
) -> Trainer:
    if run.recipe.epochs:
        callbacks.append(FlopsCallback())
    if on_epoch:
        callbacks.append(_EpochReporter(on_epoch))
    defaults = {
        "max_epochs": run.recipe.epochs or 1,
        "logger": loggers.create(run.name, folder) if run.recipe.epochs else False,
        "default_root_dir": folder,
        "enable_progress_bar": progress,
        "enable_model_summary": progress,
        "enable_checkpointing": True,
        "log_every_n_steps": 50,
        "deterministic": "warn",
        "num_sanity_val_steps": 0,
        "plugins": [AtomicCheckpointIO()],
    }
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning's own requeueing can hang (its issue 21406).
        nodes, tasks = _slurm_nodes_and_tasks()
        defaults |= {"num_nodes": nodes, "devices": tasks // nodes}
        defaults["plugins"].append(SLURMEnvironment(auto_requeue=False))
    try:
        return Trainer(callbacks=callbacks, **defaults | run.trainer_options)
    except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
        raise ValueError(f"Lightning's Trainer does not take these options: {error}") from error


def _slurm_nodes_and_tasks() -> tuple[int, int]:
    """Nodes and tasks as sbatch or srun was told.

    Raises:
        ValueError: if there are several tasks and `srun` has not started this process, so that the others would never
            come; or if the nodes have different numbers of tasks.
    """
    nodes = int(os.environ.get("SLURM_NNODES", 1))
    tasks = int(os.environ.get("SLURM_NTASKS", nodes))
    if tasks > 1 and not _is_task_of_srun():
        raise ValueError(
            f"Slurm has {tasks} tasks for this job (SLURM_NTASKS), but srun has not started this process, and the "
            "others would never come: put srun before the command; for a single process, srun --ntasks=1 --nodes=1"
        )
    if tasks % nodes:
        raise ValueError(
            f"Slurm has {tasks} tasks on {nodes} nodes, but each node needs as many as the others: "
            "use --nodes and --ntasks-per-node"
        )
    return nodes, tasks


def _is_task_of_srun() -> bool:
    """Whether this process is a task of a step that srun started, not the batch script or the shell of salloc.

    Those have no number of a step, or one of Slurm's reserved ones.
    """
    step = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < SLURM_RESERVED and "SLURM_PROCID" in os.environ


class _Record(Checkpoint):
    """Writes into checkpoints what the result will tell of the training, and goes on where a checkpoint stopped.

    A Checkpoint, because Lightning calls those when the epoch's metrics are known; it stands before the one that saves.
    """

    def __init__(self, run: Run, prints: bool) -> None:
        self.run = run
        self.identity: dict[str, str] = {}
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
            f"epoch {len(self.epochs)}/{self.run.recipe.epochs}, training loss {metrics['train_loss']:.4f}, {top1}"
            f"{rate:.0f} images/s",
        )

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = plain(self.run.setting)
        checkpoint["identity"] = self.identity
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
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, others KiB


class _EpochReporter(Callback):
    def __init__(self, report: Callable[[], None]) -> None:
        self.report = report

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.report()
