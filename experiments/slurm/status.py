"""The progress of a study on the cluster."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from experiments.slurm import queue
from tokenpool.runs.run import Run
from tokenpool.runs.study import Study

STATES = ("done", "running", "queued", "failed", "unknown", "missing")
_FIRST = {"base": 0, "search": 1, "finetune": 2}


@dataclass(frozen=True)
class Progress:
    """The state of one run.

    Attributes:
        run: the run.
        state: one of `STATES`. "unknown" means that the run was submitted, but Slurm's commands are not available.
        job: Slurm name of the last task of the run. Empty if the run was never submitted.
        note: reason why the run is queued, or the nodes that it runs on.
    """

    run: Run
    state: str
    job: str = ""
    note: str = ""


def progress(study: Study, wanted: Sequence[Run], tasks: dict[str, queue.Task] | None) -> list[Progress]:
    """Return the state of runs, and of all runs that they need.

    Args:
        study: study of the runs.
        wanted: the runs.
        tasks: tasks in the queue, see `queue.tasks`, read before this call. None if they are unknown.
    """
    jobs = queue.submitted(study.folder)
    lacking = {run.name for run in study.missing(wanted)}
    return [_progress(study, run, jobs.get(run.name, ""), tasks, lacking) for run in study.with_awaited(wanted)]


def show(study: Study, wanted: Sequence[Run], long: bool = False) -> Iterator[str]:
    """Yield lines on the progress of runs: counts by stage, running runs, reasons for waiting, and errors.

    Args:
        study: study of the runs.
        wanted: the runs.
        long: list every run.
    """
    try:
        tasks = queue.tasks()
    except (FileNotFoundError, RuntimeError) as error:
        tasks = None
        yield f"{error}\nwithout Slurm, the state of submitted runs is unknown\n"
    found = progress(study, wanted, tasks)
    states = [state for state in STATES if state != "unknown" or any(one.state == state for one in found)]
    counts = Counter((one.run.stage, one.state) for one in found)
    stages = sorted({one.run.stage for one in found}, key=lambda stage: (_FIRST.get(stage, 3), stage))
    rows = [[stage, *(counts[stage, state] for state in states)] for stage in stages]
    rows.append(["all", *(sum(counts[stage, state] for stage in stages) for state in states)])
    yield f"{study.preset.name} in {study.folder}\n"
    yield tabulate(rows, ["", *states]) + "\n"
    logs = study.folder / "slurm" / "logs"
    for one in found:
        if one.state == "running":
            yield f"running {one.run.name}, job {one.job} on {one.note}"
            yield from (f"    {line}" for line in _last_lines(logs / f"{one.run.name}.log", 1))
    if not long:
        notes = Counter(one.note for one in found if one.state == "queued")
        yield from (f"queued {count} run{'s' * (count > 1)}: {note}" for note, count in notes.items())
    for one in found:
        if one.state == "failed":
            yield f"failed {one.run.name}, job {one.job}"
            yield from (f"    {line}" for line in _said(one, logs))
    if long:
        rest = [one for one in found if one.state not in ("running", "failed")]
        yield from (", ".join(filter(None, [f"{one.state} {one.run.name}", one.note])) for one in rest)


def _progress(study: Study, run: Run, job: str, tasks: dict[str, queue.Task] | None, lacking: set[str]) -> Progress:
    if run.name not in lacking:
        return Progress(run, "done", job)
    if not job:
        return Progress(run, "missing")
    if tasks is None:
        return Progress(run, "unknown", job)
    if job not in tasks:
        return Progress(run, "failed", job)
    task = tasks[job]
    if task.state != "PENDING":
        return Progress(run, "running", job, task.nodes)
    waits = [other.name for other in study.awaited(run) if other.name in lacking]
    return Progress(run, "queued", job, f"waits for {', '.join(waits)}" if waits else task.reason)


def _said(one: Progress, logs: Path) -> list[str]:
    """Return the last lines of a failed run's log, and Slurm's messages on it."""
    lines = _last_lines(logs / f"{one.run.name}.log", 5)
    for path in logs.glob(f"*-{one.job}.out"):
        lines += _last_lines(path, 5)
    return lines or ["it never started: it was cancelled, or a run that it needs has failed"]


def _last_lines(path: Path, count: int) -> list[str]:
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 10_000))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]  # progress bars contain carriage returns
    # Skip srun's messages on other tasks, which follow the error of the first task.
    return [line for line in lines if line and not line.startswith(("srun:", "slurmstepd"))][-count:]
