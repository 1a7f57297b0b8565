"""Old module names go on working, with a warning, and nothing here uses them."""

import ast
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

import tokenpool
from tokenpool.moved import MOVED, MOVED_NAMES

ROOT = Path(__file__).parent.parent
PUBLIC = [name.removeprefix("tokenpool.") for name in MOVED if name.removeprefix("tokenpool.") in tokenpool.__all__]


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_warns_once_and_gives_the_same_objects(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} has moved to {MOVED[old][0]}") as told:
        first = import_module(old)
    assert len(told) == 1
    for name in MOVED[old]:
        content = {key: value for key, value in vars(import_module(name)).items() if not key.startswith("_")}
        assert content and all(getattr(first, key) is value for key, value in content.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert import_module(old) is first


def test_names_import_from_several_modules_and_unknown_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOVED, "tokenpool.old", ("tokenpool.schedules", "tokenpool.files"))
    monkeypatch.delitem(sys.modules, "tokenpool.old", raising=False)
    with pytest.warns(
        DeprecationWarning, match=r"tokenpool\.old has moved to tokenpool\.schedules and tokenpool\.files"
    ):
        from tokenpool.old import check_local, paper
    assert paper is tokenpool.schedules.paper and check_local is tokenpool.files.check_local
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'tokenpool.old'"):
        from tokenpool.old import nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'tokenpool\.nothing'"):
        import_module("tokenpool.nothing")


@pytest.mark.slow
def test_public_names_of_the_package_do_not_warn() -> None:
    code = f"from tokenpool import {', '.join(PUBLIC)}; import tokenpool; tokenpool.compare; tokenpool.plotting.strip"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code], check=True, cwd=ROOT)
    assert len(PUBLIC) > 10


@pytest.mark.parametrize("folder", ["tokenpool", "experiments", "tests"])
def test_nothing_here_imports_an_old_name(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not set(names) & set(MOVED), f"{path}:{node.lineno}"


@pytest.mark.parametrize("module, name", [(module, name) for module in MOVED_NAMES for name in MOVED_NAMES[module]])
def test_a_moved_function_warns_and_is_the_same(module: str, name: str) -> None:
    new, _, renamed = MOVED_NAMES[module][name].partition(":")
    place = f"{new}.{renamed}" if renamed else new
    with pytest.warns(DeprecationWarning, match=f"^{module}.{name} has moved to {place}$"):
        assert getattr(import_module(module), name) is getattr(import_module(new), renamed or name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = import_module(module).nothing
