"""Read Slurm's queue, and store which run is which job."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenpool import files

# States of jobs that have ended. squeue still shows such jobs for some minutes. All other jobs are in the queue.
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
        state: state in squeue: PENDING, RUNNING, ...
        reason: reason why the task is pending.
        nodes: nodes that the task runs on.
    """

    state: str
    reason: str
    nodes: str


def call(*command: str) -> str:
    """Run a Slurm command, and return its output.

    Raises:
        FileNotFoundError: if the command is not installed.
        RuntimeError: if the command fails. The message is Slurm's message.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{command[0]} not found: run this on a machine with Slurm's commands") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).replace("\n", "; ")
        raise RuntimeError(f"{command[0]} failed (exit code {done.returncode}): {said}")
    return done.stdout


def tasks() -> dict[str, Task]:
    """Return the user's array tasks in the queue, by their Slurm name, such as "17_3"."""
    lines = call("squeue", "-h", "-r", "-t", "all", "-u", str(os.getuid()), "-o", "%i|%T|%r|%N").splitlines()
    found = {}
    for line in lines:
        job, state, reason, nodes = line.split("|", 3)
        if state not in _OVER:
            found[job] = Task(state, reason, nodes)
    return found


def longest_array() -> int:
    """Return the maximum number of tasks of a job array on this cluster."""
    try:
        settings = call("scontrol", "show", "config").splitlines()
    except (FileNotFoundError, RuntimeError):
        settings = []
    values = [line.partition("=")[2] for line in settings if line.startswith("MaxArraySize")]
    return max(1, int(values[0])) if values else 1001  # Slurm's default


def submitted(folder: Path) -> dict[str, str]:
    """Return the Slurm name of the last task of each run, by name of the run.

    Raises:
        ValueError: if the file with this information is broken. The message names the file.
    """
    path = _record(folder)
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not a JSON file ({error}): delete it when no run of this folder is in the queue"
        ) from error


def remember(runs: Sequence[str], job: str, folder: Path) -> None:
    """Store that the runs are the tasks 0, 1, ... of a job. The file is written atomically."""
    known = submitted(folder) | {run: f"{job}_{index}" for index, run in enumerate(runs)}
    path = _record(folder)
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n")


def _record(folder: Path) -> Path:
    return folder / "slurm" / "jobs.json"
