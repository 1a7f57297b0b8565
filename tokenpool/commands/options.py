"""Options that several commands have."""

import os
from typing import Annotated, Any

import typer
import yaml

from tokenpool.downsampling import REGISTRY
from tokenpool.runs import data_sets

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

Jobs = Annotated[int, typer.Option(min=0, help="Processes; 0: one a core, at most 8.")]


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


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
