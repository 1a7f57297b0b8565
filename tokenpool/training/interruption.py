"""Training that survives interruption: saved whole in the middle of an epoch, stopped by signals, requeued by Slurm."""

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

MOST_MINUTES = 30  # that a preempted job waits for its end
SAVE, STOP, REQUEUE = 1, 2, 3  # what a process wants at the end of a batch; of different wishes the greatest is done


class Interrupted(Exception):
    """A signal has stopped training. Its state is saved.

    Attributes:
        requeued: whether Slurm will start the job again.
    """

    def __init__(self, message: str, requeued: bool) -> None:
        super().__init__(message)
        self.requeued = requeued


_WISHES = {signal.SIGTERM: STOP, signal.SIGUSR1: REQUEUE}


class Signals:
    """What the signals received so far ask for, and who hears them.

    Attributes:
        wish: 0, STOP or REQUEUE.
    """

    def __init__(self) -> None:
        self.wish = 0
        self._before: dict[int, Any] = {}

    def expose(self) -> None:
        """Let SIGTERM and Ctrl-C end this process at once, until `note_all`.

        While a process waits in PyTorch for the others no handler of Python's is called: it would wait on.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and & in a script have it
                self._handle(number, signal.SIG_DFL)

    def note_all(self) -> None:
        """Note SIGTERM and SIGUSR1 from now on, and let Ctrl-C do what it did."""
        for number in _WISHES:
            self._handle(number, self._note)
        if signal.SIGINT in self._before:
            self._handle(signal.SIGINT, self._before[signal.SIGINT])

    def put_back(self) -> None:
        """Have all handlers as they were."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.wish = max(self.wish, _WISHES[signal.Signals(number)])

    def _handle(self, number: int, handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            before = signal.signal(number, handler)
            self._before.setdefault(number, before)


@contextmanager
def listening() -> Iterator[Signals]:
    """Note SIGUSR1 (stop, and be requeued), and once training has begun SIGTERM (stop), until the block ends.

    Until then SIGTERM ends the process as before. `InterruptibleCheckpoint` says when training has begun.

    Handlers that save at once, as Lightning's do, find one process in the middle of a collective operation and another
    one before it, and hang. Outside of the main thread, where Python sets no handlers, nothing is noted.
    """
    signals = Signals()
    signals._handle(signal.SIGUSR1, signals._note)
    # Whoever has blocked them, so as not to die of them before this, gets them now.
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, _WISHES)
    try:
        yield signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signals.put_back()


class InterruptibleCheckpoint(Checkpoint):
    """Saves the state of training after each epoch, every so many minutes, and when a signal asks to stop.

    All processes agree on it at the end of a batch, save together, and stop together; with SIGUSR1 under Slurm, which
    `sbatch --signal=USR1@300` sends before the time limit, the first one has the job requeued. With the data modules of
    this package training then goes on at the next batch, and ends with the same weights as without an interruption.

    SIGTERM comes from Slurm when it preempts a job and when somebody cancels it. Slurm knows which of the two it is:
    with the state saved, the job waits to be requeued or ended.

    Args:
        path: of the file; each save replaces it, whole (see `WholeCheckpoints`).
        signals: what `listening` yields.
        minutes: between saves in the middle of an epoch.

    Raises:
        Interrupted: in `trainer.fit` and `trainer.test`, when training has stopped.
        RuntimeError: if Slurm refuses to requeue the job; the state is saved.
        FloatingPointError: if weights are not finite; the file stays as it was.
    """

    def __init__(self, path: str | Path, signals: Signals, minutes: float = 10.0) -> None:
        self.path = Path(path)
        self.signals = signals
        self.minutes = minutes
        self._saved = time.monotonic()
        self._test_batches = 0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._saved = time.monotonic()
        self.signals.note_all()  # the other processes, if there are any, are there

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # Lightning's handler of SIGTERM, set since, waits for other processes from within the handler.
        self.signals.note_all()

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.signals.note_all()
        # Processes may have different numbers of batches; they can agree while all of them have one.
        batches = torch.tensor(sum(trainer.num_test_batches), device=trainer.strategy.root_device)
        self._test_batches = int(trainer.strategy.reduce(batches, reduce_op="min"))
        self._stop_if_asked(trainer)

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
            self._stop_if_asked(trainer)  # training, if there was any, is saved since its last epoch's end

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # until the epoch's end, or the step's
        wish = self._agreed(trainer)
        if wish:
            self._save(trainer)
            self._stop(trainer, wish)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer)
        self._stop_if_asked(trainer)

    def _agreed(self, trainer: Trainer) -> int:
        """The greatest of the processes' wishes, the same in all of them."""
        due = trainer.is_global_zero and time.monotonic() - self._saved > 60 * self.minutes
        wish = self.signals.wish or (SAVE if due else 0)
        if trainer.world_size == 1:
            return wish
        shared = torch.tensor(wish, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(shared, reduce_op="max"))

    def _save(self, trainer: Trainer) -> None:
        if not all(parameter.isfinite().all() for parameter in trainer.lightning_module.parameters()):
            raise FloatingPointError(f"the weights are not finite after step {trainer.global_step}")
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()

    def _stop_if_asked(self, trainer: Trainer) -> None:
        self._stop(trainer, self._agreed(trainer))

    def _stop(self, trainer: Trainer, wish: int) -> None:
        """Stop if the wish is to; with the state saved."""
        if wish < STOP:
            return
        job = slurm_job()
        if wish == STOP and job is not None:
            self._wait(trainer)
        if wish == STOP or job is None:
            raise Interrupted(f"stopped by a signal at step {trainer.global_step}", requeued=False)
        error = _requeue(job) if trainer.is_global_zero else ""
        trainer.strategy.barrier("requeued")
        if error:
            raise RuntimeError(f"Slurm does not requeue job {job} ({error}); its state is saved in {self.path}")
        raise Interrupted(f"stopped at step {trainer.global_step}; Slurm will go on with job {job}", requeued=True)

    def _wait(self, trainer: Trainer) -> None:
        """For Slurm to kill this process, as it does some time after its SIGTERM."""
        if trainer.is_global_zero:
            print(f"stopped at step {trainer.global_step}; waiting for Slurm to requeue or to end the job", flush=True)
        end = time.monotonic() + 60 * MOST_MINUTES
        while time.monotonic() < end:
            time.sleep(1)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints on a local or shared disk that are there whole or not at all, to be given to Lightning's Trainer."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with files.whole(path) as temporary:
            torch.save(checkpoint, temporary)


def slurm_job() -> str | None:
    """The name by which Slurm requeues the job or array task that this process is part of; None outside of Slurm."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID")
    return job if job and re.fullmatch(r"\d+(_\d+)?", job) else None


def _requeue(job: str) -> str:
    """Have Slurm requeue a job; what it says if it does not."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"scontrol ended with {done.returncode}"
