"""The command that compares float32 with int8: `benchmark-precisions`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tokenpool.analysis import plotting, results
from tokenpool.commands.options import FOLDER_OR_HUB, Model, ModelOptions, Pretrained, named_values
from tokenpool.runs import timing
from tokenpool.tools import benchmark_precisions as benchmark
from tokenpool.tools import precision_table, sections


def benchmark_precisions(
    model: Model,
    data: Annotated[str, typer.Option(help=FOLDER_OR_HUB + " Only val is needed.")],
    weights: Annotated[Path | None, typer.Option(help="Weights to use instead of timm's download.")] = None,
    pretrained: Pretrained = False,
    method: Annotated[
        list[str] | None, typer.Option(help="A method with a schedule. Repeatable; default: wkmedoids.")
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Budget, as a share of the plain model's cost. Repeatable; default: 0.65."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Instead of --share, or beside it: a schedule, as of export. Repeatable.")
    ] = None,
    carry: Annotated[bool, typer.Option(help="Carry token sizes into the attention (appendix E).")] = True,
    calibration: Annotated[int, typer.Option(min=1, help="Number of images that calibrate int8.")] = 64,
    limit: Annotated[int, typer.Option(min=0, help="Use so many images of the folder only; 0: all.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 32,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="Of the CPU; 0: as PyTorch chooses.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Times that are taken of each model.")] = 7,
    output: Annotated[Path, typer.Option(help="Folder for results, table and figure.")] = Path(
        "runs/benchmark-precisions"
    ),
    model_option: ModelOptions = None,
) -> None:
    """Quantise the plain model and pooled models to int8: accuracy, size and time in ONNX Runtime.

    Half of the images calibrates int8, the other half measures. One JSON file for each model and precision: start the
    same command again after an interruption.
    """
    if not weights and not pretrained:
        raise ValueError("benchmark-precisions needs --weights FILE or --pretrained")
    source = benchmark.Source(
        model=model,
        data=data,
        weights=weights,
        limit=limit,
        calibration=calibration,
        batch_size=batch_size,
        repeats=repeats,
        carry=carry,
        model_options=named_values(model_option),
    )
    chosen = benchmark.settings(source, method or ["wkmedoids"], share or ([] if keep else [0.65]), keep or [])
    with timing.threads(threads), tempfile.TemporaryDirectory() as exports:
        outcomes = benchmark.run(source, chosen, output, Path(exports))
        for setting, outcome in zip(chosen, outcomes, strict=True):
            metrics = outcome["metrics"]
            print(f"{setting.name}: top-1 {metrics['top1']:.1f} %, {metrics['bytes'] / 1e6:.1f} MB", flush=True)
    points = results.load(output)
    names = [setting.name for setting in chosen]
    points = points.set_index("run", drop=False).loc[names].reset_index(drop=True)
    section = precision_table.section(points)
    written = sections.write([section], "precisions", output)
    pictures = plotting.save(precision_table.figure(points), output / "precisions")
    print(f"\n{section.markdown()}\n\nTable and figure: {', '.join(map(str, [*written, *pictures]))}")
