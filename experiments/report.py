"""All tables and figures on one page of HTML that needs no server and no network."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from tqdm import tqdm

import tokenpool
from experiments import figures, protocol, tables
from experiments.studies import Study, command, needs, status
from tokenpool import files
from tokenpool.analysis import results

TABLE_TITLES = {
    "claims": "The paper's claims, and what data say",
    "1": "Where the computation goes",
    "2": "Best trade-offs over widths and schedules",
    "3": "Methods and schedules on DeiT-S",
    "4": "Methods and schedules on DeiT-e318",
    "5": "Methods and schedules on DeiT-e252",
    "off_the_shelf": "Best without fine-tuning",
}


def write(studies: Sequence[Study], path: Path) -> Path:
    """Write the page; returns its path.

    Args:
        studies: whose runs to show, the first one first.
        path: of the file to write.
    """
    names = [("table", name) for name in tables.NAMES] + [("figure", name) for name in figures.NAMES]
    items = [_item(studies, kind, name) for kind, name in tqdm(names, unit="picture", leave=False)]
    template = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html").read_text())
    page = template.render(
        items=items,
        studies=[{"title": study.preset.title} for study in studies],
        command="python -m experiments report",
        version=tokenpool.__version__,
        commit=protocol.commit(),
    )
    with files.atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _item(studies: Sequence[Study], kind: str, name: str) -> dict[str, Any]:
    build = _table_parts if kind == "table" else _figure_parts
    titles = TABLE_TITLES if kind == "table" else figures.TITLES
    parts = build(studies, name)
    notes = [_provenance(study, kind, name) for study in studies]
    parts.append({"notes": list(dict.fromkeys(filter(None, notes)))})
    return {
        "kind": kind,
        "name": f"{kind.capitalize()}{'' if name[0].isdigit() else ':'} {name}",
        "anchor": f"{kind}-{name}",
        "title": titles[name],
        "states": [_state(study, f"{kind} {name}") for study in studies],
        "parts": parts,
    }


def _state(study: Study, name: str) -> dict[str, str]:
    state, _ = status(study, name)
    runs = needs(study, name)
    short = {"none": "-", "partial": f"partial, {len(study.finished(runs))}/{len(runs)}"}.get(state, state)
    return {"status": state, "short": short}


def _table_parts(studies: Sequence[Study], name: str) -> list[dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    sections = (
        tables.claims_section(studies)
        if name == "claims"
        else [section for study in studies for section in tables.sections(study, name)]
    )
    for section in sections:
        html = Markup(section.shown.to_html(index=False, border=0, escape=True))
        parts[section.name] = {"heading": section.title, "table": html, "notes": section.notes}
    return list(parts.values())


def _figure_parts(studies: Sequence[Study], name: str) -> list[dict[str, Any]]:
    parts = []
    for study in studies:
        has_runs = bool(needs(study, f"figure {name}"))
        if not has_runs and study is not studies[0]:
            continue  # the paper's own part is shown once
        wide = figures.draw(study, name)
        if wide is None:
            if has_runs and study.finished(needs(study, f"figure {name}")):
                parts.append({"notes": [f"{study.preset.title}: not enough of its runs are there to draw it."]})
            continue
        alt = _described(wide)
        parts.append(
            {
                "heading": study.preset.title if has_runs else None,
                "picture": _embedded(wide),
                "narrow_picture": _embedded(figures.draw(study, name, stacked=True)),
                "alt": alt,
                "notes": [],
            }
        )
    if len(parts) == 1:
        parts[0].pop("heading", None)
    return parts


def _provenance(study: Study, kind: str, name: str) -> str | None:
    """What a part was made from, and the command that makes it; None if it is not part of the study."""
    runs = needs(study, f"{kind} {name}")
    preset = study.preset
    state, text = status(study, f"{kind} {name}")
    if state == "none":
        return None
    if not runs:
        return f"Needs no runs. Command: python -m experiments {kind} {name}"
    line = command(study, f"{kind} {name}", *([] if state == "done" else ["--run"]))
    found = [results.read(protocol.result_path(run, study.folder)) for run in study.finished(runs)]
    commits = sorted({str(each.get("environment", {}).get("commit")) for each in found})
    made = f", made at commit {' and '.join(commits)}" if commits else ""
    return f"{preset.title}: {text}{made}. Command: {line}"


def _described(figure: Figure) -> str:
    """What is drawn, for those who cannot see it: the axes and the curves of each panel."""
    panels = []
    for ax in figure.axes:
        curves = ", ".join(ax.get_legend_handles_labels()[1])
        labels = f"{ax.get_ylabel()} against {ax.get_xlabel()}" if ax.get_xlabel() else ""
        panels.append("; ".join(filter(None, [ax.get_title(), labels, curves])))
    return " | ".join(filter(None, panels)).replace("\n", ", ")


def _embedded(figure: Figure) -> str:
    """A figure as a data URI; as SVG in an image of its own, so that no two share names inside."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "tokenpool"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
