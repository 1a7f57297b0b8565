"""The layout of the library and of the experiments: no import circle, no long file, no file without a subject."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tokenpool", "experiments")
MOST_LINES = 400
NAMELESS = {"utils", "util", "common", "misc", "helpers", "shared"}


def files(package: str, root: Path = ROOT) -> dict[str, Path]:
    """The modules of a package, by name."""
    paths = {path.relative_to(root).with_suffix(""): path for path in (root / package).rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imported(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Modules that a module imports anywhere in its code, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from {full if full in modules else node.module} & modules


def graph(package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """For each module the modules that it imports."""
    found = files(package, root)
    return {name: set(imported(ast.parse(path.read_text()), set(found))) for name, path in found.items()}


def circle(package: str, root: Path = ROOT) -> list[str]:
    """The modules of an import circle, an empty list if there is none."""
    try:
        TopologicalSorter(graph(package, root)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_circle(package: str) -> None:
    assert not circle(package)


def test_a_circle_within_functions_is_found(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from package.a import x\n")
    (package / "a.py").write_text("from package import b\nx = 1\n")
    (package / "b.py").write_text("import math\n")
    assert graph("package", tmp_path) == {"package": {"package.a"}, "package.a": {"package.b"}, "package.b": set()}
    assert not circle("package", tmp_path)
    (package / "b.py").write_text("def f():\n    from package.a import x\n    return x\n")
    assert set(circle("package", tmp_path)) == {"package.a", "package.b"}


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short_and_have_a_subject(package: str) -> None:
    for path in files(package).values():
        name = path.relative_to(ROOT).as_posix()
        assert path.stem not in NAMELESS, name
        assert len(path.read_text().splitlines()) <= MOST_LINES, name


def test_the_library_does_not_import_the_experiments() -> None:
    """An installation has no package `experiments`."""
    both = {name for package in PACKAGES for name in files(package)}
    importing = [
        name
        for name, path in files("tokenpool").items()
        if any(other.startswith("experiments") for other in imported(ast.parse(path.read_text()), both))
    ]
    assert not importing


def test_only_adapters_name_the_parts_of_a_model() -> None:
    """Other families of models name their blocks and embeddings otherwise."""
    parts = {"patch_embed", "num_prefix_tokens", "embed_dim", "cls_token", "pos_embed", "global_pool"}
    for module in ("patching", "blocks", "flops", "budget", "tracing", "checkpoint", "weight_files"):
        tree = ast.parse((ROOT / "tokenpool" / f"{module}.py").read_text())
        named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not named & parts, module


def test_only_the_registry_names_data_sets() -> None:
    """A data set is one entry of `tokenpool.runs.data_sets`. Presets say which of them they use."""
    from tokenpool.runs.data_sets import DATA_SETS

    allowed = {ROOT / "tokenpool" / "runs" / "data_sets.py", *(ROOT / "experiments" / "presets").glob("*.py")}
    paths = [path for package in PACKAGES for path in files(package).values() if path not in allowed]
    assert len(paths) > 50
    for path in paths:
        compared = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
        texts = {part.value for node in compared for part in ast.walk(node) if isinstance(part, ast.Constant)}
        assert not texts & (DATA_SETS.keys() - {"cifar10"}), path


def private_names(code: str) -> set[str]:
    """The names with a leading underscore that a test takes from this repository: imported, by a dot, or as a text."""
    tree, own, found = ast.parse(code), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            own |= {alias.asname or alias.name for alias in node.names if alias.name.startswith(PACKAGES)}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGES):
            own |= {alias.asname or alias.name for alias in node.names}
            found |= {alias.name for alias in node.names if alias.name.startswith("_")}

    def is_own(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return is_own(node.value)
        return isinstance(node, ast.Name) and node.id in own

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_own(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr" and node.args:
            texts = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            named = is_own(node.args[0]) or any(str(text).startswith(PACKAGES) for text in texts)
            found |= {str(text).rpartition(".")[2] for text in texts if named}
    return {name for name in found if name.startswith("_") and not name.endswith("__")}


def test_tests_use_public_names() -> None:
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        assert not private_names(path.read_text()), path.name


def test_private_names_are_found() -> None:
    code = "from tokenpool.a import _b\nimport tokenpool\nfrom experiments import run\nimport os\n"
    code += "tokenpool.x._c\nrun._d()\nos._exit\npatch.setattr(run, '_e', 1)\npatch.setattr('experiments.run._f', 1)\n"
    assert private_names(code) == {"_b", "_c", "_d", "_e", "_f"}
