"""Commands for one setting: train it, or evaluate it without training."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import tokenpool
from experiments import execute, pool, presets
from experiments.calibrating import CalibrationImages, calibrated
from experiments.options import (
    DATA_OR_FOLDER,
    MODELS,
    PRESETS,
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
    LogTo,
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
    with_recipe_options,
)
from experiments.run import Run, is_finished, result_path, weights_path
from tokenpool.analysis import results
from tokenpool.training.recipe import Recipe


@with_recipe_options
def train(
    preset: Annotated[str, typer.Option(help=PRESETS + " What is not given below is taken from it.")] = presets.DEFAULT,
    model: Annotated[str | None, typer.Option(help=MODELS)] = None,
    data: Annotated[str | None, typer.Option(help=DATA_OR_FOLDER)] = None,
    downsampler: Method = "none",
    keep: Keep = None,
    gmacs: Gmacs = None,
    carry: Carry = False,
    qk_norm: QkNorm = None,
    alpha: Alpha = 1.0,
    learn_alpha: LearnAlpha = False,
    pretrained: Pretrained = False,
    start: Annotated[Path | None, typer.Option(help="Start from the weights in this file.")] = None,
    ema: Ema = None,
    recipe: Any = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything.")] = 0,
    split: Split = 0,
    allow_empty_classes: AllowEmpty = False,
    allow_truncated: AllowTruncated = False,
    name: Name = "",
    output: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/train"),
    option: Options = None,
    model_option: ModelOptions = None,
    trainer: TrainerOptions = None,
    logger: LogTo = None,
) -> None:
    """Train one setting, test it, and write weights and one JSON file. Goes on where an interrupted run stopped."""
    chosen = presets.get(preset)
    model = _given(model, chosen.model)
    options = named_values(option)
    taken = {
        name: value
        for name, value in chosen.model_options.items()
        if model == chosen.model or name in ("num_classes", "drop_path_rate")  # the others are of its architecture
    }
    model_options = taken | named_values(model_option)
    planned = replace(chosen.base_recipe, **recipe)
    if not planned.epochs:
        raise ValueError(f"{'--epochs 0' if 'epochs' in recipe else f'preset {preset}'} trains nothing; give --epochs")
    run = Run(
        stage="train",
        label=_plain_name(name) or "-".join(filter(None, [downsampler, _file_name(keep, gmacs)])),
        data=_given(data, chosen.data),
        model=model,
        downsampler=downsampler,
        keep=_schedule(keep, gmacs, downsampler, model, options, model_options),
        carry=carry,
        qk_norm=qk_norm,
        alpha=alpha,
        learn_alpha=learn_alpha,
        pretrained=pretrained or (chosen.pretrained and start is None),
        start=_path(start),
        ema=ema,
        recipe=planned,
        seed=seed,
        split=split,
        allow_empty_classes=allow_empty_classes,
        allow_truncated=allow_truncated,
        options=options,
        model_options=model_options,
        trainer_options=chosen.trainer_options | named_values(trainer),
    )
    make(run, output)
    print(f"weights: {weights_path(run.name, output)}")


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
    words = [model, downsampler, _file_name(keep, gmacs), "carry" if carry else "", "calibrated" if calibrate else ""]
    run = Run(
        stage="agreement" if agreement else "evaluate",
        label=_plain_name(name) or "-".join(filter(None, words)),
        data=data,
        model=model,
        downsampler=downsampler,
        keep=_schedule(keep, gmacs, downsampler, model, options, model_options),
        carry=carry,
        qk_norm=qk_norm,
        alpha=alpha,
        learn_alpha=learn_alpha,
        pretrained=pretrained,
        start=_path(weights),
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
    if calibrate:
        run = calibrated(run, gmacs, CalibrationImages(calibrate, calibrate_part, calibrate_images), output)
    make(run, output)


def make(run: Run, folder: Path) -> None:
    """Make a run that is not finished, and print its outcome."""
    path = result_path(run, folder)
    with pool.exclusive(folder):
        if is_finished(run, folder):
            print("finished already:")
            outcome = results.read(path)
        else:
            outcome = execute.execute(run, folder, progress=True)
    metrics, cost = outcome["metrics"], outcome["cost"]
    if "warning" in outcome:
        print(f"warning: {outcome['warning']}", file=sys.stderr)
    images = f"{metrics['images']} images"
    if "among_classes" in outcome:
        images += f", among {len(outcome['among_classes'])} of the model's classes"
    more = f"top-5 {metrics['top5']:.2f} %" if "top5" in metrics else f"divergence {metrics['divergence']:.4f}"
    print(
        f"top-1 {metrics['top1']:.2f} ± {metrics['top1_error']:.2f} %, {more} of "
        f"{images}; {cost['gmacs']:.4g} GMACs, of which clustering {cost['clustering_gmacs']:.4g}"
    )
    print(f"result: {path}")


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _plain_name(name: str) -> str:
    """The part of the names of files that the user gives.

    Raises:
        ValueError: if it has a separator of paths.
    """
    if os.sep in name:
        raise ValueError(f"--name {name} must be a name without {os.sep}: --output names the folder")
    return name


def _path(path: Path | None) -> str | None:
    """A path with a separator, because a start without one is the name of a run."""
    if path is None:
        return None
    return str(path) if os.sep in str(path) else f".{os.sep}{path}"


def _schedule(
    keep: str | None, gmacs: float | None, downsampler: str, model: str, options: Any, model_options: Any
) -> tuple[int, ...] | None:
    """The schedule that --keep or --gmacs means for this model."""
    if keep is None and gmacs is None:
        return None
    # A model without weights, for its size. Carried sizes change no schedule.
    built = tokenpool.create_model(model, downsampler, keep, gmacs=gmacs, carry=False, **options, **model_options)
    return tokenpool.hosts.of(built).setting.keep


def _file_name(keep: str | None, gmacs: float | None) -> str:
    if gmacs is not None:
        return f"{gmacs:g}gmacs"
    text = (keep or "").replace(":", "-level").replace(",", "_").replace("@", "at")
    return f"step{text[1:]}" if text.startswith("-") else text
