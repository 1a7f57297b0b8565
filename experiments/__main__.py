"""The command line: `python -m experiments <verb>`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from experiments import presets
from tokenpool.downsampling import METHODS

_METHODS = f"Downsampling method: {', '.join(METHODS)}."
_MODELS = (
    "Any VisionTransformer of timm (python -c \"import timm; print(timm.list_models('*vit*'))\"), such as "
    "deit_tiny_patch16_224 and deit_small_patch16_224; also deit_e252_patch16_224, deit_e318_patch16_224 and "
    "deit_digits_patch2_16."
)
_KEEP = "Retention schedule, one number a block (40,30,20,10,5,0), or one of the paper's (deit_small:3 is level 3)."
_DATA = '"digits", or a folder in ImageNet\'s layout: FOLDER/train/<class>/* and FOLDER/val/<class>/*.'
_OPTION = "Option of the method, repeatable: init=random, at=[2,4], iterations=3, seed=1."
_MODEL_OPTION = "Option of the timm model, repeatable: num_classes=10, img_size=96, drop_path_rate=0.1."
_PRESET = f"Preset: {', '.join(presets.NAMES)}."

app = typer.Typer(
    help="Experiments on token downsampling in vision transformers (Marin et al. 2021).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.command()
def reproduce(
    preset: Annotated[str, typer.Option(help=_PRESET)] = "digits",
    full: Annotated[bool, typer.Option("--full", help="All methods, more schedules, several seeds.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes; 0: one a core, at most 8.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for results. Default: runs/<preset>[-full].")] = None,
) -> None:
    """Run the protocol of section 5: base model, search for schedules, fine-tuning. Ends with a table and a picture.

    Finished runs are skipped and interrupted ones go on: start the same command again after an interruption.
    """
    from experiments import figures, runner, studies, tables
    from tokenpool import results

    chosen = presets.get(preset)
    folder = output or Path("runs") / (chosen.name + ("-full" if full else ""))
    with runner.exclusive(folder):
        studies.reproduce(chosen, full, folder, jobs or min(os.cpu_count() or 1, 8))
        table = tables.cost_accuracy(results.load(folder))
        text = tables.markdown(table)
        (folder / "table.md").write_text(text + "\n")
        pictures = figures.pareto(table, folder / "pareto")
    print(text)
    print(f"\nTable: {folder / 'table.md'}\nPicture: {' and '.join(map(str, pictures))}")


@app.command()
def train(
    preset: Annotated[str, typer.Option(help=_PRESET + " What is not given below is taken from it.")] = "digits",
    model: Annotated[str | None, typer.Option(help=_MODELS)] = None,
    data: Annotated[str | None, typer.Option(help=_DATA)] = None,
    downsampler: Annotated[str, typer.Option(help=_METHODS)] = "none",
    keep: Annotated[str | None, typer.Option(help=_KEEP)] = None,
    carry: Annotated[bool, typer.Option("--carry", help="Carry token sizes into the attention (appendix E).")] = False,
    qk_norm: Annotated[str | None, typer.Option(help='"l2": normalise queries and keys (appendix F).')] = None,
    alpha: Annotated[float, typer.Option(help="Scalar of the attention, with --qk-norm.")] = 1.0,
    learn_alpha: Annotated[bool, typer.Option("--learn-alpha", help="Learn alpha, one a block.")] = False,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from timm's weights.")] = False,
    start: Annotated[Path | None, typer.Option(help="Start from the weights in this file.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs. Default: of the preset's base model.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a batch.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    split: Annotated[int, typer.Option(help="Split of the digits into train and test.")] = 0,
    name: Annotated[str, typer.Option(help="Part of the names of the files.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/train"),
    option: Annotated[list[str] | None, typer.Option(help=_OPTION)] = None,
    model_option: Annotated[list[str] | None, typer.Option(help=_MODEL_OPTION)] = None,
    trainer: Annotated[
        list[str] | None,
        typer.Option(help="Option of Lightning's Trainer, repeatable: devices=2, precision=bf16-mixed."),
    ] = None,
) -> None:
    """Train one setting, test it, and write weights and one JSON file. Goes on where an interrupted run stopped."""
    from experiments import protocol, runner

    chosen = presets.get(preset)
    model = model or chosen.model
    run = protocol.Run(
        stage="train",
        label=name or (downsampler + (f"-{_file_name(keep)}" if keep else "")),
        data=data or chosen.data,
        model=model,
        downsampler=downsampler,
        keep=_schedule(keep),
        carry=carry,
        qk_norm=qk_norm,
        alpha=alpha,
        learn_alpha=learn_alpha,
        pretrained=pretrained,
        start=str(start) if start else None,
        epochs=chosen.base_epochs if epochs is None else epochs,
        batch_size=batch_size or chosen.batch_size,
        learning_rate=learning_rate or chosen.learning_rate,
        warmup_epochs=chosen.warmup_epochs,
        weight_decay=chosen.weight_decay,
        label_smoothing=chosen.label_smoothing,
        seed=seed,
        split=split,
        options=_options(option),
        model_options=(chosen.model_options if model == chosen.model else {}) | _options(model_option),
    )
    with runner.exclusive(output):
        if protocol.is_finished(run, output):
            print(f"finished already: {protocol.result_path(run, output)}")
            return
        outcome = protocol.execute(run, output, progress=True, trainer_options=_options(trainer))
    _report(outcome)
    print(f"result: {protocol.result_path(run, output)}\nweights: {protocol.weights_path(run.name, output)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help=_MODELS)],
    data: Annotated[str, typer.Option(help=_DATA + " Only val is needed.")],
    weights: Annotated[
        Path | None, typer.Option(help="File of weights: .safetensors, or .pth with tensors only.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Use timm's weights.")] = False,
    downsampler: Annotated[str, typer.Option(help=_METHODS)] = "none",
    keep: Annotated[str | None, typer.Option(help=_KEEP)] = None,
    carry: Annotated[bool, typer.Option("--carry", help="Carry token sizes into the attention (appendix E).")] = False,
    limit: Annotated[int, typer.Option(help="Evaluate on so many images only; 0: all.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = 64,
    split: Annotated[int, typer.Option(help="Split of the digits into train and test.")] = 0,
    name: Annotated[str, typer.Option(help="Part of the name of the file.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("runs/evaluate"),
    option: Annotated[list[str] | None, typer.Option(help=_OPTION)] = None,
    model_option: Annotated[list[str] | None, typer.Option(help=_MODEL_OPTION)] = None,
    trainer: Annotated[list[str] | None, typer.Option(help="Option of Lightning's Trainer, repeatable.")] = None,
) -> None:
    """Test one setting without training, and write one JSON file."""
    from experiments import protocol

    if not weights and not pretrained:
        raise ValueError("evaluate needs --weights FILE or --pretrained")
    run = protocol.Run(
        stage="evaluate",
        label=name or "-".join(filter(None, [model, downsampler, "carry" if carry else "", _file_name(keep)])),
        data=data,
        model=model,
        downsampler=downsampler,
        keep=_schedule(keep),
        carry=carry,
        pretrained=pretrained,
        start=str(weights) if weights else None,
        batch_size=batch_size,
        split=split,
        limit=limit,
        options=_options(option),
        model_options=_options(model_option),
    )
    _report(protocol.execute(run, output, progress=True, trainer_options=_options(trainer)))
    print(f"result: {protocol.result_path(run, output)}")


def _report(outcome: dict[str, Any]) -> None:
    metrics, cost = outcome["metrics"], outcome["cost"]
    print(
        f"top-1 {metrics['top1']:.2f} ± {metrics['top1_error']:.2f} %, top-5 {metrics['top5']:.2f} % of "
        f"{metrics['images']} images; {cost['gmacs']:.4g} GMACs, of which clustering {cost['clustering_gmacs']:.4g}"
    )


def _schedule(text: str | None) -> tuple[int, ...] | None:
    from tokenpool import schedules

    if text is None:
        return None
    model, colon, level = text.partition(":")
    try:
        return tuple(schedules.paper(model, int(level)) if colon else [int(part) for part in text.split(",")])
    except ValueError as error:
        raise ValueError(f"--keep {text}: {error}; {_KEEP}") from error


def _file_name(keep: str | None) -> str:
    return (keep or "").replace(":", "-level").replace(",", "_")


def _options(pairs: list[str] | None) -> dict[str, Any]:
    options = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} must have the form name=value")
        options[key] = yaml.safe_load(value)
    return options


def main() -> None:
    """Run the command line; a mistake in the input ends in one line, not in a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("TOKENPOOL_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where this one stopped")


if __name__ == "__main__":
    main()
