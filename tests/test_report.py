"""The page of `python -m experiments report`."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_pages import Page

from experiments import artifacts, presets
from experiments.show import report
from tokenpool.runs.study import Study

ROOT = Path(__file__).parents[1]
COMMITTED = ("digits", "pretrained", "cifar10_128")


def write(path: Path, names: tuple[str, ...], *keys: str) -> str:
    """The page of some tables and figures, or of all of them."""
    with pytest.MonkeyPatch.context() as patch:
        if keys:
            patch.setattr(report, "shown", lambda: [artifacts.ARTIFACTS[key] for key in keys])
        studies = [Study(presets.get(name), ROOT / "results" / name) for name in names]
        return report.write(studies, path).read_text()


def test_every_figure_has_a_caption_in_words() -> None:
    captions = [artifact.caption for artifact in artifacts.ARTIFACTS.values() if artifact.kind == "figure"]
    assert all(len(caption.split()) > 10 and caption.endswith(".") for caption in captions)
    assert len(set(captions)) == len(captions)


@pytest.mark.slow
def test_the_whole_page(tmp_path: Path) -> None:
    """All tables and figures of the committed runs, in under 3 MB and without a network."""
    text = write(tmp_path / "page.html", COMMITTED)
    page = Page(text)
    assert len(text.encode()) < 3_000_000
    assert list(page.requests()) == [] and not re.findall(r"url\((?![\"']?(?:#|data:))", text)
    (policy,) = page.find("meta", http_equiv="Content-Security-Policy")
    assert "default-src 'none'" in policy[0]["content"]
    ids = [found["id"] for _, found, _ in page.elements if "id" in found]
    assert len(set(ids)) == len(ids)
    links = [found["href"] for found, _ in page.find("a")]
    assert {link[1:] for link in links} <= set(ids)
    assert links[: len(artifacts.ARTIFACTS) + 1] == [  # the table of contents, in the order of the page
        "#overview",
        *(f"#{each.kind}-{each.name}" for each in artifacts.ARTIFACTS.values()),
    ]
    captions = [text for _, text in page.find("figcaption")]
    assert len(captions) == len(page.find("figure")) > 30
    assert set(captions) == {each.caption for each in artifacts.ARTIFACTS.values() if each.kind == "figure"}
    drawings = page.find("svg", class_="drawing")
    assert len(drawings) >= len(captions) and all(found["aria-label"] for found, _ in drawings)
    assert len(page.find("span", class_="status")) > 60 and "@media print" in text
    assert "python -m experiments figure 1c --preset digits" in text


@pytest.mark.slow
def test_tables_are_sorted_and_put_back(tmp_path: Path, browser: Any) -> None:
    """By accuracy: up, down, and in the order of the page. Empty cells, which mean "as above", are filled meanwhile."""
    text = write(tmp_path / "page.html", ("digits",), "table 3")
    before = rows_of(Page(text))
    column = 2
    for clicks, state in ((1, "ascending"), (2, "descending"), (3, None)):
        button = f"document.querySelectorAll('#table-3 th button')[{column}]"
        script = f"<script>for (let i = 0; i < {clicks}; i++) {button}.click();</script>"
        (tmp_path / "clicked.html").write_text(text.replace("</body>", f"{script}</body>"))
        page = Page(browser(tmp_path / "clicked.html"))
        found = rows_of(page)
        if state is None:
            assert found == before
            continue
        values = [float(row[column]) for row in found]
        assert values == sorted(values, reverse=state == "descending")
        filled = list(before)
        for index, row in enumerate(filled):
            filled[index] = [row[0] or filled[index - 1][0], *row[1:]]
        assert sorted(found) == sorted(filled) and filled != before
        heads = [found.get("aria-sort") for found, _ in page.find("th", scope="col")]
        assert [each for each in heads if each] == [state]
    assert "aria-sort" not in [name for _, found, _ in page.elements for name in found]


def rows_of(page: Page) -> list[list[str]]:
    """The cells of the paper's part of Table 3, five methods at eight levels. Two cells of the overview are before."""
    cells = [text.strip() for _, text in page.find("td")]
    return np.reshape(cells[2 : 2 + 40 * 8], (40, 8)).tolist()
