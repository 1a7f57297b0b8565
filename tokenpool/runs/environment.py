"""What a result was made with: versions, commit and machine."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tokenpool
from tokenpool.training.interruption import slurm_job

COMMIT = "TOKENPOOL_COMMIT"  # for copies of the code without its history, as in containers


def environment() -> dict[str, Any]:
    """Versions, commit, machine and threads, as JSON values; and the Slurm job, if this process is part of one."""
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
    """Name of the CPU's model on Linux; elsewhere what Python knows of it, or None."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or None


@cache  # the commit of the code that is running, even if a newer one is committed meanwhile
def commit() -> str | None:
    """The commit of this code, "-dirty" if it has changed since; away from a clone $TOKENPOOL_COMMIT, or None.

    New results and figures in `results` do not count as changes. An installed package may lie in the repository of
    another project, whose commit says nothing of this code.
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != Path(__file__).resolve().parents[2]:
            return os.environ.get(COMMIT)
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)results")
        return _git("describe", "--always", "--abbrev=12") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
