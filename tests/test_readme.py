"""What readers of the README will run is run here."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.strip().splitlines()[-1][:40])
def test_snippets_run(
    snippet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    exec(compile(snippet, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    if "GMACs, of which" in snippet:
        assert shown.strip() == "2.33 GMACs, of which clustering 0.06"
    elif "tokenpool.save" in snippet:
        assert shown.startswith("[194, 187, ") and (tmp_path / "runs" / "pooled.safetensors").exists()
    else:
        assert "finetune-wkmedoids" in shown


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_methods_are_all_named() -> None:
    from tokenpool.downsampling import METHODS

    for name in METHODS:
        assert f"`{name}`" in README


def test_the_table_of_photographs_is_the_runs() -> None:
    from tokenpool import results

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
        assert f"\n| {title} | {' | '.join(cells)} |\n" in README
