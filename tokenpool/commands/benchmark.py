"""The command that measures time: `throughput`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tokenpool import files
from tokenpool.analysis import plotting
from tokenpool.commands.options import MODELS, Carry, Options, named_values
from tokenpool.runs import timing
from tokenpool.tools import benchmark, speed_up


def throughput(
    model: Annotated[list[str] | None, typer.Option(help=MODELS + " Repeatable; default: DeiT-S.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable; default: wkmedoids.")] = None,
    level: Annotated[
        list[float] | None,
        typer.Option(help="The paper's schedule for DeiT-S, scaled to the model. Repeatable; default: 3."),
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Another schedule, as of train. Repeatable.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; default: 32.")] = None,
    image_size: Annotated[
        list[int] | None, typer.Option(min=16, help="In pixels. Repeatable; default: the model's.")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[
        str | None, typer.Option(help="Of both models: eager (default), compiled, onnxruntime or openvino.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="The same as --backend compiled.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Time steps of training.")] = False,
    carry: Carry = False,
    option: Options = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="Of the CPU; 0: as PyTorch chooses.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Times that are taken of each model.")] = 7,
    against: Annotated[
        Path | None,
        typer.Option(help="Time what the results in this folder hold; fail where a realised fraction has fallen."),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, max=1, help="By more than this share, with --against.")] = 0.15,
    output: Annotated[Path, typer.Option(help="Folder for results, table and pictures.")] = Path("runs/throughput"),
) -> None:
    """Time pooled models and timm's plain one in turns: is the speed-up what the FLOPs promise?

    One JSON file a setting; what has been timed on this machine is not timed again.
    """
    if "none" in (method or []):
        raise ValueError("--method none is the plain model, which every method is compared with")
    if compiled and backend not in (None, "compiled"):
        raise ValueError(f"--compile is --backend compiled, not --backend {backend}: give one of both")
    chosen_backend = "compiled" if compiled else backend or "eager"
    schedules = [*(keep or []), *(f"deit_small:{one:g}" for one in level or ([] if keep else [3]))]
    sizes: list[int | None] = [*image_size] if image_size else [None]
    choices = itertools.product(
        model or ["deit_small_patch16_224"],
        method or ["wkmedoids"],
        schedules,
        batch_size or [32],
        sizes,
    )
    options = named_values(option)
    settings = [
        benchmark.Setting(
            *(name, chosen, None if chosen == "convolution" else schedule, batch, size),
            *(precision, chosen_backend, train, carry, options),
        )
        for name, chosen, schedule, batch, size in choices
    ]
    with timing.threads(threads):
        before: list[dict[str, Any]] = []
        if against:
            settings, before = benchmark.stored(against)
            _check_comparable(settings, before, against, device, output)
        found = _timed(settings, output, device, repeats)
        if against and (lines := benchmark.fallen(found, before, tolerance)):
            print("\nSlower than before:", *lines, sep="\n")
            raise typer.Exit(1)


def _check_comparable(
    settings: Sequence[benchmark.Setting], before: Sequence[dict[str, Any]], against: Path, device: str, output: Path
) -> None:
    """Refuse stored results of another device or number of threads, and to write over them."""
    missing = {one.run_name(device) for one in settings} - {one["run"] for one in before}
    if missing or before[0]["threads"] != torch.get_num_threads():
        raise ValueError(
            f"{against} holds results of {before[0]['threads']} threads on {before[0]['device']}: "
            "only the same can be compared; see --threads and --device"
        )
    if output.resolve() == against.resolve():
        raise ValueError(f"--output {output} is what it is compared with: choose another folder")


def _timed(settings: Sequence[benchmark.Setting], output: Path, device: str, repeats: int) -> list[dict[str, Any]]:
    """Time the settings, print each, and write table and pictures; returns the rows of `benchmark.run`."""
    found = []
    for one in benchmark.run(settings, output, device, repeats):
        found.append(one)
        print(
            f"{one['run']}: {one['images_per_second']:.1f} images/s, plain {one['plain_images_per_second']:.1f}; "
            f"speed-up {one['speed_up']:.2f} of {one['flops_ratio']:.2f}, realised {one['realised_fraction']:.2f}",
            flush=True,
        )
    with files.atomic_write(output / "table.md") as path:
        path.write_text(speed_up.table(found) + "\n")
    pictures = plotting.save(speed_up.picture(found), output / "speed-up")
    if len({one["tokens"] for one in found}) > 1:
        pictures = [*pictures, *plotting.save(speed_up.growth(found), output / "growth")]
    print(f"\n{speed_up.table(found)}\n\nTable: {output / 'table.md'}\nPictures: {', '.join(map(str, pictures))}")
    return found
