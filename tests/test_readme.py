"""What readers of the README and of the documentation will run is run here."""

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import tokenpool
from experiments import artifacts, commands, presets
from tokenpool import hosts
from tokenpool.commands import table
from tokenpool.commands.shell import load
from tokenpool.downsampling import METHODS, REGISTRY, registry
from tokenpool.runs.study import Study

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
README, METHODS_PAGE, OFF_THE_SHELF, FINE_TUNED, CLAIMS = (
    PAGES[name]
    for name in (
        "README.md",
        "docs/explanation/methods.md",
        "docs/results/off-the-shelf.md",
        "docs/results/fine-tuned.md",
        "docs/results/claims.md",
    )
)
SNIPPET = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", flags=re.DOTALL)  # the code, and what it prints
RUNS_ELSEWHERE = "docs/results/speed.md"  # its snippet compares with public code that is not installed here
SNIPPETS = {
    name: SNIPPET.findall(page) for name, page in PAGES.items() if name != RUNS_ELSEWHERE and "```python" in page
}
COMMANDS = {name: load(name, command) for name, command in commands.COMMANDS.items()}
PROGRAMS = ("python -m experiments", "tokenpool")


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 14
    assert sum(bool(shown) for page in SNIPPETS.values() for _, shown in page) == 14


@pytest.mark.slow
@pytest.mark.parametrize("page", SNIPPETS)
def test_snippets_run(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """The snippets of a page run one after the other, and print what the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hosts, "ADAPTERS", [*hosts.ADAPTERS])
    monkeypatch.setattr(registry, "REGISTRY", {**registry.REGISTRY})
    (tmp_path / "results").symlink_to(ROOT / "results")
    (tmp_path / "runs").mkdir()
    names: dict[str, Any] = {}
    for code, expected in SNIPPETS[page]:
        exec(compile(code, page, "exec"), names)
        shown = capsys.readouterr().out
        assert not expected or shown == expected


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_reference_has_all_public_names() -> None:
    pages = [page for name, page in PAGES.items() if name.startswith("docs/reference/")]
    documented = {path for page in pages for path in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)}
    own = {name: getattr(tokenpool, name) for name in tokenpool.__all__ if name not in ("METHODS", "__version__")}
    for name, thing in own.items():
        path = thing.__name__ if inspect.ismodule(thing) else f"{thing.__module__}.{thing.__name__}"
        places = {f"tokenpool.{name}", path, path.rpartition(".")[0]}
        assert places & documented or any(each.startswith(f"{path}.") for each in documented), name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_claims_are_those_of_the_shipped_results() -> None:
    """Each row of the table is what `python -m experiments table claims` prints, and so is the rule."""
    named = ("cifar10_128", "pretrained", "digits")
    studies = [Study(presets.get(name), ROOT / "results" / name, named=False) for name in named]
    (section,) = artifacts.sections(studies, "claims")
    rows = [f"| {' | '.join(cells)} |" for cells in (section.shown.columns, *section.shown.itertuples(index=False))]
    assert table_rows(CLAIMS) == rows
    assert " ".join(section.notes[0].split()) in " ".join(CLAIMS.split())
    chosen = table_rows(README)
    assert chosen == [row for row in rows if row in chosen]
    assert f"{len(chosen) - 1} of {len(rows) - 1} claims" in README
    assert {row.rpartition(" | ")[2] for row in rows} == {row.rpartition(" | ")[2] for row in chosen} | {"open |"}


def table_rows(page: str) -> list[str]:
    """The rows of a page's only table, without the line below the header."""
    return [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| ---")]


def inline(page: str) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))


