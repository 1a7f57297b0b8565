"""Options that several commands have, and the options for hyper-parameters, made from the fields of `Recipe`."""

import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from experiments import data_sets, loggers, presets
from tokenpool.downsampling import REGISTRY
from tokenpool.training.recipe import Recipe

FOLDER_OR_HUB = (
    "A folder in ImageNet's layout, FOLDER/train/<class>/* and FOLDER/val/<class>/*; or hf: and a folder or name that "
    "Hugging Face datasets opens (hf:ILSVRC/imagenet-1k); or cifar10, which torchvision downloads."
)
_EMBEDDED = ", ".join(f'"{name}"' for name in data_sets.embedded())
DATA_OR_FOLDER = f"{_EMBEDDED}, or images. {FOLDER_OR_HUB}"
MODELS = (
    "Any VisionTransformer or Eva model of timm (python -c \"import timm; print(timm.list_models('*vit*'))\"), such as "
    "deit_tiny_patch16_224 and deit_small_patch16_224; also deit_e252_patch16_224, deit_e318_patch16_224 and "
    "deit_digits_patch2_16."
)
PRESETS = f"Preset: {', '.join(presets.NAMES)}; or a file like theirs, my_preset.py, that defines PRESET."


def _log_to(name: str | None) -> str | None:
    """Name the logger by an environment variable, which the processes of a study inherit."""
    if name is not None:
        loggers.check(name)
        os.environ[loggers.VARIABLE] = name
    return name


Model = Annotated[str, typer.Option(help=MODELS)]
_METHOD = typer.Option()  # its help is written by `describe_methods`
Method = Annotated[str, _METHOD]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Retention schedule: one number a block (40,30,20,10,5,0); the paper's, scaled (deit_small:3); a share "
        "that each block keeps (0.9), or some blocks (0.7@3,6,9); a number that each removes (-13)."
    ),
]
Gmacs = Annotated[
    float | None,
    typer.Option("--gmacs", help="Instead of --keep: what an image may cost, in 10^9 multiply-adds, with clustering."),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        help="With --gmacs: search the schedule that changes the plain model's outputs least on images in "
        "FOLDER/train, or of another data set. Takes minutes, and goes on where it was interrupted."
    ),
]
CalibratePart = Annotated[str, typer.Option(help="Calibrate on a part of FOLDER/val instead: 1/2, the first half.")]
CalibrateImages = Annotated[int, typer.Option(min=1, help="Number of images of the calibration.")]
Part = Annotated[str, typer.Option(help="Use a part of the images only: 2/2, the second of two interleaved halves.")]
Carry = Annotated[bool, typer.Option("--carry", help="Carry token sizes into the attention (appendix E).")]
QkNorm = Annotated[str | None, typer.Option(help='"l2": normalise queries and keys (appendix F).')]
Alpha = Annotated[float, typer.Option(help="Scalar of the attention, with --qk-norm.")]
LearnAlpha = Annotated[bool, typer.Option("--learn-alpha", help="One alpha a block is a parameter.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load timm's weights.")]
Ema = Annotated[
    bool | None,
    typer.Option("--ema/--raw", help="Of a file of weights with both: the moving average (default) or the raw ones."),
]
Split = Annotated[int, typer.Option(min=0, help="Split of the digits into train and test.")]
Name = Annotated[str, typer.Option(help="Part of the names of the files.")]
Options = Annotated[
    list[str] | None,
    typer.Option(help="Option of the method, repeatable: init=random, at=[2,4], iterations=3, seed=1."),
]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option(help="Option of the timm model, repeatable: num_classes=10, img_size=96, drop_path_rate=0.1."),
]
TrainerOptions = Annotated[
    list[str] | None,
    typer.Option(help="Option of Lightning's Trainer, repeatable: devices=2, precision=bf16-mixed."),
]

AllowEmpty = Annotated[
    bool, typer.Option("--allow-empty-classes", help="Let class folders be empty; they count as classes.")
]
AllowTruncated = Annotated[
    bool, typer.Option("--allow-truncated", help="Accept images whose end is missing; the rest of them is grey.")
]

Results = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the runs. Default: results/<preset>, as shipped; runs/<preset>-full where nothing is shipped, "
        "or where images or weights are named."
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="Of the quick study of `make reproduce`, in runs/<preset>.")]
Output = Annotated[Path, typer.Option(help="Folder for what is written; a sub-folder for each preset.")]
Missing = Annotated[bool, typer.Option("--missing", help="Only list the runs that are missing, and their cost.")]
RunMissing = Annotated[bool, typer.Option("--run", help="Make the runs that are missing first.")]
Jobs = Annotated[int, typer.Option(min=0, help="Processes; 0: one a core, at most 8.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Images in ImageNet's layout, hf:NAME or cifar10, for presets that need them. Or: $TOKENPOOL_DATA."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights to use instead of timm's download. Or: $TOKENPOOL_WEIGHTS.")
]
LogTo = Annotated[
    str | None,
    typer.Option(
        "--logger",
        callback=_log_to,
        help="What logs training: csv, tensorboard or wandb (offline). Results stay the same. Or: $TOKENPOOL_LOGGER.",
    ),
]
FigureRuns = Annotated[str | None, typer.Option(help="The runs of this figure, or all.")]
TableRuns = Annotated[str | None, typer.Option(help="The runs of this table, or all.")]


def named_values(pairs: list[str] | None) -> dict[str, Any]:
    """The values of options of the form name=value, where a value is YAML.

    Raises:
        ValueError: if one has another form.
    """
    options = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{pair!r} must have the form name=value")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())  # in one line
            raise ValueError(f"{pair!r} must have the form name=value with a YAML value: {reason}") from error
    return options


def describe_methods() -> None:
    """Write the help of `--downsampler` and `--method`: all methods that are registered now."""
    methods = [f"{method.name} - {method.description}" for method in REGISTRY.values()]
    _METHOD.help = "\n\n".join(["What remains after the attention of each block, where K is from --keep.", *methods])


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command of Typer one option for each field of `Recipe`, in place of its parameter `recipe`.

    The command gets a dictionary of the fields that the user has given, as `recipe`.
    """
    options = [_option(each.name, each.type, each.metadata) for each in fields(Recipe)]
    parameters: list[Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        parameters += options if name == "recipe" else [parameter]

    @wraps(command)
    def wrapped(**given: Any) -> None:
        values = {option.name: given.pop(option.name) for option in options}
        command(**given, recipe={name: value for name, value in values.items() if value is not None})

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # which Typer reads
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _option(name: str, kind: Any, limits: Any) -> Parameter:
    """The option for one field; None where it is not given."""
    option = typer.Option(help=limits["help"], min=limits.get("least"), max=limits.get("most", limits.get("below")))
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Annotated[kind | None, option])
