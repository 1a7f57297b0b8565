"""A result names the commit of its code."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from tokenpool.runs import environment


def commit_of(copied: Path) -> str | None:
    """The commit that a copy of the module finds."""
    spec = importlib.util.spec_from_file_location("copied", copied)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.commit()


def test_changed_code_is_marked_and_changed_results_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("tokenpool/runs", "results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "results" / "figure.png").write_text("old")
    copied = Path(shutil.copy(environment.__file__, tmp_path / "tokenpool" / "runs"))
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b.c commit -qm first"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    expected = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)

    assert commit_of(copied) == expected.stdout[:12]
    (tmp_path / "results" / "figure.png").write_text("new")
    (tmp_path / "results" / "run.json").write_text("{}")
    assert commit_of(copied) == expected.stdout[:12]
    copied.write_text(copied.read_text() + "\n")
    assert commit_of(copied) == f"{expected.stdout[:12]}-dirty"
    shutil.rmtree(tmp_path / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv(environment.COMMIT, "from elsewhere")
    assert commit_of(copied) == "from elsewhere"


@pytest.mark.parametrize(
    "place", [".venv/lib/site-packages/tokenpool/runs", "vendored/tokenpool/runs", "tokenpool/runs"]
)
def test_the_commit_of_another_repository_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Neither where the package is installed, nor where it is copied and tracked, nor where it is not tracked."""
    folder = tmp_path / place
    folder.mkdir(parents=True)
    copied = Path(shutil.copy(environment.__file__, folder))
    (tmp_path / "own.txt").write_text("of another project")
    tracked = "vendored" if "vendored" in place else ""
    for command in ("init -q", f"add own.txt {tracked}", "-c user.name=a -c user.email=a@b.c commit -qm other"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(environment.COMMIT, raising=False)
    assert commit_of(copied) is None
