"""Training with interruptions: checkpoints within an epoch, stops by signals, and requeued Slurm jobs."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from tokenpool import files
from tokenpool.moved import old_names

MAX_WAIT_MINUTES = 30  # maximum time that a preempted job waits to be killed
SAVE, STOP, REQUEUE = 1, 2, 3  # requests of a process at the end of a batch; the highest request of all processes wins

__getattr__ = old_names(__name__)


class Interrupted(Exception):
    """Raised when a signal has stopped training. The state is saved.

    Attributes:
        requeued: whether Slurm will start the job again.
    """

    def __init__(self, message: str, requeued: bool) -> None:
        super().__init__(message)
        self.requeued = requeued


_REQUESTS = {signal.SIGTERM: STOP, signal.SIGUSR1: REQUEUE}


class Signals:
    """The request of the signals received so far, and the handlers of signals.

    Attributes:
        request: 0, STOP or REQUEUE.
    """

    def __init__(self) -> None:
        self.request = 0
        self._before: dict[int, Any] = {}

    def use_default_handlers(self) -> None:
        """Let SIGTERM and Ctrl-C end this process immediately, until `record_all` is called.

        While a process waits in PyTorch for other processes, Python does not run signal handlers, so the process would
        not end.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores a signal, and & in a script, too
                self._set_handler(number, signal.SIG_DFL)

    def record_all(self) -> None:
        """Record SIGTERM and SIGUSR1 from now on, and restore the handler of Ctrl-C."""
        for number in _REQUESTS:
            self._set_handler(number, self._record)
        if signal.SIGINT in self._before:
            self._set_handler(signal.SIGINT, self._before[signal.SIGINT])

    def restore_handlers(self) -> None:
        """Restore all original handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: Any) -> None:
        self.request = max(self.request, _REQUESTS[signal.Signals(number)])

    def _set_handler(self, number: int, handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python cannot set handlers in other threads
            before = signal.signal(number, handler)
            self._before.setdefault(number, before)


@contextmanager
def recorded_signals() -> Iterator[Signals]:
    """Record SIGUSR1 (stop and requeue), and SIGTERM (stop) after training has started, until the block ends.

    Before training starts, SIGTERM ends the process as usual. `InterruptibleCheckpoint` calls `Signals.record_all` at
    the start of training.

    Signals are only recorded, because a handler that saves immediately, such as Lightning's, can hang: one process may
    be inside a collective operation, and another one before it. Outside the main thread Python cannot set handlers, so
    no signal is recorded.

    Yields:
        The recorded signals.
    """
    signals = Signals()
    signals._set_handler(signal.SIGUSR1, signals._record)
    # A parent process may have blocked these signals so that they do not kill this process before this line.
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, _REQUESTS)
    try:
        yield signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signals.restore_handlers()


class InterruptibleCheckpoint(Checkpoint):
    """Save the state of training after each epoch, at regular times, and when a signal requests a stop.

    All processes agree at the end of a batch, save together, and stop together. After SIGUSR1 under Slurm
    (`sbatch --signal=USR1@300` sends it before the time limit), the first process requeues the job. With the data
    modules of this package, training then continues at the next batch, and the final weights are the same as without an
    interruption.

    Slurm sends SIGTERM both for preempted and for cancelled jobs. The process cannot distinguish them, so it saves the
    state and waits until Slurm requeues or ends the job.

    Args:
        path: path of the file. Each save replaces the file atomically (see `AtomicCheckpointIO`).
        signals: result of `recorded_signals`.
        minutes: minutes between saves within an epoch.

    Raises:
        Interrupted: in `trainer.fit` and `trainer.test`, if training has stopped.
        RuntimeError: if Slurm does not requeue the job. The state is saved.
        FloatingPointError: if weights are not finite. The file is not changed.
    """

    def __init__(self, path: str | Path, signals: Signals, minutes: float = 10.0) -> None:
        self.path = Path(path)
        self.signals = signals
        self.minutes = minutes
        self._saved = time.monotonic()
        self._test_batches = 0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._saved = time.monotonic()
        self.signals.record_all()  # all other processes have started

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # Replace Lightning's handler of SIGTERM, which waits for other processes inside the handler.
        self.signals.record_all()

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.signals.record_all()
        # Processes can have different numbers of batches. They can agree only while all processes have a batch.
        batches = torch.tensor(sum(trainer.num_test_batches), device=trainer.strategy.root_device)
        self._test_batches = int(trainer.strategy.reduce(batches, reduce_op="min"))
        self._stop_if_requested(trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx < self._test_batches:
            self._stop_if_requested(trainer)  # the state of training was saved at the end of its last epoch

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # wait for the end of the epoch or of the optimiser step
        request = self._agreed_request(trainer)
        if request:
            self._save(trainer)
            self._stop(trainer, request)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer)
        self._stop_if_requested(trainer)

    def _agreed_request(self, trainer: Trainer) -> int:
        """Return the highest request of all processes."""
        due = trainer.is_global_zero and time.monotonic() - self._saved > 60 * self.minutes
        request = self.signals.request or (SAVE if due else 0)
        if trainer.world_size == 1:
            return request
        shared = torch.tensor(request, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(shared, reduce_op="max"))

    def _save(self, trainer: Trainer) -> None:
        if not all(parameter.isfinite().all() for parameter in trainer.lightning_module.parameters()):
            raise FloatingPointError(
                f"the weights are not finite after step {trainer.global_step}: lower the learning rate"
            )
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()

    def _stop_if_requested(self, trainer: Trainer) -> None:
        self._stop(trainer, self._agreed_request(trainer))

    def _stop(self, trainer: Trainer, request: int) -> None:
        """Stop if the request is STOP or REQUEUE. The state must be saved before."""
        if request < STOP:
            return
        job = slurm_job()
        if request == STOP and job is not None:
            self._wait(trainer)
        if request == STOP or job is None:
            raise Interrupted(f"stopped by a signal at step {trainer.global_step}", requeued=False)
        error = _requeue(job) if trainer.is_global_zero else ""
        trainer.strategy.barrier("requeued")
        if error:
            raise RuntimeError(f"Slurm does not requeue job {job} ({error}); its state is saved in {self.path}")
        raise Interrupted(f"stopped at step {trainer.global_step}; Slurm will continue job {job}", requeued=True)

    def _wait(self, trainer: Trainer) -> None:
        """Wait until Slurm kills this process, which it does some time after SIGTERM."""
        if trainer.is_global_zero:
            print(f"stopped at step {trainer.global_step}; waiting for Slurm to requeue or to end the job", flush=True)
        end = time.monotonic() + 60 * MAX_WAIT_MINUTES
        while time.monotonic() < end:
            time.sleep(1)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Plugin of Lightning's Trainer that writes checkpoints atomically on a local or shared disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with files.atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)


def slurm_job() -> str | None:
    """Return the Slurm name of the job or array task of this process, such as "17_3", or None outside Slurm."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID")
    return job if job and re.fullmatch(r"\d+(_\d+)?", job) else None


def _requeue(job: str) -> str:
    """Let Slurm requeue a job. Return its error message, or "" after success."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"scontrol ended with {done.returncode}"
