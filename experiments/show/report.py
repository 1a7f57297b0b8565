"""All tables and figures on one page of HTML that needs no server and no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from tqdm import tqdm

import tokenpool
from experiments import artifacts
from experiments.artifacts import Artifact
from experiments.show import vector
from tokenpool import files
from tokenpool.analysis import results
from tokenpool.runs.environment import commit
from tokenpool.runs.run import result_path
from tokenpool.runs.study import Study


def write(studies: Sequence[Study], path: Path) -> Path:
    """Write the page; returns its path.

    Args:
        studies: whose runs to show, the first one first.
        path: of the file to write.
    """
    figures = vector.Page()
    items = [_item(studies, each, figures) for each in tqdm(shown(), unit="picture", leave=False)]
    template = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html").read_text())
    page = template.render(
        items=items,
        figure_style=Markup(figures.style()),
        studies=[{"title": study.preset.title} for study in studies],
        command="python -m experiments report",
        version=tokenpool.__version__,
        commit=commit(),
    )
    with files.atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def shown() -> Sequence[Artifact]:
    """The tables and figures of the page, in their order."""
    return list(artifacts.ARTIFACTS.values())


def _item(studies: Sequence[Study], artifact: Artifact, figures: vector.Page) -> dict[str, Any]:
    is_table = artifact.kind == "table"
    parts = _table_parts(studies, artifact) if is_table else _figure_parts(studies, artifact, figures)
    notes = [_provenance(study, artifact) for study in studies]
    parts.append({"notes": list(dict.fromkeys(filter(None, notes)))})
    kind, name = artifact.kind, artifact.name
    return {
        "kind": kind,
        "name": f"{kind.capitalize()}{'' if name[0].isdigit() else ':'} {name}",
        "anchor": f"{kind}-{name}",
        "title": artifact.title,
        "caption": artifact.caption,
        "states": [_state(study, artifact) for study in studies],
        "parts": parts,
    }


def _state(study: Study, artifact: Artifact) -> dict[str, str]:
    state, _ = artifacts.status(study, artifact.key)
    runs = artifact.runs(study)
    short = {"none": "-", "partial": f"partial, {len(study.finished(runs))}/{len(runs)}"}.get(state, state)
    return {"status": state, "short": short}


def _table_parts(studies: Sequence[Study], artifact: Artifact) -> list[dict[str, Any]]:
    return [
        {
            "heading": section.title,
            "table": Markup(section.shown.to_html(index=False, border=0, escape=True)),
            "notes": section.notes,
        }
        for section in artifacts.sections(studies, artifact.name)
    ]


def _figure_parts(studies: Sequence[Study], artifact: Artifact, figures: vector.Page) -> list[dict[str, Any]]:
    parts = []
    for study in studies:
        runs = artifact.runs(study)
        if not runs and study is not studies[0]:
            continue  # the paper's own part is shown once
        wide = artifacts.draw(study, artifact.name)
        if wide is None:
            if runs and study.finished(runs):
                parts.append({"notes": [f"{study.preset.title}: not enough of its runs are there to draw it."]})
            continue
        narrow = artifacts.draw(study, artifact.name, stacked=True)
        drawn = [wide] if (wide.get_size_inches() == narrow.get_size_inches()).all() else [wide, narrow]
        label = f"{artifact.title}: {_described(wide)}"
        parts.append(
            {
                "heading": study.preset.title if runs else None,
                "pictures": [Markup(figures.add(figure, label)) for figure in drawn],
                "notes": [],
            }
        )
    if len(parts) == 1:
        parts[0].pop("heading", None)
    return parts


def _provenance(study: Study, artifact: Artifact) -> str | None:
    """Runs and commits behind a part, and the command that makes it; None if it is not part of the study."""
    runs = artifact.runs(study)
    state, text = artifacts.status(study, artifact.key)
    if state == "none":
        return None
    if not runs:
        return f"Needs no runs. Command: python -m experiments {artifact.key}"
    line = study.command(artifact.key, *([] if state == "done" else ["--run"]))
    found = [results.read(result_path(run, study.folder)) for run in study.finished(runs)]
    commits = sorted({str(each.get("environment", {}).get("commit")) for each in found})
    made = f", made at commit {' and '.join(commits)}" if commits else ""
    return f"{study.preset.title}: {text}{made}. Command: {line}"


def _described(figure: Figure) -> str:
    """Description of a figure for readers who cannot see it: the axes and the curves of each panel."""
    panels = []
    for ax in figure.axes:
        curves = ", ".join(ax.get_legend_handles_labels()[1])
        labels = f"{ax.get_ylabel()} against {ax.get_xlabel()}" if ax.get_xlabel() else ""
        panels.append("; ".join(filter(None, [ax.get_title(), labels, curves])))
    return " | ".join(filter(None, panels)).replace("\n", ", ")
