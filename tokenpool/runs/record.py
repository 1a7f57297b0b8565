"""What a result tells of its training: seconds, throughput, memory, and a row for each epoch."""

import math
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from tokenpool.runs.run import Run, plain


class Record(Checkpoint):
    """The record of a training. It is part of each checkpoint, and goes on from the checkpoint of a resumed training.

    It is a Checkpoint, because Lightning calls checkpoints when the metrics of the epoch are known. It must stand
    before the callback that saves.

    Args:
        run: the run.
        prints: whether to print a line an epoch, for logs.
    """

    def __init__(self, run: Run, prints: bool) -> None:
        self.run = run
        self.identity: dict[str, str] = {}
        self.prints = prints
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
        """Seconds since the start, with the seconds of interrupted processes before."""
        return time.perf_counter() - self.started

    def training(self) -> dict[str, Any]:
        """Entries of the result: processes, restarts, throughput, memory, and epochs; none without training."""
        if not self.epochs:
            return {}
        return {
            "processes": self.processes,
            "restarts": self.restarts,
            "training_images_per_second": self.images / self.busy if self.busy else None,
            "peak_memory_gib": peak_memory(),
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


def peak_memory() -> float:
    """The most memory that this process has used, in GiB: on the GPU if there is one, else in the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, others KiB


class EpochReporter(Callback):
    """Calls a function after each epoch of training."""

    def __init__(self, report: Callable[[], None]) -> None:
        self.report = report

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.report()