def command_lines(page: str) -> list[list[str]]:
    """The commands that a page names, as words, from the verb on."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGES[page], flags=re.DOTALL)).replace("\\\n", "")
    named = [code.replace("\n", " ") for code in inline(page)]
    named = [f"{code} --help" if code.rpartition(" ")[0] in PROGRAMS else code for code in named]  # a verb alone
    found = [re.match(rf"(?:\w+=\S+ )*(?:{'|'.join(PROGRAMS)}) (.*)", line) for line in [*blocks.splitlines(), *named]]
    lines = [match[1] for match in found if match]
    # Inline code also names commands by their verb alone.
    lines += [code for code in named if code.split()[0] in COMMANDS and " " in code]
    return [shlex.split(line, comments=True) for line in lines]


def test_there_are_commands() -> None:
    assert sum(len(command_lines(page)) for page in PAGES) > 60


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    assert not re.search(rf"python -m experiments ({'|'.join(table.COMMANDS)})\b", PAGES[page])
    for verb, *arguments in command_lines(page):
        if verb == "--help":
            continue
        try:
            COMMANDS[verb].make_context(verb, [*arguments]).close()
        except typer.Exit:
            assert arguments == ["--help"]
        except Exception as error:
            pytest.fail(f"{verb} {arguments}: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_options_targets_variables_and_files_in_inline_code_exist(page: str) -> None:
    parameters = [parameter for command in COMMANDS.values() for parameter in command.params]
    options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    known, targets = (
        {"--signal", "--help"},
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE),
    )
    sources = "".join(
        path.read_text()
        for path in [path for name in ("tokenpool", "experiments") for path in (ROOT / name).rglob("*.py")]
    )
    own = {"paper/", "my_preset.py", "my_method.py"}
    files = {path.name for folder in ("tokenpool", "experiments") for path in (ROOT / folder).rglob("*.py")}
    for code in inline(page):
        if code.startswith("--"):
            assert set(re.findall(r"(?:^| )(--[\w-]+)", code)) <= options | known, code
        if code.startswith("make "):
            assert code.split()[1] in targets, code
        for variable in re.findall(r"TOKENPOOL_\w+", code):
            assert f'"{variable}"' in sources, code
        if re.fullmatch(r"[\w./-]*/", code) or re.fullmatch(r"[\w/.-]+\.(py|md|sh)", code):
            assert (ROOT / code).exists() or (ROOT / "tokenpool" / code).exists() or code in {*files, *own}, code


def named(page: str) -> Iterator[tuple[str, Any, list[str]]]:
    """What inline code names of tokenpool: the code, the object, and the keywords that it is called with."""
    for code in inline(page):
        match = re.search(r"tokenpool\.([\w.]+)(\(.*\))?", code)
        if match and "/" not in code:
            found = tokenpool
            for name in match[1].split("."):
                found = getattr(found, name)
            called = ast.parse(match[0], mode="eval").body if match[2] else None
            yield code, found, [keyword.arg for keyword in called.keywords] if called else []


def test_names_in_inline_code_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compare", "module", "plotting", "results", "soft_selection"):
        monkeypatch.delitem(vars(tokenpool), name, raising=False)  # as if nobody had imported it
    found = [one for page in PAGES for one in named(page)]
    assert len(found) > 8 and tokenpool.compare in [thing for _, thing, _ in found]
    for code, thing, keywords in found:
        assert not keywords or set(keywords) <= inspect.signature(thing).parameters.keys(), code


def test_arguments_in_inline_code_exist() -> None:
    known = {"fullgraph"}
    for function in (tokenpool.patch, tokenpool.load_weights):
        known |= inspect.signature(function).parameters.keys()
    for method in filter(None, METHODS.values()):
        known |= inspect.signature(method).parameters.keys() | inspect.signature(method.for_blocks).parameters.keys()
    for code in inline("docs/how-to/pool-a-model.md") + inline("docs/how-to/choose.md"):
        match = re.match(r"([a-z_]+)=", code)
        assert not match or match[1] in known, code


def test_the_table_of_methods_is_the_registry() -> None:
    section = METHODS_PAGE.partition("## All methods\n")[2].partition("\n## ")[0]
    rows = [f"| `{method.name}` | {method.description} |" for method in REGISTRY.values()]
    assert [line for line in section.splitlines() if line.startswith("| `")][1:] == rows  # the first is the header


def test_the_table_of_cifar10_is_the_runs() -> None:
    frame = tokenpool.results.load(ROOT / "results" / "cifar10_128")
    frame = frame[(frame["options"].map(len) == 0) & ~frame["carry"]]
    rows = {"K-Medoids": "kmedoids", "K-Means": "kmeans", "WK-Means": "wkmeans", "WK-Medoids": "wkmedoids"}
    for title, method in (rows | {"importance selection": "importance", "random selection": "random"}).items():
        levels = [{"level": level} for level in (1, 2, 3, 4)] + [{}]
        pairs = [
            [{"stage": "finetune", "downsampler": name} | level for name in (method, "power_bert")] for level in levels
        ]
        found = [tokenpool.compare(frame, *pair) for pair in pairs]
        cells = [f"{each.difference:+.1f} ({each.low:+.1f}, {each.high:+.1f})" for each in found]
        assert f"| {title} | {' | '.join(cells)} |" in FINE_TUNED


def test_the_table_of_photographs_is_the_runs() -> None:
    from tokenpool.analysis import results

    rows = {
        "PoWER-BERT": "power_bert",
        "importance selection": "importance",
        "random selection": "random",
        "WK-Medoids": "wkmedoids",
        "WK-Medoids, carry": "wkmedoids-carry",
        "K-Medoids, carry": "kmedoids-carry",
        "WK-Means, carry": "wkmeans-carry",
    }
    for title, label in rows.items():
        cells = []
        for level in (1, 3):
            metrics = results.read(ROOT / f"results/pretrained/evaluate-{label}-level{level}-seed0.json")["metrics"]
            cells.append(f"{metrics['top1']:.1f} ± {metrics['top1_error']:.1f}")
        assert f"\n| {title} | {' | '.join(cells)} |\n" in OFF_THE_SHELF


def test_the_counted_costs_beside_the_published_ones() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| DeiT-(\w+) \| `(.+?)` \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|", METHODS_PAGE, re.MULTILINE
    )
    assert len(rows) == 9
    for method, size, setting, backbone, total in rows:
        model = {"S": "deit_small_patch16_224", "Ti": "deit_tiny_patch16_224"}[size]
        names, _, value = setting.rpartition("=")
        options = dict.fromkeys(names.split("="), ast.literal_eval(value))
        count = tokenpool.flops.count(tokenpool.create_model(model, method, **options))
        assert (f"{count.backbone_gmacs:.3f}", f"{count.gmacs:.3f}") == (backbone, total), setting


def test_the_tables_of_rivals_are_the_runs() -> None:
    study = Study(presets.get("cifar10_128"), ROOT / "results" / "cifar10_128", named=False)
    methods, schedules = artifacts.sections([study], "rivals")
    assert not any("missing" in note for note in schedules.notes)
    for cells in methods.shown.itertuples(index=False):
        assert f"| {' | '.join(cells)} |" in FINE_TUNED
