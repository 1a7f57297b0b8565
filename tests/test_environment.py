"""A result names the commit of its code."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import environment


def test_changed_code_is_marked_and_changed_results_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("experiments", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "results" / "figure.png").write_text("old")
    copied = Path(shutil.copy(environment.__file__, tmp_path / "experiments"))
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b.c commit -qm first"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    expected = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)

    def found() -> str | None:
        spec = importlib.util.spec_from_file_location("copied", copied)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.commit()

    assert found() == expected.stdout[:12]
    (tmp_path / "results" / "figure.png").write_text("new")
    (tmp_path / "results" / "run.json").write_text("{}")
    assert found() == expected.stdout[:12]
    copied.write_text(copied.read_text() + "\n")
    assert found() == f"{expected.stdout[:12]}-dirty"
    shutil.rmtree(tmp_path / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv(environment.COMMIT, "from elsewhere")
    assert found() == "from elsewhere"
