"""Commands beyond the paper's protocol: `explain`, `export` and `check-data`."""

from pathlib import Path
from typing import Annotated

import typer

from tokenpool.commands.options import (
    FOLDER_OR_HUB,
    MODELS,
    AllowEmpty,
    AllowTruncated,
    Ema,
    Gmacs,
    Keep,
    Method,
    Model,
    ModelOptions,
    Options,
    Pretrained,
    cores,
    named_values,
)
from tokenpool.tools import check_data as checking
from tokenpool.tools import explain as explaining
from tokenpool.tools import export as exporting
from tokenpool.tools.explain_page import AGAINST, SHARES


def explain(
    image: Annotated[Path, typer.Argument(help="A photograph, in any format that Pillow reads.")],
    model: Model = "deit_tiny_patch16_224",
    method: Method = "key_medoids",
    level: Annotated[
        float | None,
        typer.Option(min=0, max=7, help="The paper's schedule for DeiT-S, scaled to the model. Default: 3."),
    ] = None,
    keep: Keep = None,
    gmacs: Gmacs = None,
    carry: Annotated[bool, typer.Option(help="Carry token sizes into the attention (appendix E).")] = True,
    weights: Annotated[Path | None, typer.Option(help="Weights to use instead of timm's download.")] = None,
    ema: Ema = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help=f"Method to compare with on the page, repeatable. Default: {', '.join(AGAINST)}."),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="Further budget of the page, as a share of the plain model's cost, repeatable. "
            f"Default: {', '.join(map(str, SHARES))}.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the page.")] = Path("runs/explain"),
) -> None:
    """Pool a pretrained model on one image: what it sees before and after, what it costs, and which patches merge."""
    given = [option for option in (level, keep, gmacs) if option is not None]
    if len(given) > 1:
        raise ValueError("--level, --keep and --gmacs are three ways to say one thing: give one of them")
    schedule = (
        {"gmacs": gmacs} if gmacs is not None else {"keep": keep or f"deit_small:{3 if level is None else level:g}"}
    )
    lines = explaining.explain(
        image, model, method, schedule, carry, weights, output, ema, against or AGAINST, share or SHARES
    )
    for line in lines:
        print(line)


def export(
    model: Annotated[str, typer.Argument(help=MODELS)],
    to: Annotated[str, typer.Option(help="onnx, pt2 (PyTorch's exported program) or openvino.")] = "onnx",
    weights: Annotated[Path | None, typer.Option(help="Weights: .safetensors, .pth or .ckpt.")] = None,
    ema: Ema = None,
    pretrained: Pretrained = False,
    method: Method = "key_medoids",
    keep: Keep = None,
    gmacs: Gmacs = None,
    carry: Annotated[bool, typer.Option(help="Carry token sizes into the attention (appendix E).")] = True,
    option: Options = None,
    model_option: ModelOptions = None,
    precision: Annotated[
        str,
        typer.Option(
            help="float32 or float16, of weights, images and logits; with --to onnx also int8 or int8-dynamic, of "
            "linear layers: int8 needs --calibration, int8-dynamic measures ranges when it runs."
        ),
    ] = "float32",
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of photographs that calibrate --precision int8.")
    ] = None,
    calibration_limit: Annotated[int, typer.Option(min=1, help="Use so many images of the folder only.")] = 64,
    opset: Annotated[int, typer.Option(min=18, help="Of ONNX.")] = exporting.OPSET,
    images: Annotated[
        Path | None, typer.Option(help="Folder of photographs to compare logits on. Default: random images.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use so many images of the folder only.")] = 64,
    output: Annotated[Path, typer.Option(help="Folder for the file and its report.")] = Path("runs/export"),
) -> None:
    """Export a model for deployment, for any batch size, and compare the logits of the file with eager mode."""
    if keep is not None and gmacs is not None:
        raise ValueError("--keep and --gmacs are two ways to say one thing: give one of them")
    if not weights and not pretrained:
        print("neither --weights nor --pretrained is given: the weights are random")
    chosen = exporting.Export(
        model=model,
        to=to,
        method=method,
        schedule={name: value for name, value in (("keep", keep), ("gmacs", gmacs)) if value is not None},
        carry=carry,
        weights=weights,
        pretrained=pretrained,
        ema=ema,
        precision=precision,
        calibration=calibration,
        calibration_limit=calibration_limit,
        opset=opset,
        options=named_values(option),
        model_options=named_values(model_option),
    )
    for line in exporting.export(chosen, exporting.path_of(chosen, output), images, limit):
        print(line)


def check_data(
    data: Annotated[str, typer.Option(help=FOLDER_OR_HUB)],
    part: Annotated[list[str] | None, typer.Option(help="train or val. Repeatable; default: both.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write. Default: in runs/check-data/.")] = None,
    allow_empty_classes: AllowEmpty = False,
    allow_truncated: AllowTruncated = False,
) -> None:
    """Read every image once, and name those that cannot be read. Goes on where it was interrupted."""
    for line in checking.check_data(
        data, part or checking.PARTS, jobs or cores(), output, allow_empty_classes, allow_truncated
    ):
        print(line)
