"""Submit the missing runs of a study. Runs of one kind that need the same other runs are one job array."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from tabulate import tabulate

from experiments.slurm import batches, queue
from tokenpool.runs import checks, pool
from tokenpool.runs.data_sets import DATA
from tokenpool.runs.run import WEIGHTS, Run
from tokenpool.runs.study import TIMED, Study
from tokenpool.training.images import HUB, is_downloaded

TEMPLATE = Path(__file__).with_name("template.sh")
_NEEDED = {"array", "command", "job", "output", "results", "runs", "variables"}  # placeholders of a template
_OPTIONAL = {"directory", "processes", "timed", "trains"}


@dataclass(frozen=True)
class Array:
    """Runs that are the tasks of one job array.

    Attributes:
        name: name of the job.
        runs: the runs, in the order of the tasks.
        waits: names of the runs that must finish first.
    """

    name: str
    runs: list[Run]
    waits: tuple[str, ...]


def submit(
    study: Study, wanted: Sequence[Run], patterns: Sequence[str] = (), template: Path = TEMPLATE, dry_run: bool = False
) -> Iterator[str]:
    """Submit runs that are not finished and not in the queue, with the runs that they need.

    Args:
        study: study of the runs.
        wanted: the runs.
        patterns: submit only runs whose names match one of these file name patterns (`finetune-*-level2-*`), and the
            runs that they need. Empty for all runs.
        template: template of the batch script, see `template.sh`.
        dry_run: write the scripts and describe the jobs, but do not submit them. This works without Slurm, too.

    Yields:
        Lines to print.

    Raises:
        ValueError: if runs would fail on the cluster. Nothing is queued then.
        FileNotFoundError: if images, weights, the template or Slurm's commands are missing.
        RuntimeError: if Slurm rejects an array. Arrays that it has already accepted stay in the queue and are stored.
    """
    scripts = study.folder / "slurm" / "scripts"
    with pool.exclusive(study.folder / "slurm"):
        # Read the queue before the results. Otherwise a run that ends in between would be in neither of them.
        known = queue.submitted(study.folder)
        try:
            tasks = queue.tasks()
        except (FileNotFoundError, RuntimeError) as error:
            if not dry_run:
                raise
            tasks = None
            yield f"{error}\nwithout Slurm, the queue is unknown, and the scripts are not tested"
        queued = {run: task for run, task in known.items() if task in (tasks or {})}
        lacking = {run.name: run for run in study.missing(wanted)}
        chosen = _chosen(study, lacking, patterns)
        for run in chosen:
            study.check_finished(run)  # results with another setting must not be overwritten
        new = [run for run in chosen if run.name not in queued]
        found = arrays(study, new, lacking, queue.longest_array())
        yield f"{len(new)} runs to submit, {len(chosen) - len(new)} in the queue already"
        if not new:
            return
        checks.check_data(new)
        checks.check_weights(new)
        _write(found, study, template, scripts)
        yield describe(found, study)
        if tasks is not None:
            for array in found:
                _test(_script(array, scripts), template)
        if dry_run:
            yield f"nothing was submitted; the scripts are in {scripts}"
            return
        for array in found:
            names = [run.name for run in array.runs]
            with _signals_blocked():  # an array that is queued but not stored would be queued again
                job = _submit(array, _script(array, scripts), queued)
                queue.remember(names, job, study.folder)
            queued |= {name: f"{job}_{index}" for index, name in enumerate(names)}
            yield f"submitted {array.name} as job {job}"


def arrays(study: Study, runs: Sequence[Run], lacking: dict[str, Run], longest: int) -> list[Array]:
    """Group runs into job arrays. Each array comes after the arrays that it waits for.

    Args:
        study: study of the runs.
        runs: the runs. Each run comes after the runs that it needs.
        lacking: all runs that are not finished, by name.
        longest: maximum number of tasks of an array.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        waits = tuple(other.name for other in study.awaited(run) if other.name in lacking)
        groups.setdefault((run.stage, run.variant, waits), []).append(run)
    found: list[Array] = []
    numbers: dict[str, int] = {}
    for (stage, variant, waits), members in groups.items():
        kind = "-".join(filter(None, [study.preset.name, stage, variant]))
        for first in range(0, len(members), longest):
            numbers[kind] = numbers.get(kind, 0) + 1
            found.append(Array(f"{kind}-{numbers[kind]}", members[first : first + longest], waits))
    return found


