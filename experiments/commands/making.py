"""Commands that make the runs of a study: here, on Slurm, or one of them."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from lightning.pytorch.utilities import rank_zero_only

from experiments import artifacts, needed, presets
from experiments.commands.choice import runs_of, study_of
from experiments.options import PRESETS, Data, FigureRuns, LogTo, Quick, Results, TableRuns, Weights
from experiments.show import curves, tables
from experiments.slurm import status as slurm_status
from experiments.slurm import submit as slurm_submit
from tokenpool.commands.options import Jobs, cores
from tokenpool.runs import execute, pool
from tokenpool.runs.study import Study


def reproduce(
    preset: Annotated[str, typer.Option(help=PRESETS)] = presets.DEFAULT,
    full: Annotated[bool, typer.Option("--full", help="All methods, more schedules, several seeds.")] = False,
    jobs: Jobs = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for results. Default: runs/<preset>[-full].")] = None,
    data: Data = None,
    weights: Weights = None,
    logger: LogTo = None,
) -> None:
    """Run the protocol of section 5: base model, search for schedules, fine-tuning. Ends with a table and a picture.

    Finished runs are skipped and interrupted ones go on: start the same command again after an interruption.
    """
    study = study_of(preset, output, not full, data, weights, shipped=False)
    folder = study.folder
    needed.protocol_runs(study)  # refuses a preset that trains nothing
    with pool.exclusive(folder):
        pool.make(study, artifacts.everything(study), jobs or min(cores(), 8))
        study = Study(study.preset, folder, full)
        frame = study.points(needed.protocol_runs(study))
        table = tables.cost_accuracy(frame)
        text = tables.markdown(table)
        paired = tables.differences(frame)
        if len(paired):
            text += "\n\nPaired by seed and schedule, mean over schedules, error over seeds:\n\n"
            text += tables.differences_markdown(paired)
        (folder / "table.md").write_text(text + "\n")
        pictures = curves.pareto_picture(table, folder / "pareto")
    print(text)
    print(f"\nTable: {folder / 'table.md'}\nPicture: {' and '.join(map(str, pictures))}")


def run(
    name: Annotated[str, typer.Argument(help="Of the run, such as finetune-wkmedoids-level0-seed0.")],
    preset: Annotated[str, typer.Option(help=PRESETS)] = presets.DEFAULT,
    results: Results = None,
    quick: Quick = False,
    data: Data = None,
    weights: Weights = None,
    logger: LogTo = None,
) -> None:
    """Make one run of a preset, as each task of a job array does. Goes on where an interrupted run stopped."""
    study = study_of(preset, results, quick, data, weights)
    found = [run for run in study.with_awaited(artifacts.everything(study)) if run.name == name]
    if not found:
        raise ValueError(f"preset {preset} has no run {name!r}; `submit --all --dry-run` writes scripts that name all")
    with pool.exclusive_run(name, study.folder):
        chosen = study.prepared(found[0])
        if chosen is None:
            print(f"{name} is finished already")
            return
        progress = sys.stderr.isatty()
        if not progress:
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # a log has no room for advice
        outcome = execute.execute(chosen, study.folder, progress=progress)
    if rank_zero_only.rank == 0:
        print(f"{name}: {pool.summary(outcome)}")


def submit(
    preset: Annotated[str, typer.Option(help=PRESETS)] = presets.DEFAULT,
    figure: FigureRuns = None,
    table: TableRuns = None,
    everything: Annotated[bool, typer.Option("--all", help="The runs of all figures and tables.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help='Only runs of such names, such as "finetune-*-level2-*", and what they need. Repeatable.'),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the scripts, and say what would be queued.")
    ] = False,
    template: Annotated[
        Path | None, typer.Option(help="Of the batch scripts: an edited copy of experiments/slurm/template.sh.")
    ] = None,
    results: Results = None,
    quick: Quick = False,
    data: Data = None,
    weights: Weights = None,
) -> None:
    """Submit the missing runs to Slurm, as job arrays that wait for each other.

    What is finished or in the queue is left alone: submit again after failures.
    """
    study = study_of(preset, results, quick, data, weights)
    if (figure is not None) + (table is not None) + everything != 1:
        raise ValueError("submit needs one of --figure NAME, --table NAME and --all")
    wanted = runs_of(study, figure, table)
    for line in slurm_submit.submit(study, wanted, only or [], template or slurm_submit.TEMPLATE, dry_run):
        print(line, flush=True)


def status(
    preset: Annotated[str, typer.Option(help=PRESETS)] = presets.DEFAULT,
    figure: FigureRuns = None,
    table: TableRuns = None,
    everything: Annotated[bool, typer.Option("--all", help="The runs of all figures and tables: the default.")] = False,
    long: Annotated[bool, typer.Option("--long", help="Name every run.")] = False,
    results: Results = None,
    quick: Quick = False,
) -> None:
    """Say which of the runs submitted to Slurm are done, running, queued, failed and missing."""
    if (figure is not None) + (table is not None) + everything > 1:
        raise ValueError("status takes one of --figure NAME, --table NAME and --all")
    submitted = Path("runs") / f"{presets.get(preset).name}-full"
    if results is None and not quick and submitted.is_dir():
        results = submitted
    study = study_of(preset, results, quick)
    for line in slurm_status.show(study, runs_of(study, figure, table), long):
        print(line)
