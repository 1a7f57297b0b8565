"""The library needs few packages. Others are imported when first used, or an error names the extra to install."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("training", "analysis", "runs", "tools", "commands")  # need extras; each imports the ones before it only
HEAVY = ("lightning", "torchmetrics", "pandas", "matplotlib", "sklearn", "scipy", "transformers")
MISSING = """
import sys

class Without:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder, NAMES) for finder in sys.meta_path if hasattr(finder, "find_spec")]
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code in a new Python, with this checkout first on the path."""
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", path + code], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
def test_importing_the_library_imports_nothing_heavy(tmp_path: Path) -> None:
    """Neither does timm."""
    done = python(f"import tokenpool; print(*(name for name in {HEAVY} if name in sys.modules))", tmp_path)
    assert done.returncode == 0 and done.stdout.split() == [], done.stderr


@pytest.mark.slow
def test_models_are_patched_counted_traced_and_saved_without_what_is_heavy(tmp_path: Path) -> None:
    code = """
import torch, tokenpool
model = tokenpool.create_model("deit_digits_patch2_16", "wkmedoids", 0.7).eval()
images = torch.randn(2, 1, 16, 16)
count = tokenpool.flops.count(model)
assert count.gmacs > count.clustering_gmacs > 0
traced = tokenpool.trace(model, images)
assert traced.blocks[-1].tokens < 64
tokenpool.save(model, "model.safetensors")
assert torch.equal(tokenpool.load("model.safetensors").eval()(images), model(images))
tokenpool.unpatch(tokenpool.patch(tokenpool.unpatch(model), "kmeans", gmacs=0.01))
for name in ("results", "plotting", "compare", "module", "soft_selection"):
    try:
        getattr(tokenpool, name)
    except ModuleNotFoundError as error:
        print(name, error)
"""
    done = python(f"NAMES = {HEAVY}{MISSING}{code}", tmp_path)
    assert done.returncode == 0, done.stderr
    for name, line in zip(("results", "plotting", "compare"), done.stdout.splitlines()[:3], strict=True):
        assert line.startswith(f"{name} tokenpool.analysis needs matplotlib, pandas, scipy: ")
        assert 'pip install "tokenpool[experiments]"' in line
    for name, line in zip(("module", "soft_selection"), done.stdout.splitlines()[3:], strict=True):
        assert line.startswith(f"{name} tokenpool.training needs lightning, torchmetrics, sklearn: ")
        assert 'pip install "tokenpool[train]"' in line


@pytest.mark.slow
@pytest.mark.parametrize("package", ["experiments", "tokenpool"])
@pytest.mark.parametrize("names", [(*HEAVY, "typer"), ("pandas", "lightning")])
def test_the_command_line_names_the_extra_in_one_line(tmp_path: Path, names: tuple[str, ...], package: str) -> None:
    start = f"import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module({package!r}, run_name='__main__')"
    done = python(f"NAMES = {names}{MISSING}{start}", tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: the command line needs ")
    assert 'pip install "tokenpool[experiments]"' in done.stderr


def declared() -> dict[str, set[str]]:
    """The distributions that `setup.cfg` declares: of the core as "", and of each extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = {"": config["options"]["install_requires"]} | dict(config["options.extras_require"])
    return {extra: set(re.findall(r"^([\w.-]+)", text.lower(), re.MULTILINE)) for extra, text in lines.items()}


def imported(folder: Path) -> Iterator[tuple[Path, str]]:
    """The packages of others that the files of a folder import at their top level."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            yield from ((path.relative_to(ROOT), name.partition(".")[0]) for name in names)


def test_what_is_imported_is_declared() -> None:
    """A room of the library imports what the core and the room's extra bring, and no room below imports one above."""
    extras = {"tokenpool/training": ("train",), "experiments": ("experiments",)}
    # This module imports onnxscript at its top, which compiles its source. `tools.formats` imports the module late.
    extras |= {"tokenpool/tools/onnx_functions.py": ("onnx",)}
    extras |= {f"tokenpool/{room}": ("experiments",) for room in ROOMS[1:]}
    known, distributions = declared(), packages_distributions()
    checked = 0
    for folder in (ROOT / "tokenpool", ROOT / "experiments"):
        for path, name in imported(folder):
            if name in sys.stdlib_module_names or name in ("tokenpool", "experiments"):
                continue
            room = next((extra for room, extra in extras.items() if path.is_relative_to(room)), ())
            allowed = known[""].union(*(known[extra] for extra in room))
            if "experiments" in room:
                allowed |= known["train"]  # which the extra includes
            assert {one.lower() for one in distributions.get(name, [name])} & allowed, f"{path} imports {name}"
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room: str) -> None:
    above = "|".join([*ROOMS[ROOMS.index(room) + 1 :], "experiments"])
    found = sorted((ROOT / "tokenpool" / room).rglob("*.py"))
    assert found
    for path in found:
        imports = rf"^\s*(from|import) (tokenpool\.|tokenpool import (.*, )?)?({above})\b"
        assert not re.search(imports, path.read_text(), re.MULTILINE), path
