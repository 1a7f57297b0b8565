"""The command line: `python -m experiments <verb>`."""

import os
import sys

if __name__ == "__main__":  # before the imports below: Matplotlib refuses unknown backends when it is imported
    os.environ["MPLBACKEND"] = "Agg"  # pictures go into files, whatever Jupyter has set

from tokenpool.extras import require

if __name__ == "__main__":  # before the imports below: one line, not a traceback
    try:
        require("experiments", "experiments", "typer", "yaml", "tqdm", "pandas", "matplotlib", "lightning")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from tqdm import tqdm

from experiments import presets
from experiments.recipe_options import with_recipe_options
from tokenpool import files
from tokenpool.downsampling import REGISTRY
from tokenpool.training.images import HUB, is_downloaded
from tokenpool.training.interruption import Interrupted
from tokenpool.training.recipe import Recipe

_FOLDER_OR_HUB = (
    "A folder in ImageNet's layout, FOLDER/train/<class>/* and FOLDER/val/<class>/*; or hf: and a folder or name that "
    "Hugging Face datasets opens (hf:ILSVRC/imagenet-1k); or cifar10, which torchvision downloads."
)
_DIGITS_OR_FOLDER = f'"digits", or images. {_FOLDER_OR_HUB}'
_MODELS = (
    "Any VisionTransformer of timm (python -c \"import timm; print(timm.list_models('*vit*'))\"), such as "
    "deit_tiny_patch16_224 and deit_small_patch16_224; also deit_e252_patch16_224, deit_e318_patch16_224 and "
    "deit_digits_patch2_16."
)
_PRESETS = f"Preset: {', '.join(presets.NAMES)}; or a file like theirs, my_preset.py, that defines PRESET."


def _log_to(name: str | None) -> str | None:
    """Say by an environment variable, which the processes of a study inherit, what logs their training."""
    if name is not None:
        from experiments import loggers

        loggers.check(name)
        os.environ[loggers.VARIABLE] = name
    return name


# Options that several verbs have.
Model = Annotated[str, typer.Option(help=_MODELS)]
_METHOD = typer.Option()  # its help is written by `_describe_methods`
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

app = typer.Typer(
    help="Experiments on token downsampling in vision transformers (Marin et al. 2021).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.command()
def reproduce(
    preset: Annotated[str, typer.Option(help=_PRESETS)] = "digits",
    full: Annotated[bool, typer.Option("--full", help="All methods, more schedules, several seeds.")] = False,
    jobs: Jobs = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for results. Default: runs/<preset>[-full].")] = None,
    data: Data = None,
    weights: Weights = None,
    logger: LogTo = None,
) -> None:
    """Run the protocol of section 5: base model, search for schedules, fine-tuning. Ends with a table and a picture.

    Finished runs are skipped and interrupted ones go on: start the same command again after an interruption.
    """
    from experiments import figures, runner, studies, tables

    study = _study(preset, output, not full, data, weights, own=True)
    folder = study.folder
    studies.protocol_runs(study)  # a preset that trains nothing is refused
    with runner.exclusive(folder):
        study.execute(studies.everything(study), jobs or min(_cores(), 8))
        study = studies.Study(study.preset, folder, full)
        frame = study.points(studies.protocol_runs(study))
        table = tables.cost_accuracy(frame)
        text = tables.markdown(table)
        paired = tables.differences(frame)
        if len(paired):
            text += "\n\nPaired by seed and schedule, mean over schedules, error over seeds:\n\n"
            text += tables.differences_markdown(paired)
        (folder / "table.md").write_text(text + "\n")
        pictures = figures.pareto_picture(table, folder / "pareto")
    print(text)
    print(f"\nTable: {folder / 'table.md'}\nPicture: {' and '.join(map(str, pictures))}")


@app.command()
def table(
    name: Annotated[str, typer.Argument(help="claims, 1 to 5, off_the_shelf, or all.")],
    preset: Annotated[
        str | None, typer.Option(help=_PRESETS + " Default: digits; for claims all that have results.")
    ] = None,
    results: Results = None,
    quick: Quick = False,
    output: Output = Path("runs/paper"),
    missing: Missing = False,
    run: RunMissing = False,
    jobs: Jobs = 0,
    data: Data = None,
    weights: Weights = None,
    logger: LogTo = None,
) -> None:
    """Print a table of the paper and write it as Markdown, LaTeX and CSV: as printed, and from the runs of a preset."""
    from experiments import tables

    if name == "claims" and preset is None and results is None and not (quick or missing or run):
        _show_claims(output)
        return
    study = _study(preset or "digits", results, quick, data, weights)
    _show(study, "table", _chosen("table", name, tables.NAMES), output, missing, run, jobs)


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="1b, 1c, 2, 3a, ... 12, reconstruction, redundancy, or all.")],
    preset: Annotated[str, typer.Option(help=_PRESETS)] = "digits",
    results: Results = None,
    quick: Quick = False,
    output: Output = Path("runs/paper"),
    missing: Missing = False,
    run: RunMissing = False,
    jobs: Jobs = 0,
    data: Data = None,
    weights: Weights = None,
    logger: LogTo = None,
) -> None:
    """Draw a figure of the paper as PNG and PDF: from its printed numbers, and from the runs of a preset."""
    from experiments import figures

    study = _study(preset, results, quick, data, weights)
    _show(study, "figure", _chosen("figure", name, figures.NAMES), output, missing, run, jobs)


