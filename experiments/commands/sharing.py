"""The command that writes the fine-tuned models of a preset as folders to share: `share`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

import tokenpool
from experiments import artifacts, presets
from experiments.commands.choice import study_of
from experiments.options import PRESETS, Quick, Results
from tokenpool.analysis import results as stored
from tokenpool.commands.options import named_values
from tokenpool.runs.data_sets import data_set
from tokenpool.runs.execute import build_model
from tokenpool.runs.run import Run, result_path, weights_path
from tokenpool.runs.study import Study


def share(
    output: Annotated[Path, typer.Option(help="Folder for the models: a sub-folder for each run.")],
    preset: Annotated[str, typer.Option(help=PRESETS)] = presets.DEFAULT,
    run: Annotated[
        list[str] | None,
        typer.Option(help='Only the models of such runs, such as "finetune-*-level2-seed2". Repeatable.'),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(help="Entry of the YAML part of the cards, repeatable: license=apache-2.0, base_model=USER/NAME."),
    ] = None,
    results: Results = None,
    quick: Quick = False,
) -> None:
    """Write the fine-tuned models of a preset for the Hugging Face Hub: weights, setting and model card."""
    given = named_values(metadata)
    study = study_of(preset, results, quick, shipped=False)
    for chosen in fine_tuned(study, run or ["*"]):
        folder = output / chosen.name
        write(chosen, study, folder, given)
        print(f"{folder}: upload it by `hf upload USER/NAME {folder}`", flush=True)


def fine_tuned(study: Study, patterns: Sequence[str]) -> list[Run]:
    """The finished fine-tunings of a study whose names match a pattern, each with its schedule.

    Raises:
        ValueError: if a pattern matches no finished fine-tuning.
        FileNotFoundError: if the weights of the matching runs are missing. The message says how to make them.
    """
    runs = [one for one in artifacts.everything(study) if one.stage == "finetune"]
    finished = [one for one in runs if result_path(one, study.folder).exists()]
    names = {one.name for one in finished if any(fnmatchcase(one.name, pattern) for pattern in patterns)}
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    made = _command("reproduce --full" if study.full else "reproduce", study)
    way_out = f"make them by `{made}`, or name the folder of other runs by --results"
    if unmatched:
        raise ValueError(f"{study.folder} has no fine-tuned model {unmatched[0]}: {way_out}")
    lacking = [name for name in sorted(names) if not weights_path(name, study.folder).exists()]
    if lacking:
        raise FileNotFoundError(
            f"{study.folder} has no weights of {len(lacking)} of {len(names)} models, for example {lacking[0]} (the "
            f"repository has results, but no weights): {way_out}, or choose others by --run"
        )
    return [one for one in finished if one.name in names]


def _command(verb: str, study: Study) -> str:
    """A command on the study in its default folder, without the user's own paths."""
    data = " --data FOLDER" if data_set(study.preset.data).must_be_named else ""
    return f"python -m experiments {verb} --preset {study.preset.argument}{data}"


def write(run: Run, study: Study, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write the model of a finished run and its card to a folder.

    Args:
        run: the run.
        study: its study.
        folder: folder of the model.
        metadata: further entries of the YAML part of the card.

    Raises:
        ValueError: if the weights are not those that the result tells of, or the result is of another setting.
    """
    result = result_path(run, study.folder)
    study.check_finished(run)
    trained = Run.from_setting(stored.read(result)["setting"])
    model = build_model(replace(trained, pretrained=False, start=None), study.folder)
    tokenpool.load_weights(model, weights_path(run.name, study.folder))
    data = data_set(run.data).hub
    known = {"datasets": [data]} if data else {}
    command = _command(f"run {run.name}" if study.full else f"run {run.name} --quick", study)
    tokenpool.save(model.eval(), folder, run=result, command=command, metadata=known | dict(metadata))
