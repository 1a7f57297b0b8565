"""The command that trains one setting: `train`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import presets
from experiments.options import (
    PRESETS,
    LogTo,
    with_recipe_options,
)
from tokenpool.commands.options import (
    DATA_OR_FOLDER,
    MODELS,
    AllowEmpty,
    AllowTruncated,
    Alpha,
    Carry,
    Ema,
    Gmacs,
    Keep,
    LearnAlpha,
    Method,
    ModelOptions,
    Name,
    Options,
    Pretrained,
    QkNorm,
    Split,
    TrainerOptions,
    named_values,
)
from tokenpool.commands.single import file_name, make, plain_name, schedule, start_path
from tokenpool.runs.run import Run, weights_path


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
        label=plain_name(name) or "-".join(filter(None, [downsampler, file_name(keep, gmacs)])),
        data=_given(data, chosen.data),
        model=model,
        downsampler=downsampler,
        keep=schedule(keep, gmacs, downsampler, model, options, model_options),
        carry=carry,
        qk_norm=qk_norm,
        alpha=alpha,
        learn_alpha=learn_alpha,
        pretrained=pretrained or (chosen.pretrained and start is None),
        start=start_path(start),
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


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
