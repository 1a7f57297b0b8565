"""Commands that show finished runs: `table`, `figure` and `report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from experiments import artifacts, presets
from experiments.artifacts import Artifact
from experiments.commands.choice import artifacts_of, study_of
from experiments.options import PRESETS, Data, LogTo, Missing, Output, Quick, Results, RunMissing, Weights
from experiments.show import report as page
from tokenpool.analysis import plotting
from tokenpool.commands.options import Jobs, cores
from tokenpool.runs import pool
from tokenpool.runs.data_sets import data_set
from tokenpool.runs.durations import duration
from tokenpool.runs.run import Run
from tokenpool.runs.study import Study
from tokenpool.tools import sections


def table(
    name: Annotated[str, typer.Argument(help="claims, 1 to 5, off_the_shelf, rivals, or all.")],
    preset: Annotated[
        str | None, typer.Option(help=PRESETS + " Default: digits; for claims all that have results.")
    ] = None,
    results: Results = None,
    quick: Quick = False,
    output: Output = Path("runs/paper"),
    missing: Missing = False,
    run: RunMissing = False,
    jobs: Jobs = 0,
    data: Data = None,
    weights: Weights = None,
    logger: LogTo = None,
) -> None:
    """Print a table of the paper and write it as Markdown, LaTeX and CSV: as printed, and from the runs of a preset."""
    chosen = artifacts_of("table", name)
    if preset is None and results is None and not (quick or missing or run) and all(one.joint for one in chosen):
        _show_joint(chosen, output)
        return
    study = study_of(preset or presets.DEFAULT, results, quick, data, weights)
    _show(study, chosen, output, missing, run, jobs)


def figure(
    name: Annotated[str, typer.Argument(help="1b, 1c, 2, 3a, ... 12, reconstruction, redundancy, or all.")],
    preset: Annotated[str, typer.Option(help=PRESETS)] = presets.DEFAULT,
    results: Results = None,
    quick: Quick = False,
    output: Output = Path("runs/paper"),
    missing: Missing = False,
    run: RunMissing = False,
    jobs: Jobs = 0,
    data: Data = None,
    weights: Weights = None,
    logger: LogTo = None,
) -> None:
    """Draw a figure of the paper as PNG and PDF: from its printed numbers, and from the runs of a preset."""
    study = study_of(preset, results, quick, data, weights)
    _show(study, artifacts_of("figure", name), output, missing, run, jobs)


def report(
    preset: Annotated[
        list[str] | None, typer.Option(help=PRESETS + " Repeatable; default: all that have results.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder with one folder of results a preset. Default: results.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Of the quick study of `make reproduce`, in runs/.")] = False,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("runs/report.html"),
) -> None:
    """Write all tables and figures, and what each was made from, on one page of HTML."""
    folder = results or Path("runs" if quick else "results")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder of results")
    names = preset or [name for name in presets.NAMES if (folder / name).is_dir()] or presets.NAMES[:1]
    studies = [Study(presets.get(name), folder / name, full=not quick) for name in names]
    print(f"page: {page.write(studies, output)}")


def _show(study: Study, chosen: Sequence[Artifact], output: Path, missing: bool, run: bool, jobs: int) -> None:
    """List the missing runs, or write the tables or figures. With `run`, make the missing runs first."""
    jobs = jobs or min(cores(), 8)
    present = [artifact for artifact in chosen if artifacts.status(study, artifact.key)[0] != "none"]
    if len(chosen) == 1 and not present and (missing or run):
        raise ValueError(f"{chosen[0].key} is not part of preset {study.preset.name}")
    wanted = list({run.name: run for artifact in present for run in artifact.runs(study)}.values())
    if missing:
        print("\n".join(_missing_lines(study, wanted, jobs)) or "nothing is missing")
        return
    if run and study.missing(wanted):
        with pool.exclusive(study.folder):
            pool.make(study, wanted, jobs)
        study = Study(study.preset, study.folder, study.full)
    written = [_write(study, artifact, output / study.preset.name) for artifact in chosen]
    if not any(written):
        names = ", ".join(artifact.name for artifact in chosen)
        again = "; add --run to make them" if present else ""
        raise ValueError(f"none of the runs of {chosen[0].kind} {names} is in {study.folder}{again}")


def _write(study: Study, artifact: Artifact, folder: Path) -> list[Path]:
    """Write a table or figure, and print it or its files and what it was made from; returns the files."""
    state, text = artifacts.status(study, artifact.key)
    if artifact.kind == "table":
        written = _write_table([study], artifact, folder)
    else:
        picture = artifacts.draw(study, artifact.name)
        written = plotting.save(picture, folder / f"figure-{artifact.name}") if picture else []
    print(f"{artifact.key} ({text}): {', '.join(map(str, written)) or 'nothing to show'}")
    if origin := study.made_from(artifact.runs(study)):
        print(f"    from {study.folder}: {origin}")
    if state in ("partial", "missing"):
        print(f"    the runs that it lacks: {study.command(artifact.key, '--missing')}")
    return written


def _write_table(studies: Sequence[Study], artifact: Artifact, folder: Path) -> list[Path]:
    parts = artifacts.sections(studies, artifact.name)
    print("".join(f"{part.markdown()}\n\n" for part in parts), end="")
    return sections.write(parts, artifact.name, folder)


def _show_joint(chosen: Sequence[Artifact], output: Path) -> None:
    """Tables of several studies, from all shipped results, those on natural images first."""
    found = [presets.get(name) for name in presets.NAMES if (Path("results") / name).is_dir()]
    found.sort(key=lambda preset: (not data_set(preset.data).must_be_named, not preset.trains))
    studies = [Study(preset, Path("results") / preset.name, named=False) for preset in found]
    for artifact in chosen:
        written = _write_table(studies, artifact, output)
        if not written:
            raise ValueError(
                "no results of a preset are in results/: choose one by --preset, and its runs by --results"
            )
        print(f"{artifact.key}: {', '.join(map(str, written))}")
        for study in studies:
            print(f"    from {study.folder}: {artifacts.status(study, artifact.key)[1]}")


def _missing_lines(study: Study, runs: Sequence[Run], jobs: int) -> list[str]:
    lacking = study.missing(runs)
    lines = [f"{run.name}: about {study.seconds([run]):.0f} s" for run in lacking]
    if lacking:
        text = duration(study.seconds(lacking) / jobs)
        lines.append(f"{len(lacking)} runs are missing, about {text} in {jobs} processes; --run makes them")
    return lines