@app.command()
def report(
    preset: Annotated[
        list[str] | None, typer.Option(help=_PRESETS + " Repeatable; default: all that have results.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder with one folder of results a preset. Default: results.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Of the quick study of `make reproduce`, in runs/.")] = False,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("runs/report.html"),
) -> None:
    """Write all tables and figures, and what each was made from, on one page of HTML."""
    from experiments import report as page
    from experiments.studies import Study

    folder = results or Path("runs" if quick else "results")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder of results")
    names = preset or [name for name in presets.NAMES if (folder / name).is_dir()] or presets.NAMES[:1]
    studies = [Study(presets.get(name), folder / name, full=not quick) for name in names]
    print(f"page: {page.write(studies, output)}")


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="Of the run, such as finetune-wkmedoids-level0-seed0.")],
    preset: Annotated[str, typer.Option(help=_PRESETS)] = "digits",
    results: Results = None,
    quick: Quick = False,
    data: Data = None,
    weights: Weights = None,
    logger: LogTo = None,
) -> None:
    """Make one run of a preset, as each task of a job array does. Goes on where an interrupted run stopped."""
    from lightning.pytorch.utilities import rank_zero_only

    from experiments import protocol, runner, studies

    study = _study(preset, results, quick, data, weights)
    found = [run for run in study.with_awaited(studies.everything(study)) if run.name == name]
    if not found:
        raise ValueError(f"preset {preset} has no run {name!r}; `submit --all --dry-run` writes scripts that name all")
    with runner.exclusive_run(name, study.folder):
        chosen = study.prepared(found[0])
        if chosen is None:
            print(f"{name} is finished already")
            return
        progress = sys.stderr.isatty()
        if not progress:
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # a log has no room for advice
        outcome = protocol.execute(chosen, study.folder, progress=progress)
    if rank_zero_only.rank == 0:
        print(f"{name}: {runner.summary(outcome)}")


@app.command()
def submit(
    preset: Annotated[str, typer.Option(help=_PRESETS)] = "digits",
    figure: FigureRuns = None,
    table: TableRuns = None,
    everything: Annotated[bool, typer.Option("--all", help="The runs of all figures and tables.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help='Only runs of such names, such as "finetune-*-level2-*", and what they need. Repeatable.'),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the scripts, and say what would be queued.")
    ] = False,
    template: Annotated[
        Path | None, typer.Option(help="Of the batch scripts: an edited copy of experiments/slurm/template.sh.")
    ] = None,
    results: Results = None,
    quick: Quick = False,
    data: Data = None,
    weights: Weights = None,
) -> None:
    """Submit the missing runs to Slurm, as job arrays that wait for each other.

    What is finished or in the queue is left alone: submit again after failures.
    """
    from experiments.slurm import submit as slurm

    study = _study(preset, results, quick, data, weights)
    if (figure is not None) + (table is not None) + everything != 1:
        raise ValueError("submit needs one of --figure NAME, --table NAME and --all")
    wanted = _wanted(study, figure, table)
    for line in slurm.submit(study, wanted, only or [], template or slurm.TEMPLATE, dry_run):
        print(line, flush=True)


