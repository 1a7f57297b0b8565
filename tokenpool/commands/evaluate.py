"""The command that tests one setting: `evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from tokenpool.commands.options import (
    DATA_OR_FOLDER,
    AllowEmpty,
    AllowTruncated,
    Alpha,
    Calibrate,
    CalibrateImages,
    CalibratePart,
    Carry,
    Ema,
    Gmacs,
    Keep,
    LearnAlpha,
    Method,
    Model,
    ModelOptions,
    Name,
    Options,
    Part,
    Pretrained,
    QkNorm,
    Split,
    TrainerOptions,
    named_values,
)
from tokenpool.commands.single import file_name, make, plain_name, schedule, start_path
from tokenpool.runs.calibrating import CalibrationImages, calibrated
from tokenpool.runs.run import Run
from tokenpool.training.recipe import Recipe


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help=DATA_OR_FOLDER + " Only val is needed.")],
    weights: Annotated[Path | None, typer.Option(help="Weights: .safetensors, .pth or .ckpt.")] = None,
    ema: Ema = None,
    pretrained: Pretrained = False,
    downsampler: Method = "none",
    keep: Keep = None,
    gmacs: Gmacs = None,
    calibrate: Calibrate = None,
    calibrate_part: CalibratePart = "",
    calibrate_images: CalibrateImages = 256,
    carry: Carry = False,
    qk_norm: QkNorm = None,
    alpha: Alpha = 1.0,
    learn_alpha: LearnAlpha = False,
    limit: Annotated[int, typer.Option(min=0, help="Use so many images of the folder only; 0: all.")] = 0,
    part: Part = "",
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Measure the divergence from the plain model, in place of top-5.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 64,
    split: Split = 0,
    allow_empty_classes: AllowEmpty = False,
    allow_truncated: AllowTruncated = False,
    name: Name = "",
    output: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("runs/evaluate"),
    option: Options = None,
    model_option: ModelOptions = None,
    trainer: TrainerOptions = None,
) -> None:
    """Test one setting without training, and write one JSON file."""
    if not weights and not pretrained:
        raise ValueError("evaluate needs --weights FILE or --pretrained")
    if calibrate and (gmacs is None or keep is not None or qk_norm):
        raise ValueError("--calibrate needs the budget --gmacs, and takes no --keep and no --qk-norm")
    options, model_options = named_values(option), named_values(model_option)
    words = [model, downsampler, file_name(keep, gmacs), "carry" if carry else "", "calibrated" if calibrate else ""]
    run = Run(
        stage="agreement" if agreement else "evaluate",
        label=plain_name(name) or "-".join(filter(None, words)),
        data=data,
        model=model,
        downsampler=downsampler,
        keep=schedule(keep, gmacs, downsampler, model, options, model_options),
        carry=carry,
        qk_norm=qk_norm,
        alpha=alpha,
        learn_alpha=learn_alpha,
        pretrained=pretrained,
        start=start_path(weights),
        ema=ema,
        recipe=Recipe(batch_size=batch_size),
        split=split,
        limit=limit,
        part=part,
        allow_empty_classes=allow_empty_classes,
        allow_truncated=allow_truncated,
        options=options,
        model_options=model_options,
        trainer_options=named_values(trainer),
    )
    if calibrate and gmacs is not None:
        run = calibrated(run, gmacs, CalibrationImages(calibrate, calibrate_part, calibrate_images), output)
    make(run, output)
