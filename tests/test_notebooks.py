"""The notebooks run as they are, and were committed with their pictures."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "deit_tiny_patch16_224.safetensors"


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_five() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5"]


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