@app.command()
def status(
    preset: Annotated[str, typer.Option(help=_PRESETS)] = "digits",
    figure: FigureRuns = None,
    table: TableRuns = None,
    everything: Annotated[bool, typer.Option("--all", help="The runs of all figures and tables: the default.")] = False,
    long: Annotated[bool, typer.Option("--long", help="Name every run.")] = False,
    results: Results = None,
    quick: Quick = False,
) -> None:
    """Say which of the runs submitted to Slurm are done, running, queued, failed and missing."""
    from experiments.slurm import status as slurm

    if (figure is not None) + (table is not None) + everything > 1:
        raise ValueError("status takes one of --figure NAME, --table NAME and --all")
    submitted = Path("runs") / f"{presets.get(preset).name}-full"
    if results is None and not quick and submitted.is_dir():
        results = submitted
    study = _study(preset, results, quick, None, None)
    for line in slurm.show(study, _wanted(study, figure, table), long):
        print(line)


def _wanted(study: Any, figure: str | None, table: str | None) -> list[Any]:
    """The runs of a figure or of a table, or all of them if neither is named."""
    from experiments import figures, studies, tables

    if figure is None and table is None:
        return studies.everything(study)
    kind, name, known = ("table", table, tables.NAMES) if figure is None else ("figure", figure, figures.NAMES)
    named = [run for one in _chosen(kind, name, known) for run in studies.needs(study, f"{kind} {one}")]
    if not named:
        raise ValueError(f"{kind} {name} is not part of preset {study.preset.name}")
    return list({run.name: run for run in named}.values())


def _chosen(kind: str, name: str, known: Sequence[str]) -> list[str]:
    if name != "all" and name not in known:
        raise ValueError(f"unknown {kind} {name!r}; known are {', '.join(known)}, all")
    return list(known) if name == "all" else [name]


def _study(
    preset: str, results: Path | None, quick: bool, data: Path | None, weights: Path | None, own: bool = False
) -> Any:
    """The study of a preset, whose images and weights are named by variables from now on.

    Args:
        preset: name of the preset.
        results: folder of the runs; None for the default.
        quick: the study of `make reproduce`.
        data: images.
        weights: pretrained weights.
        own: never the shipped results.
    """
    from experiments.run import DATA, NAMED, WEIGHTS
    from experiments.studies import Study

    chosen = presets.get(preset)
    if data is not None and chosen.data not in NAMED:
        raise ValueError(f"preset {chosen.name} has its own images ({chosen.data}): it takes no --data")
    if weights is not None and not chosen.pretrained:
        raise ValueError(f"preset {chosen.name} trains its models from scratch: it takes no --weights")
    for variable, path in ((DATA, data), (WEIGHTS, weights)):
        if path is not None:
            if not path.exists() and not str(path).startswith(HUB) and not is_downloaded(path):
                files.check_local(path)
                raise FileNotFoundError(f"no file or folder {path}")
            os.environ[variable] = str(path)
    if results is not None and results.exists() and not results.is_dir():
        raise ValueError(f"{results} is a file, not a folder of results")
    if results is None:
        named = (chosen.data in NAMED and DATA in os.environ) or (chosen.pretrained and WEIGHTS in os.environ)
        results = Path("runs") / (chosen.name if quick else f"{chosen.name}-full")
        shipped = Path("results") / chosen.name
        if not (quick or own or named) and shipped.is_dir():
            results = shipped
    return Study(chosen, results, full=not quick)


