"""Many runs at once in several processes, with one progress bar."""

import errno
import fcntl
import logging
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from tokenpool.downsampling import METHODS
from tokenpool.runs import checks, execute
from tokenpool.runs.durations import duration
from tokenpool.runs.run import Run
from tokenpool.runs.study import TIMED, Study

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems say that have none
_finished_epochs = None  # in a worker, the queue for the names of runs that have finished an epoch


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock the folder, so that no second study writes into it.

    Raises:
        RuntimeError: if another process holds it.
    """
    refusal = f"another study is writing to {folder}; wait for it, or choose another folder"
    with _locked(folder / ".lock", refusal):
        yield


@contextmanager
def exclusive_run(name: str, folder: Path) -> Iterator[None]:
    """Lock one run of the folder, so that no second process makes it. Other runs can be made in the meantime.

    Raises:
        RuntimeError: if another process holds it.
    """
    path = folder / "checkpoints" / f".{name}.lock"
    with _locked(path, f"another process is making run {name}; if there is none, its machine died: delete {path}"):
        yield


@contextmanager
def _locked(path: Path, refusal: str) -> Iterator[None]:
    """Lock a file. The system unlocks it if this process dies.

    In a distributed training only the first process locks the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if rank_zero_only.rank != 0:
        yield
        return
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(refusal) from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            warnings.warn(f"cannot lock {path} on this file system ({error}); start nothing twice", stacklevel=2)
        yield


def make(study: Study, runs: Sequence[Run], jobs: int) -> None:
    """Make the unfinished ones of the runs, and the runs that they need, in `jobs` processes.

    The runs of the first seed come first, so that a study that is stopped early has all of them.

    Args:
        study: of the runs.
        runs: to make.
        jobs: number of processes.

    Raises:
        FileNotFoundError, ValueError: before anything is trained, if data or weights are missing or wrong.
        RuntimeError: if a run fails; the message names it.
    """
    bases, searches = study.prerequisites(runs)
    for run in [*bases, *searches]:
        study.check_finished(run)
    rest = [run for run in runs if not study.check_finished(run) and run not in bases]
    order = {"base": 0, "search": 1}
    todo = sorted([*bases, *searches, *rest], key=lambda run: (run.seed, order.get(run.stage, 2)))
    seconds = study.seconds(todo)
    trained = sum(run.stage == "base" for run in todo)
    print(
        f"{study.preset.name} in {study.folder}: {trained} base models, {len(searches)} searches for a schedule and "
        f"{len(todo) - trained - len(searches)} other runs to go, about {duration(seconds / jobs)} in "
        f"{jobs} processes",
        flush=True,
    )
    if not todo:
        return
    checks.check_data(todo)
    checks.check_weights(todo)
    execute.prepare_data(todo)
    for run in todo:  # takes each fingerprint once; all processes then find it in the cache
        study.identities.of(run)

    def prepared(run: Run, unfinished: set[str]) -> Run | None:
        """The run with its schedule; None while it waits for another run."""
        if any(other.name in unfinished for other in study.awaited(run)):
            return None
        if run.level is None or run.keep is not None or run.stage == "search":
            return run
        return replace(study).with_schedule(run)  # a new study reads the schedules learned in the meantime

    with Runner(study.folder, jobs, study.durations.of, seconds) as runner:
        runner.run_all([run for run in todo if run.stage not in TIMED], prepared)
        runner.run_all([run for run in todo if run.stage in TIMED], prepared, alone=True)


