"""The wheel: its content, and its work away from the clone, with the core alone and with all packages."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from test_light import MISSING

import tokenpool
from tokenpool.commands.table import COMMANDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE", "tokenpool", "experiments", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a copy of this checkout gives."""
    folder = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", "out", "."], cwd=folder, check=True, capture_output=True)
    return next((folder / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what an installation of the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"tokenpool", f"tokenpool-{tokenpool.__version__}.dist-info"}
    ours = {path for path in (ROOT / "tokenpool").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(ROOT).as_posix() for path in ours} == {name for name in names if name[9] == "/"}


def test_the_page_of_an_index_has_no_relative_link(site: Path) -> None:
    metadata = next(site.glob("*.dist-info/METADATA")).read_text()
    headers, page = HeaderParser().parsestr(metadata), metadata.partition("\n\n")[2]
    assert headers["Version"] == tokenpool.__version__ and headers["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    start = headers["Home-page"]
    own = [link for link in links if link.startswith(start)]
    assert len(own) > 10 and all(re.match(r"https?://|#", link) for link in links)
    for link in own:
        path = re.fullmatch(rf"{start}/(?:raw|blob)/v{re.escape(tokenpool.__version__)}/(.*)", link)
        assert path is not None and (ROOT / path[1]).exists(), link


def required(name: str) -> Iterator[str]:
    """The distributions that one needs, itself among them, without extras."""
    waiting, found = [name], set()
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            yield one
            try:
                needed = map(Requirement, requires(one) or [])
            except PackageNotFoundError:  # needed on another system
                continue
            applying = (each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""}))
            waiting += [each.name.lower() for each in applying]


def without_the_extras(site: Path) -> set[str]:
    """The packages of this environment that an installation of the core has not."""
    headers = HeaderParser().parsestr(next(site.glob("*.dist-info/METADATA")).read_text())
    core = [Requirement(text) for text in headers.get_all("Requires-Dist")]
    own = {each.name.lower() for each in core if each.marker is None}
    allowed = {one.replace("_", "-") for name in own for one in required(name)} | {"tokenpool"}
    provided = packages_distributions().items()
    return {name for name, by in provided if not {one.lower().replace("_", "-") for one in by} & allowed}


def python(code: str, site: Path, folder: Path, missing: set[str]) -> subprocess.CompletedProcess:
    """Run code in a new Python, away from the clone, with the wheel's content and without some packages.

    This environment knows the clone, and so `experiments`, by an editable installation.
    """
    start = f"import sys; sys.path.insert(0, {str(site)!r})\nNAMES = {missing | {'experiments'}}{MISSING}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", start + code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_core_alone_works_away_from_the_clone(site: Path, tmp_path: Path) -> None:
    missing = without_the_extras(site)
    assert {"lightning", "pandas", "matplotlib", "typer", "sklearn", "transformers"} <= missing
    assert not {"torch", "timm", "numpy", "fvcore", "safetensors"} & missing
    done = python((ROOT / "tests" / "smoke.py").read_text(), site, tmp_path, missing)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(str(site / "tokenpool" / "__init__.py"))


def console_script(site: Path, *arguments: str) -> str:
    """Code that does what the installed script `tokenpool` does."""
    entry = re.search(r"^tokenpool = ([\w.]+):(\w+)$", next(site.glob("*/entry_points.txt")).read_text(), re.MULTILINE)
    assert entry is not None
    return f"sys.argv = ['tokenpool', *{arguments}]\nfrom {entry[1]} import {entry[2]}\n{entry[2]}()"


def test_the_console_script_shows_its_commands_or_names_its_extra(site: Path, tmp_path: Path) -> None:
    bare = python(console_script(site, "--help"), site, tmp_path, without_the_extras(site))
    assert bare.returncode == 1 and bare.stderr.count("\n") == 1
    assert bare.stderr.startswith("error: the command line needs typer") and "tokenpool[experiments]" in bare.stderr
    shown = python(console_script(site, "--help"), site, tmp_path, set())
    assert shown.returncode == 0 and all(name in shown.stdout for name in COMMANDS), shown.stderr


def test_commands_are_imported_and_name_no_other_commit(site: Path, tmp_path: Path) -> None:
    """All commands, without `experiments`. The installation lies in the repository of another project."""
    commit = ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "other", "--allow-empty"]
    for command in (["init", "-q"], commit):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    installed = Path(shutil.copytree(site, tmp_path / "site-packages"))
    code = """
import json
from tokenpool.commands.table import COMMANDS, function
print(*(function(*entry).__name__.replace("_", "-") for entry in COMMANDS.items()))
from tokenpool.runs.environment import environment
print(json.dumps(environment()))
"""
    done = python(code, installed, tmp_path, set())
    assert done.returncode == 0, done.stderr
    names, result = done.stdout.splitlines()
    assert names.split() == list(COMMANDS)
    assert json.loads(result)["commit"] is None
    assert json.loads(result)["versions"]["tokenpool"] == tokenpool.__version__
