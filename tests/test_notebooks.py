"""The notebooks run as they are, and were committed with their pictures."""

import configparser
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "deit_tiny_patch16_224.safetensors"


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_seven_each_with_its_number() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == [*"1234567"]
    for path in NOTEBOOKS:
        title = nbformat.read(path, as_version=4).cells[1]
        assert title.cell_type == "markdown" and title.source.startswith(f"# {path.stem[0]}. ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_files_that_a_notebook_names_exist(path: Path) -> None:
    text = "\n".join(
        cell.source for cell in nbformat.read(path, as_version=4).cells[1:] if cell.cell_type == "markdown"
    )
    named = re.findall(r"`((?:docs|results|tokenpool|experiments|notebooks)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def installed_by(cell: nbformat.NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that a cell gives to the shell or to a magic."""
    shell = SimpleNamespace(found=[])
    shell.system = shell.found.append
    shell.run_line_magic = lambda name, line, *_: shell.found.append(f"{name} {line}")
    monkeypatch.chdir(folder)
    exec(TransformerManager().transform_cell(cell.source), {"get_ipython": lambda: shell})
    return shell.found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_on_colab_and_does_nothing_elsewhere(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository's address, extras that exist, and a clone exactly where a later cell reads its files."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    first, *others = nbformat.read(path, as_version=4).cells
    assert installed_by(first, tmp_path, monkeypatch) == []
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    found = installed_by(first, tmp_path, monkeypatch)
    code = "\n".join(cell.source for cell in others if cell.cell_type == "code")
    if re.search(r"\bexperiments\.|from experiments|results\W.*/", code):
        assert found[:2] == [f"git clone --quiet --depth 1 {config['metadata']['url']}", "cd tokenpool/notebooks"]
        assert installed_by(first, ROOT / "notebooks", monkeypatch) == []  # a second time, in the clone
        place = '"..[experiments]"'
    else:
        assert len(found) == 1 and found[0].endswith(f' @ git+{config["metadata"]["url"]}"')
        place = found[0].partition("--quiet ")[2].partition(" @")[0]
    assert found[-1].startswith("pip install --quiet ") and place in found[-1]
    extras = re.search(r"\[(.*)\]", found[-1])[1].split(",")
    assert {"experiments"} <= set(extras) <= set(config["options.extras_require"])
    assert ("huggingface" in extras) == ("transformers" in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if WEIGHTS.exists():
        monkeypatch.setenv("TOKENPOOL_WEIGHTS", str(WEIGHTS))
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "1"))  # random weights where there are none
    notebook = nbformat.read(path, as_version=4)
    committed = pictures(notebook)
    assert committed and not any("traceback" in str(cell.get("outputs")) for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    assert pictures(notebook) == committed