class Runner:
    """Executes runs in `jobs` processes of one thread each.

    Two processes of one thread are faster than one process of two threads for small models. With one thread, results do
    not depend on the number of jobs.

    Args:
        folder: for results, weights, checkpoints and logs.
        jobs: number of processes.
        seconds: estimate of the time of a run in one process. The progress bar moves by it.
        total: estimate for all runs.
    """

    def __init__(self, folder: Path, jobs: int, seconds: Callable[[Run], float], total: float) -> None:
        self.folder = folder
        self.jobs = jobs
        self.seconds = seconds
        context = multiprocessing.get_context("spawn")
        self.queue = context.SimpleQueue()
        self._shown: dict[str, float] = {}  # how far the bar has moved for a run that is not finished
        parent = os.getpid()
        start = {"initializer": _start_worker, "initargs": (self.queue, parent, _modules_of_methods())}
        self.pool = ProcessPoolExecutor(jobs, context, **start)
        interval = 0.5 if sys.stderr.isatty() else 15
        form = "{l_bar}{bar}| {elapsed} so far, {remaining} left"
        options = {"mininterval": interval, "maxinterval": interval, "dynamic_ncols": True, "bar_format": form}
        self.bar = tqdm(total=total, smoothing=0, **options)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.bar.close()
        if kind is None:
            self.pool.shutdown()
            return
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()  # their runs go on from their last checkpoints next time

    def run_all(
        self, runs: Sequence[Run], prepared: Callable[[Run, set[str]], Run | None], alone: bool = False
    ) -> None:
        """Execute the runs. A free process takes the first run of the list that need not wait.

        The first error ends the study. Finished runs stay finished.

        Args:
            runs: to execute, the most urgent ones first.
            prepared: function of a run and of the names of the unfinished runs. It returns the run to execute, or None
                while the run waits for others.
            alone: one at a time, for runs that measure time.

        Raises:
            RuntimeError: if a run fails; the message names it.
        """
        waiting = list(runs)
        running: dict[Future, Run] = {}
        while waiting or running:
            while len(running) < (1 if alone else self.jobs):
                run = _next(waiting, {run.name for run in [*waiting, *running.values()]}, prepared)
                if run is None:
                    break
                running[self.pool.submit(_execute, run, self.folder)] = run
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            self._show_epochs({run.name: run for run in running.values()})
            for future in done:
                run = running.pop(future)
                try:
                    outcome = future.result()
                except Exception as error:
                    raise RuntimeError(f"run {run.name} failed: {error}") from error
                self._advance(run, self.seconds(run) - self._shown.pop(run.name, 0.0))
                self.bar.write(f"{run.name}: {summary(outcome)}")

    def _show_epochs(self, running: dict[str, Run]) -> None:
        """Move the bar by the epochs that have ended. The test after the last epoch counts as one epoch."""
        while not self.queue.empty():
            run = running[self.queue.get()]
            share = self.seconds(run) / (run.recipe.epochs + 1)
            self._shown[run.name] = self._shown.get(run.name, 0.0) + share
            self._advance(run, share)

    def _advance(self, run: Run, seconds: float) -> None:
        self.bar.update(min(seconds, self.bar.total - self.bar.n))  # sums of floating-point numbers are not exact


def _next(waiting: list[Run], unfinished: set[str], prepared: Callable[[Run, set[str]], Run | None]) -> Run | None:
    """Remove the first run that need not wait from the list; None if all must wait."""
    for index, run in enumerate(waiting):
        ready = prepared(run, unfinished)
        if ready is not None:
            del waiting[index]
            return ready
    return None


def summary(outcome: dict) -> str:
    """The outcome of a run in a few words."""
    metrics = outcome["metrics"]
    found = f"top-1 {metrics['top1']:.1f} %" if "top1" in metrics else "measured"
    doubts = f"; warning: {outcome['warning'].partition('. ')[0]}" if "warning" in outcome else ""
    return f"{found}, {outcome['seconds']:.0f} s{doubts}"


def _execute(run: Run, folder: Path) -> dict:
    with exclusive_run(run.name, folder):
        return execute.execute(run, folder, on_epoch=lambda: _finished_epochs.put(run.name))


def _modules_of_methods() -> list[str]:
    """Modules that a new process imports, so that it knows the methods that users have registered.

    Raises:
        ValueError: for a method whose class is not in a module but, for example, in the file of a preset.
    """
    modules = {}
    for name, method in METHODS.items():
        module = method.__module__ if method is not None else __name__
        if module not in sys.modules or module == "__main__":
            raise ValueError(
                f"method {name!r}: other processes cannot import its class from {module}; move the class and its "
                "register(...) into a module of its own, and import this module in the file of the preset"
            )
        modules[module] = None
    return list(modules)


def _start_worker(queue: object, parent: int, modules: Sequence[str]) -> None:
    global _finished_epochs
    _finished_epochs = queue
    for module in modules:
        import_module(module)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch.jit.*")
    warnings.filterwarnings("ignore", module="lightning.*")


def _die_with(parent: int) -> None:
    """End this process when its parent has ended, even by SIGKILL, so that it does not disturb a new study."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