def render(array: Array, study: Study, template: Path) -> str:
    """Return the batch script of an array.

    Raises:
        FileNotFoundError: if there is no such template.
        ValueError: if the template is not valid, lacks a placeholder, or has an unknown placeholder.
    """
    if not template.is_file():
        raise FileNotFoundError(f"no template {template}")
    # Bash also uses {#, for example in ${#RUNS[@]}.
    jinja = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",
        comment_end_string="##}",
    )
    jinja.filters["quote"] = lambda value: shlex.quote(str(value))
    text = template.read_text()
    try:
        used = jinja2.meta.find_undeclared_variables(jinja.parse(text))
        if used - _NEEDED - _OPTIONAL:
            known = ", ".join(sorted(_NEEDED | _OPTIONAL))
            raise ValueError(f"template {template}: unknown {_listed(used - _NEEDED - _OPTIONAL)}; known are {known}")
        if _NEEDED - used:
            raise ValueError(f"template {template} lacks {_listed(_NEEDED - used)}; start from a copy of {TEMPLATE}")
        return jinja.from_string(text).render(_values(array, study))
    except jinja2.TemplateError as error:
        raise ValueError(f"template {template}: {error}") from error


def describe(found: Sequence[Array], study: Study) -> str:
    """Return the job arrays as a table: numbers of runs, hours, and dependencies."""
    hours = [study.seconds(array.runs) / 3600 for array in found]
    rows = [
        [array.name, len(array.runs), f"{used:.1f}", ", ".join(array.waits) or "-"]
        for array, used in zip(found, hours, strict=True)
    ]
    rows.append([f"{len(found)} in all", sum(len(array.runs) for array in found), f"{sum(hours):.1f}", ""])
    unit = "GPU-hours" if study.preset.trainer_options else "core-hours"
    header = ["job array", "runs", unit, "each task waits for"]
    return (
        tabulate(rows, header, disable_numparse=True, colalign=("left", "right", "right", "left"))
        + f"\n\n{unit}: estimated from finished runs of this folder, or else from the preset;\n"
        "downsampled models are counted like plain models\n"
    )


def _values(array: Array, study: Study) -> dict[str, Any]:
    """Return the values of the placeholders of a template."""
    folder = study.folder.resolve()
    command = [sys.executable, "-m", "experiments", "run", "--preset", study.preset.argument, "--results", str(folder)]
    trains = any(run.recipe.epochs for run in array.runs)
    paths = {name: os.environ.get(name) for name in (DATA, WEIGHTS)}
    return {
        "job": array.name,
        "array": f"0-{len(array.runs) - 1}",
        "directory": Path.cwd(),
        "output": str(folder / "slurm" / "logs").replace("%", "%%") + "/%x-%A_%a.out",
        "runs": [run.name for run in array.runs],
        "results": folder,
        "command": shlex.join(command if study.full else [*command, "--quick"]),
        "variables": {name: _absolute(path) for name, path in paths.items() if path},
        "trains": trains,
        "processes": study.preset.processes if trains else 1,
        "timed": array.runs[0].stage in TIMED,
    }


def _absolute(path: str) -> str:
    """Return the absolute path of a file or folder, also after "hf:". Names of data sets do not change."""
    if is_downloaded(path):
        return path
    hub = HUB if path.startswith(HUB) else ""
    place = Path(path.removeprefix(hub)).expanduser()
    return path if hub and not place.exists() else f"{hub}{place.resolve()}"


def _chosen(study: Study, lacking: dict[str, Run], patterns: Sequence[str]) -> list[Run]:
    """Return the lacking runs that match a pattern, and the runs that they need. Needed runs come first."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in lacking):
            raise ValueError(f"--only {pattern} matches no missing run: list them by --dry-run without --only")
    matching = [
        run for name, run in lacking.items() if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    needed = {run.name for run in study.with_awaited(matching)}
    return [run for name, run in lacking.items() if name in needed]


def _write(found: Sequence[Array], study: Study, template: Path, folder: Path) -> None:
    """Write the scripts and delete earlier ones. Slurm has its own copies of submitted scripts."""
    (study.folder / "slurm" / "logs").mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for array in found:
        script = render(array, study, template)
        batches.check_batches(array.runs, script, template)
        _script(array, folder).write_text(script)


def _script(array: Array, folder: Path) -> Path:
    return folder / f"{array.name}.sh"


def _test(script: Path, template: Path) -> None:
    try:
        queue.call("sbatch", "--test-only", str(script))
    except RuntimeError as error:
        raise RuntimeError(f"Slurm rejects {script}, which was created from {template}: {error}") from error


def _submit(array: Array, script: Path, queued: dict[str, str]) -> str:
    """Submit an array and return the id of its job."""
    after = [f"--dependency=afterok:{':'.join(queued[name] for name in array.waits)}"] if array.waits else []
    return queue.call("sbatch", "--parsable", *after, str(script)).strip().partition(";")[0]


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals that would end this process, until the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listed(names: set[str]) -> str:
    return ", ".join(f"{{{{ {name} }}}}" for name in sorted(names))