def _show(study: Any, kind: str, names: list[str], output: Path, missing: bool, run: bool, jobs: int) -> None:
    """List what is missing, or run it and write the tables or figures."""
    from experiments import figures, runner, studies, tables

    jobs = jobs or min(_cores(), 8)
    present = [name for name in names if studies.status(study, f"{kind} {name}")[0] != "none"]
    if len(names) == 1 and not present and (missing or run):
        raise ValueError(f"{kind} {names[0]} is not part of preset {study.preset.name}")
    wanted = {run.name: run for name in present for run in studies.needs(study, f"{kind} {name}")}
    if missing:
        print("\n".join(_missing_lines(study, list(wanted.values()), jobs)) or "nothing is missing")
        return
    if run and study.missing(list(wanted.values())):
        with runner.exclusive(study.folder):
            study.execute(list(wanted.values()), jobs)
        study = studies.Study(study.preset, study.folder, study.full)
    folder, written = output / study.preset.name, 0
    for name in names:
        state, text = studies.status(study, f"{kind} {name}")
        if kind == "table":
            parts = tables.sections(study, name)
            files = tables.write(parts, name, folder)
            print("".join(f"{part.markdown()}\n\n" for part in parts), end="")
        else:
            picture = figures.draw(study, name)
            files = figures.save(picture, folder / f"figure-{name}") if picture else []
        written += bool(files)
        print(f"{kind} {name} ({text}): {', '.join(map(str, files)) or 'nothing to show'}")
        if origin := study.made_from(studies.needs(study, f"{kind} {name}")):
            print(f"    from {study.folder}: {origin}")
        if state in ("partial", "missing"):
            print(f"    the runs that it lacks: {studies.command(study, f'{kind} {name}', '--missing')}")
    if not written:
        again = "; add --run to make them" if present else ""
        raise ValueError(f"none of the runs of {kind} {', '.join(names)} is in {study.folder}{again}")


def _show_claims(output: Path) -> None:
    """The table of the paper's claims from all shipped results, those on natural images first."""
    from experiments import tables
    from experiments.run import NAMED
    from experiments.studies import Study

    chosen = [presets.get(name) for name in presets.NAMES if (Path("results") / name).is_dir()]
    chosen.sort(key=lambda preset: (preset.data not in NAMED, not preset.trains))
    parts = tables.claims_section([Study(each, Path("results") / each.name, named=False) for each in chosen])
    if not parts:
        raise ValueError("no results of a preset are in results/: choose one by --preset, and its runs by --results")
    print("".join(f"{part.markdown()}\n\n" for part in parts), end="")
    print(f"table claims: {', '.join(map(str, tables.write(parts, 'claims', output)))}")


def _missing_lines(study: Any, runs: list[Any], jobs: int) -> list[str]:
    from experiments.studies import duration

    lacking = study.missing(runs)
    lines = [f"{run.name}: about {study.seconds([run]):.0f} s" for run in lacking]
    if lacking:
        text = duration(study.seconds(lacking) / jobs)
        lines.append(f"{len(lacking)} runs are missing, about {text} in {jobs} processes; --run makes them")
    return lines


@app.command()
@with_recipe_options
def train(
    preset: Annotated[str, typer.Option(help=_PRESETS + " What is not given below is taken from it.")] = "digits",
    model: Annotated[str | None, typer.Option(help=_MODELS)] = None,
    data: Annotated[str | None, typer.Option(help=_DIGITS_OR_FOLDER)] = None,
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
    from experiments.protocol import Run, weights_path

    chosen = presets.get(preset)
    model = _given(model, chosen.model)
    options = _options(option)
    taken = {
        name: value
        for name, value in chosen.model_options.items()
        if model == chosen.model or name in ("num_classes", "drop_path_rate")  # the others are of its architecture
    }
    model_options = taken | _options(model_option)
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
        trainer_options=chosen.trainer_options | _options(trainer),
    )
    _execute(run, output)
    print(f"weights: {weights_path(run.name, output)}")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help=_DIGITS_OR_FOLDER + " Only val is needed.")],
    weights: Annotated[Path | None, typer.Option(help="Weights: .safetensors, .pth or .ckpt.")] = None,
    ema: Ema = None,
    pretrained: Pretrained = False,
    downsampler: Method = "none",
    keep: Keep = None,
    gmacs: Gmacs = None,
    carry: Carry = False,
    qk_norm: QkNorm = None,
    alpha: Alpha = 1.0,
    learn_alpha: LearnAlpha = False,
    limit: Annotated[int, typer.Option(min=0, help="Use so many images of the folder only; 0: all.")] = 0,
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
    from experiments.protocol import Run

    if not weights and not pretrained:
        raise ValueError("evaluate needs --weights FILE or --pretrained")
    options, model_options = _options(option), _options(model_option)
    run = Run(
        stage="evaluate",
        label=_plain_name(name)
        or "-".join(filter(None, [model, downsampler, _file_name(keep, gmacs), "carry" if carry else ""])),
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
        allow_empty_classes=allow_empty_classes,
        allow_truncated=allow_truncated,
        options=options,
        model_options=model_options,
        trainer_options=_options(trainer),
    )
    _execute(run, output)


