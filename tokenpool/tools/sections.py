"""Tables of results, for people (Markdown), for papers (LaTeX) and for programs (CSV)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd


@dataclass(frozen=True)
class Section:
    """One part of a table: the paper's numbers, or those of a study.

    Attributes:
        name: of its files: "paper" or the name of a preset.
        title: what it shows, on which data.
        shown: the cells, as text.
        raw: the numbers behind them.
        notes: for readers.
    """

    name: str
    title: str
    shown: pd.DataFrame
    raw: pd.DataFrame
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """For people."""
        parts = [f"**{self.title}**", self.shown.to_markdown(index=False, disable_numparse=True)]
        return "\n\n".join([*parts, *self.notes])

    def latex(self) -> str:
        """For papers; needs the package booktabs."""
        escaped = self.shown.map(_latex).rename(columns=_latex)
        tabular = escaped.to_latex(index=False, escape=False)
        return "".join([f"% {self.title}\n", tabular, *(f"% {note}\n" for note in self.notes)])


def write(parts: Iterable[Section], name: str, folder: Path) -> list[Path]:
    """Write a table as Markdown, LaTeX and CSV, one file of each for every part; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for part in parts:
        for suffix, text in (
            (".md", part.markdown() + "\n"),
            (".tex", part.latex()),
            (".csv", part.raw.to_csv(index=False)),
        ):
            files.append(folder / f"table-{name}-{part.name}{suffix}")  # the name may have dots
            files[-1].write_text(text)
    return files


def _latex(text: str) -> str:
    for character, replacement in (("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$")):
        text = text.replace(character, replacement)
    return text
