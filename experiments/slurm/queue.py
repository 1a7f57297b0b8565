"""What Slurm's queue holds, and which run is which of its jobs."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenpool import files

# States of jobs that are over: squeue goes on to show them for some minutes. All others are in the queue.
_OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Task:
    """One task of a job array that is in the queue.

    Attributes:
        state: as squeue names it: PENDING, RUNNING, ...
        reason: why it is pending.
        nodes: that it runs on.
    """

    state: str
    reason: str
    nodes: str


def call(*command: str) -> str:
    """What one of Slurm's commands prints.

    Raises:
        FileNotFoundError: if it is not installed.
        RuntimeError: if it fails; the message is Slurm's.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{command[0]} not found: run this where Slurm's commands are") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).replace("\n", "; ")
        raise RuntimeError(f"{command[0]} failed (exit code {done.returncode}): {said}")
    return done.stdout


def tasks() -> dict[str, Task]:
    """This user's array tasks that are in the queue, by Slurm's name for them, such as "17_3"."""
    lines = call("squeue", "-h", "-r", "-t", "all", "-u", str(os.getuid()), "-o", "%i|%T|%r|%N").splitlines()
    found = {}
    for line in lines:
        job, state, reason, nodes = line.split("|", 3)
        if state not in _OVER:
            found[job] = Task(state, reason, nodes)
    return found


def longest_array() -> int:
    """How many tasks a job array may have here."""
    try:
        settings = call("scontrol", "show", "config").splitlines()
    except (FileNotFoundError, RuntimeError):
        settings = []
    values = [line.partition("=")[2] for line in settings if line.startswith("MaxArraySize")]
    return max(1, int(values[0])) if values else 1001  # Slurm's default


def submitted(folder: Path) -> dict[str, str]:
    """The task that each run was last submitted as, by the run's name.

    Raises:
        ValueError: if the file that holds it is broken; the message names it.
    """
    path = _record(folder)
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON file ({error}); delete it once none of these runs is in the queue"
        ) from error


def remember(runs: Sequence[str], job: str, folder: Path) -> None:
    """Write down that the runs are the tasks 0, 1, ... of a job, atomically."""
    known = submitted(folder) | {run: f"{job}_{index}" for index, run in enumerate(runs)}
    path = _record(folder)
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n")


def _record(folder: Path) -> Path:
    return folder / "slurm" / "jobs.json"