@app.command()
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
    output: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("runs/explain"),
) -> None:
    """Pool a pretrained model on one image: what it sees before and after, what it costs, and which patches merge."""
    from experiments.explain import explain as explained

    given = [option for option in (level, keep, gmacs) if option is not None]
    if len(given) > 1:
        raise ValueError("--level, --keep and --gmacs are three ways to say one thing: give one of them")
    schedule = (
        {"gmacs": gmacs} if gmacs is not None else {"keep": keep or f"deit_small:{3 if level is None else level:g}"}
    )
    for line in explained(image, model, method, schedule, carry, weights, output, ema):
        print(line)


@app.command()
def throughput(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option(help=_MODELS + " Repeatable; default: DeiT-S.")] = None,
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
    compiled: Annotated[bool, typer.Option("--compile", help="Compile both models.")] = False,
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
    import itertools

    import torch

    from experiments import figures, speed
    from experiments import throughput as timing

    context.with_resource(timing.threads(threads))
    schedules = [*(keep or []), *(f"deit_small:{one:g}" for one in level or ([] if keep else [3]))]
    choices = itertools.product(
        model or ["deit_small_patch16_224"],
        method or ["wkmedoids"],
        schedules,
        batch_size or [32],
        image_size or [None],
    )
    if "none" in (method or []):
        raise ValueError("--method none is the plain model, which every method is compared with")
    settings = [
        speed.Setting(
            name,
            chosen,
            None if chosen == "convolution" else schedule,
            batch,
            size,
            precision,
            compiled,
            train,
            carry,
            _options(option),
        )
        for name, chosen, schedule, batch, size in choices
    ]
    if against:
        settings, before = speed.stored(against)
        missing = {one.run_name(device) for one in settings} - {one["run"] for one in before}
        if missing or before[0]["threads"] != torch.get_num_threads():
            raise ValueError(
                f"{against} holds results of {before[0]['threads']} threads on {before[0]['device']}: "
                "only the same can be compared; see --threads and --device"
            )
        if output.resolve() == against.resolve():
            raise ValueError(f"--output {output} is what it is compared with: choose another folder")
    found = []
    for one in speed.run(settings, output, device, repeats):
        found.append(one)
        print(
            f"{one['run']}: {one['images_per_second']:.1f} images/s, plain {one['plain_images_per_second']:.1f}; "
            f"speed-up {one['speed_up']:.2f} of {one['flops_ratio']:.2f}, realised {one['realised_fraction']:.2f}",
            flush=True,
        )
    with files.atomic_write(output / "table.md") as path:
        path.write_text(speed.table(found) + "\n")
    pictures = figures.save(speed.picture(found), output / "speed-up")
    if len({one["tokens"] for one in found}) > 1:
        pictures = [*pictures, *figures.save(speed.growth(found), output / "growth")]
    print(f"\n{speed.table(found)}\n\nTable: {output / 'table.md'}\nPictures: {', '.join(map(str, pictures))}")
    if against and (lines := speed.fallen(found, before, tolerance)):
        print("\nSlower than before:", *lines, sep="\n")
        raise typer.Exit(1)


@app.command("clustering-speed")
def clustering_speed(
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Of an image, N.")] = 196,
    clusters: Annotated[int, typer.Option(min=1, help="Of an image, K.")] = 98,
    width: Annotated[int, typer.Option(min=1, help="Of a token, D.")] = 384,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Times that are taken of each.")] = 7,
) -> None:
    """Time weighted K-Medoids against an implementation that loops over images and clusters in Python."""
    from experiments import speed

    if clusters > tokens:
        raise ValueError(f"--clusters {clusters} are more than --tokens {tokens}")
    taken = speed.clustering_speed(batch_size, tokens, clusters, width, device, repeats)
    own = taken["kmedoids"]
    print(f"kmedoids: {1000 * own:.2f} ms")
    print(f"looped in Python: {1000 * taken['looped']:.1f} ms, {taken['looped'] / own:.0f} times that")
    early = taken["looped_ending_early"]
    print(f"looped in Python, ending early as kmedoids does: {1000 * early:.1f} ms, {early / own:.0f} times that")


