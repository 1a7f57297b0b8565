"""What readers of the README will run is run here."""

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
from tokenpool.downsampling import METHODS, REGISTRY
from tokenpool.runs.study import Study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
RUNS_ELSEWHERE = "performance.md"  # its snippet compares with public code that is not installed here
SNIPPETS = [
    snippet
    for name, page in PAGES.items()
    if name != RUNS_ELSEWHERE
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
]
COMMANDS = {name: load(name, command) for name, command in commands.COMMANDS.items()}


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 7


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.strip().splitlines()[-1][:40])
def test_snippets_run(
    snippet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    exec(compile(snippet, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    if "GMACs, of which" in snippet:
        assert shown.strip() == "2.30 GMACs, of which clustering 0.07"
    elif 'at="cost"' in snippet:
        assert shown.strip() == "+2.9 (+2.5, +3.3) in 3 seeds"
    elif "tokenpool.compare" in snippet:
        assert shown.strip() == "+3.8 (+3.3, +4.3), p = 2e-209"
    elif "np.subtract" in snippet:
        assert shown.strip() == "-0.0135 ± 0.0039"
    elif "tokenpool.save" in snippet:
        assert shown.startswith("[194, 186, ") and (tmp_path / "runs" / "pooled.safetensors").exists()
    elif "TinyAdapter" in snippet:
        hosts.ADAPTERS[:] = [adapter for adapter in hosts.ADAPTERS if adapter.FAMILY != "Tiny"]
        assert shown.strip() == "0.004973264 torch.Size([2, 10])"
    else:
        assert "wkmedoids-level" in shown


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page]):
        assert (folder / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_claims_are_those_of_the_shipped_results() -> None:
    """Each row of the table is what `python -m experiments table claims` prints, and so is the rule."""
    named = ("cifar10_128", "pretrained", "digits")
    studies = [Study(presets.get(name), ROOT / "results" / name, named=False) for name in named]
    (section,) = artifacts.sections(studies, "claims")
    for cells in section.shown.itertuples(index=False):
        assert f"| {' | '.join(cells)} |" in README
    assert f"| {' | '.join(section.shown.columns)} |" in README
    assert " ".join(section.notes[0].split()) in " ".join(README.split())


def inline(page: str) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))


def command_lines(page: str) -> list[list[str]]:
    """The commands of `python -m experiments` and `tokenpool` that a page names, as words, from the verb on."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGES[page], flags=re.DOTALL)).replace("\\\n", "")
    lines = [line.replace("\n", " ") for line in [*blocks.splitlines(), *inline(page)]]
    found = [re.search(r"(?:python -m experiments|^(?:\w+=\S+ )*tokenpool) (.*)", line) for line in lines]
    lines = [match[1] for match in found if match]
    # Inline code also names commands by their verb alone.
    lines += [code for code in inline(page) if code.split()[0] in COMMANDS and " " in code]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    lines = command_lines(page)
    if page != "README.md":  # shows the command of an installation first
        assert not re.search(rf"python -m experiments ({'|'.join(table.COMMANDS)})\b", PAGES[page])
    assert lines or page == "design.md"
    for verb, *arguments in lines:
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
    own = {"paper/", "my_preset.py"}
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
    assert len(found) > 8 and tokenpool.plotting.strip in [thing for _, thing, _ in found]
    for code, thing, keywords in found:
        assert not keywords or set(keywords) <= inspect.signature(thing).parameters.keys(), code


def test_arguments_in_inline_code_exist() -> None:
    known = {"fullgraph"}
    for function in (tokenpool.patch, tokenpool.load_weights):
        known |= inspect.signature(function).parameters.keys()
    for method in filter(None, METHODS.values()):
        known |= inspect.signature(method).parameters.keys() | inspect.signature(method.for_blocks).parameters.keys()
    for code in inline("README.md"):
        match = re.match(r"([a-z_]+)=", code)
        assert not match or match[1] in known, code


def test_the_table_of_methods_is_the_registry() -> None:
    section = README.partition("## Methods\n")[2].partition("\n## ")[0]
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
        assert f"| {title} | {' | '.join(cells)} |" in PAGES["results.md"]


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
        assert f"\n| {title} | {' | '.join(cells)} |\n" in PAGES["results.md"]


def test_the_counted_costs_beside_the_published_ones() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| DeiT-(\w+) \| `(.+?)` \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|", PAGES["methods.md"], re.MULTILINE
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
        assert f"| {' | '.join(cells)} |" in PAGES["results.md"]
