"""`python -m experiments`: what it inherits, prints and refuses."""

import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import commands, presets
from tokenpool.analysis import results
from tokenpool.commands import table

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_backend_of_matplotlib_that_the_shell_names_is_not_used(tmp_path: Path) -> None:
    """Jupyter leaves its own in the variable, for all that is started from a notebook."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "figure", "2", "--output", str(tmp_path)],
        env=os.environ | {"MPLBACKEND": "unknown"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits" / "figure-2.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_notebook_keeps_its_backend() -> None:
    script = (
        "import experiments.__main__, experiments.show.report, tokenpool.tools.benchmark, matplotlib, os\n"
        "print(matplotlib.get_backend(), os.environ['MPLBACKEND'])"
    )
    environment = os.environ | {"MPLBACKEND": "svg"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.split() == ["svg", "svg"], said.stderr


@pytest.mark.parametrize(("package", "known"), [("experiments", commands.COMMANDS), ("tokenpool", table.COMMANDS)])
def test_the_help_of_all_commands_is_fast(package: str, known: dict[str, table.Command]) -> None:
    """It imports nothing that takes seconds, and its text is the first paragraph of each command's docstring."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = [{package!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({package!r}, run_name='__main__')\n"
        "finally:\n"
        "    print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"COLUMNS": "300"}, cwd=ROOT, capture_output=True, text=True
    )
    imported = set(done.stderr.splitlines()[-1].split())
    assert "typer" in imported
    assert not imported & {"torch", "numpy", "timm", "lightning", "pandas", "matplotlib", "yaml"}
    for name, command in known.items():
        paragraph = inspect.getdoc(table.function(name, command)).partition("\n\n")[0].replace("\n", " ")
        assert command.summary == paragraph, name
        assert re.search(f"{name} +{re.escape(paragraph)}", done.stdout), name


def test_the_help_of_a_command_is_its_own(in_process) -> None:
    done = in_process("train", "-h")
    assert done.returncode == 0 and " train [OPTIONS]" in done.stdout
    assert "--retention-penalty" in done.stdout and "wkmedoids - " in done.stdout
    unknown = in_process("tran", "-h")
    assert unknown.returncode == 2 and "No such command 'tran'. Did you mean 'train'?" in unknown.stderr


def test_a_table_is_printed_as_it_is_written(in_process, tmp_path: Path) -> None:
    done = in_process("table", "5", "--output", str(tmp_path))
    assert done.returncode == 0
    written = sorted((tmp_path / "digits").glob("*.md"))
    assert len(written) == 2
    for path in written:
        assert f"{path.read_text()}\n" in done.stdout and str(path) in done.stdout


RUNS = ROOT / "results" / "digits"


def changed(folder: Path, change: Callable[[dict], object]) -> Path:
    """A copy of the shipped results, each with something changed."""
    for path in RUNS.glob("*.json"):
        outcome = results.read(path)
        change(outcome)
        (folder / path.name).write_text(json.dumps(outcome))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda outcome: outcome["metrics"].clear(),
        lambda outcome: outcome["metrics"].update(dict.fromkeys(outcome["metrics"])),
        lambda outcome: outcome["metrics"].update(dict.fromkeys(outcome["metrics"], "text")),
        lambda outcome: outcome["setting"].clear(),
        lambda outcome: outcome.update(identity=[1]),
        lambda outcome: outcome.update(environment="text"),
    ],
)
@pytest.mark.parametrize("verb", [("figure", "redundancy"), ("figure", "1c"), ("figure", "12", "--missing")])
def test_results_that_are_none_are_named(in_process, tmp_path: Path, change: Callable, verb: tuple[str, ...]) -> None:
    done = in_process(*verb, "--results", str(changed(tmp_path, change)), "--output", str(tmp_path / "out"))
    assert "warning: " in done.stderr and f"{tmp_path}/" in done.stderr
    assert all(line.startswith(("warning: ", "error: ")) for line in done.stderr.splitlines()), done.stderr
    if "--missing" not in verb:
        assert done.returncode == 1 and f"none of the runs of figure {verb[1]} is in {tmp_path}" in done.stderr


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, '{"setting": {}, "metrics": {}, "cost": {}}'])
def test_files_that_are_no_results_are_named(in_process, tmp_path: Path, text: str) -> None:
    path = tmp_path / "base-seed0.json"
    path.write_text(text)
    done = in_process("run", "base-seed0", "--results", str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith(f"error: {path} ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("figure", "9", "--results", "{file}"), "{file} is a file, not a folder of results"),
        (("report", "--results", "{file}"), "{file} is a file, not a folder of results"),
        (("table", "2", "--preset", "{file}"), "cannot read preset {file}: SystemExit"),
        (("train", "--data", "", "--epochs", "1"), "no images: --data or the variable TOKENPOOL_DATA must name"),
        (("train", "--model", "", "--epochs", "1"), "timm knows no model ''"),
        (("train", "--name", "../x"), "--name ../x must be a name without /"),
        (("train", "--option", "a=["), "'a=[' must have the form name=value with a YAML value"),
        (("train", "--model-option", "embed_dim=7"), "neither 'deit_digits_patch2_16' nor downsampler 'none' takes"),
        (("train", "--option", "=1"), "'=1' must have the form name=value"),
        (("evaluate", "--name", "a/b", "--data", "digits", "--model", "x", "--pretrained"), "--name a/b must be"),
    ],
)
def test_silly_input_is_named_in_one_line(in_process, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    file = tmp_path / "preset.py"
    file.write_text("raise SystemExit")
    output = () if arguments[0] == "report" else ("--output", str(tmp_path / "out"))
    done = in_process(*(one.format(file=file) for one in arguments), *output)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said.format(file=file)}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_warning_of_the_package_is_one_line_and_others_stay(in_process, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(name: str) -> None:
        files = {"experiments": presets.__file__, "elsewhere": "/elsewhere/module.py"}
        for told, filename in files.items():
            warnings.warn_explicit(f"of {told}", UserWarning, filename, 7)
        raise ValueError("enough")

    monkeypatch.setattr(presets, "get", get)
    before = warnings.showwarning
    done = in_process("table", "2")
    assert done.stderr.startswith("warning: of experiments\n") and done.stderr.endswith("error: enough\n")
    assert "presets" not in done.stderr and warnings.showwarning is before