@app.command("check-data")
def check_data(
    data: Annotated[str, typer.Option(help=_FOLDER_OR_HUB)],
    part: Annotated[list[str] | None, typer.Option(help="train or val. Repeatable; default: both.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write. Default: in runs/check-data/.")] = None,
    allow_empty_classes: AllowEmpty = False,
    allow_truncated: AllowTruncated = False,
) -> None:
    """Read every image once, and name those that cannot be read. Goes on where it was interrupted."""
    from experiments.check_data import PARTS
    from experiments.check_data import check_data as checked

    for line in checked(data, part or PARTS, jobs or _cores(), output, allow_empty_classes, allow_truncated):
        print(line)


def _execute(run: Any, folder: Path) -> None:
    """Execute a run that is not finished, and say what came out."""
    from experiments import protocol, runner
    from tokenpool.analysis import results

    path = protocol.result_path(run, folder)
    with runner.exclusive(folder):
        if protocol.is_finished(run, folder):
            print("finished already:")
            outcome = results.read(path)
        else:
            outcome = protocol.execute(run, folder, progress=True)
    metrics, cost = outcome["metrics"], outcome["cost"]
    if "warning" in outcome:
        print(f"warning: {outcome['warning']}", file=sys.stderr)
    images = f"{metrics['images']} images"
    if "among_classes" in outcome:
        images += f", among {len(outcome['among_classes'])} of the model's classes"
    print(
        f"top-1 {metrics['top1']:.2f} ± {metrics['top1_error']:.2f} %, top-5 {metrics['top5']:.2f} % of "
        f"{images}; {cost['gmacs']:.4g} GMACs, of which clustering {cost['clustering_gmacs']:.4g}"
    )
    print(f"result: {path}")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _plain_name(name: str) -> str:
    """A part of the names of files, as the user gives it."""
    if os.sep in name:
        raise ValueError(f"--name {name} must be a name without {os.sep}: --output names the folder")
    return name


def _path(path: Path | None) -> str | None:
    """A path with a separator in it, which tells it from the name of a run."""
    if path is None:
        return None
    return str(path) if os.sep in str(path) else f".{os.sep}{path}"


def _schedule(
    keep: str | None, gmacs: float | None, downsampler: str, model: str, options: Any, model_options: Any
) -> tuple[int, ...] | None:
    """The schedule that --keep or --gmacs means for this model."""
    from tokenpool import create_model, hosts

    if keep is None and gmacs is None:
        return None
    # For its size; no weights, and whether sizes are carried changes no schedule.
    built = create_model(model, downsampler, keep, gmacs=gmacs, carry=False, **options, **model_options)
    return hosts.of(built).setting.keep


def _file_name(keep: str | None, gmacs: float | None) -> str:
    if gmacs is not None:
        return f"{gmacs:g}gmacs"
    text = (keep or "").replace(":", "-level").replace(",", "_").replace("@", "at")
    return f"step{text[1:]}" if text.startswith("-") else text


def _options(pairs: list[str] | None) -> dict[str, Any]:
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


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], filename: str, *rest: Any
) -> None:
    """A warning of these packages to their user, in one line and without the code that gives it."""
    own = {Path(__file__).parent, Path(files.__file__).parent}
    if issubclass(category, UserWarning) and own & set(Path(filename).parents):
        tqdm.write(f"warning: {message}", file=sys.stderr)  # beside the bars of progress
    else:
        otherwise(message, category, filename, *rest)


def _describe_methods() -> None:
    """Write the help of `--downsampler` and `--method`: all methods that are registered now."""
    methods = [f"{method.name} - {method.description}" for method in REGISTRY.values()]
    _METHOD.help = "\n\n".join(["What remains after the attention of each block, where K is from --keep.", *methods])


def main() -> None:
    """Run the command line; a mistake in the input ends in one line, not in a traceback."""
    import matplotlib

    os.environ["MPLBACKEND"] = "Agg"  # for the processes that it starts
    matplotlib.use("Agg")
    _describe_methods()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            app()
    except Interrupted as error:
        print(error if error.requeued else f"{error}; the same command goes on", file=sys.stderr)
        sys.exit(0 if error.requeued else 1)
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("TOKENPOOL_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except SystemExit as error:
        if error.code == 130:  # what typer makes of Ctrl-C
            print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
