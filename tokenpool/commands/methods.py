"""The command that compares methods without training: `benchmark-methods`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tokenpool.analysis import plotting
from tokenpool.commands.options import FOLDER_OR_HUB, Jobs, Model, ModelOptions, Pretrained, cores, named_values
from tokenpool.commands.sources import name_sources
from tokenpool.downsampling import METHODS
from tokenpool.runs import pool
from tokenpool.tools import benchmark_methods as benchmark
from tokenpool.tools import benchmarked, sections


def benchmark_methods(
    model: Model,
    data: Annotated[Path, typer.Option(help=FOLDER_OR_HUB + " Only val is needed.")],
    weights: Annotated[Path | None, typer.Option(help="Weights to use instead of timm's download.")] = None,
    pretrained: Pretrained = False,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Budget, as a share of the plain model's cost. Repeatable; default: 0.5, 0.65, 0.8."),
    ] = None,
    gmacs: Annotated[
        list[float] | None,
        typer.Option(help="Instead of --share: budget in 10^9 multiply-adds, with clustering. Repeatable."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: all with a schedule that need no training.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "key_medoids",
    calibrate: Annotated[
        list[str] | None,
        typer.Option(help="Calibrate a schedule of this method for each budget: minutes each. Repeatable, or all."),
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Time the chosen schedules against the plain model.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Use so many images of the folder only; 0: all.")] = 0,
    jobs: Jobs = 0,
    output: Annotated[Path, typer.Option(help="Folder for results, tables and figure.")] = Path(
        "runs/benchmark-methods"
    ),
    model_option: ModelOptions = None,
) -> None:
    """Compare all methods that need no training at the same counted cost: on any model, with any labelled images.

    Each method has a decaying schedule and the form of schedule of its own paper. Half of the images chooses one of
    them, and calibrates another one with --calibrate. The other half confirms. Finished runs are skipped: start the
    same command again after an interruption.
    """
    if not weights and not pretrained:
        raise ValueError("benchmark-methods needs --weights FILE or --pretrained")
    if share and gmacs:
        raise ValueError("--share and --gmacs are two ways to give budgets: give one of them")
    methods = _methods(method, baseline)
    searched = methods if calibrate == ["all"] else _known(calibrate or [])
    for name in searched:
        if name not in methods:
            raise ValueError(f"--calibrate {name} is not among the methods that are compared: add --method {name}")
    name_sources(data, weights)
    study = benchmark.study_of(model, named_values(model_option), gmacs or share or benchmark.SHARES, not gmacs, output)
    planned = benchmark.plan(study, methods, limit)
    for line in planned.skipped:
        print(f"skipped {line}")
    if baseline not in {run.downsampler for run in planned.runs}:
        raise ValueError(f"--baseline {baseline} cannot be run at any of the budgets: choose another baseline")
    processes = jobs or min(cores(), 8)
    with pool.exclusive(output):
        pool.make(study, planned.runs, processes)
        confirming = benchmark.confirmations(planned.runs, study.points(planned.runs))
        searches = benchmark.calibrations([run for run in planned.runs if run.downsampler in searched])
        if searches:
            pool.make(replace(study), searches, processes)
        confirming += benchmark.calibrated(searches, study.points(searches))
        runs = [benchmark.plain_run(study, limit), *confirming, *(benchmark.timings(confirming) if time else [])]
        pool.make(replace(study), runs, processes)  # a new study estimates times from the runs above
        points = study.points(runs)
    parts = benchmarked.sections(points, baseline)
    written = sections.write(parts, "methods", output)
    pictures = plotting.save(benchmarked.figure(points, baseline), output / "methods")
    print("\n\n".join(part.markdown() for part in parts))
    print(f"\nTables and figure: {', '.join(map(str, [*written, *pictures]))}")


def _methods(given: list[str] | None, baseline: str) -> list[str]:
    """The methods to compare, the baseline among them, in the order of the registry."""
    wanted = _known([*(given or []), baseline])
    return [name for name in benchmark.candidates() if not given or name in wanted]


def _known(names: list[str]) -> list[str]:
    known = benchmark.candidates()
    for name in names:
        if name not in known:
            reason = "needs training or has no schedule" if name in METHODS else "is unknown"
            raise ValueError(f"method {name!r} {reason}; choose from {', '.join(known)}")
    return names
