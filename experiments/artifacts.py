"""Every table and figure: its name, its title, the runs that it needs, and how it is drawn.

To add a figure, write a function that draws it from the finished runs of a study, and add one entry to `ARTIFACTS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.figure import Figure

from experiments import needed
from experiments.extras import off_the_shelf
from experiments.show import claims, curves, illustrations, rivals, tables
from tokenpool.downsampling import studied
from tokenpool.runs.data_sets import data_set
from tokenpool.runs.run import Run
from tokenpool.runs.stages import dropping, merging
from tokenpool.runs.study import Study
from tokenpool.tools.sections import Section


@dataclass(frozen=True)
class Artifact:
    """A table or a figure.

    Attributes:
        kind: "table" or "figure".
        name: "3" for Table 3, "3a" for Figure 3a.
        title: what it shows.
        draw: for a figure a function of a study, its finished runs (a frame, one row a run) and whether panels are
            stacked, which returns None where there is nothing to draw; see `experiments.show.curves` and
            `experiments.show.illustrations`. For a table a function of pairs of a study and its finished runs, which
            returns the table's sections; see `experiments.show.tables`.
        needs: the runs that it needs of a study; none where the study has no such runs. None for what needs no runs.
        joint: a table in which studies stand side by side. Without a preset it is made of all that have results.
        caption: of a figure: what it shows and how to read it, in words.
    """

    kind: Literal["table", "figure"]
    name: str
    title: str
    draw: Callable[..., Any]
    needs: Callable[[Study], Sequence[Run]] | None = None
    joint: bool = False
    caption: str = ""

    @property
    def key(self) -> str:
        """What commands call it, such as "figure 3a"."""
        return f"{self.kind} {self.name}"

    def runs(self, study: Study) -> list[Run]:
        """The runs that it needs, each of them once."""
        found = self.needs(study) if self.needs else []
        return list({run.name: run for run in found}.values())


def _claimed(study: Study) -> list[Run]:
    """Runs of the claims of the paper: the runs of its figures, and two kinds that no figure shows."""
    drawn = ("1b", "3a", "5a", "5b", "6", "7", "8", "9", "10a", "10b", "redundancy")
    runs = [run for name in drawn for run in needs(study, f"figure {name}")]
    runs += needed.bases(study) if study.preset.trains else []
    if not data_set(study.preset.data).must_be_named:
        return runs  # embedded images are too easy to decide more
    return [*runs, *(study.carried() if study.preset.trains else []), *study.convergences()]


_POOLED = ("power_bert", "kmedoids", "wkmedoids")  # methods on all models of the family

_ALL = (
    Artifact("table", "claims", "The paper's claims, and what data say", claims.sections, needs=_claimed, joint=True),
    Artifact("table", "1", "Where the computation goes", tables.each(tables.breakdown)),
    Artifact(
        "table",
        "2",
        "Best trade-offs over widths and schedules",
        tables.each(tables.trade_offs),
        needed.trained(lambda study: needed.whole_family(study, _POOLED)),
    ),
    Artifact(
        "table",
        "3",
        "Methods and schedules on DeiT-S",
        tables.each(tables.by_method("deit_small")),
        needed.trained(lambda study: needed.main(study, studied())),
    ),
    Artifact(
        "table",
        "4",
        "Methods and schedules on DeiT-e318",
        tables.each(tables.by_method("deit_e318")),
        needed.trained(lambda study: needed.family(study, _POOLED, ["deit_e318"])),
    ),
    Artifact(
        "table",
        "5",
        "Methods and schedules on DeiT-e252",
        tables.each(tables.by_method("deit_e252")),
        needed.trained(lambda study: needed.family(study, _POOLED, ["deit_e252"])),
    ),
    Artifact(
        "table",
        "off_the_shelf",
        "Best without fine-tuning",
        tables.each(tables.without_fine_tuning),
        off_the_shelf.runs,
    ),
    Artifact(
        "table",
        "rivals",
        "Methods of other papers, fine-tuned",
        tables.each(rivals.sections),
        needed.trained(needed.rivals),
    ),
    Artifact(
        "figure",
        "1b",
        "Token Pooling with the best width at each cost, against DeiT",
        curves.of(curves.own_1b, curves.printed_1b),
        needed.trained(lambda study: needed.whole_family(study, ["wkmedoids"])),
        caption="Top-1 accuracy against cost: DeiT models of growing width, and the best of WK-Medoids over all "
        "widths and schedules. The arrow is the saving at the accuracy of the cheapest DeiT.",
    ),
    Artifact(
        "figure",
        "1c",
        "Which patches become one token",
        illustrations.clusters,
        Study.clusters,
        caption="Images, and below them their patches at half of the depth. Patches within one white border are "
        "one token, in its mean colour.",
    ),
    Artifact(
        "figure",
        "2",
        "Selection by score against clustering, in one dimension",
        illustrations.lobes,
        caption="Sixty tokens on a line, and four that remain. Selection by score keeps neighbours on the higher "
        "lobe; clusters cover both lobes, with a smaller reconstruction error.",
    ),
    Artifact(
        "figure",
        "3a",
        "Downsampling methods on one model",
        curves.of(curves.own_3a, curves.printed_3a),
        needed.trained(
            lambda study: [
                *needed.beside_others(study, (*dropping(), "wkmedoids")),
                *needed.family(study, ()),
                *needed.convolutions(study),
            ]
        ),
        caption="Top-1 accuracy against cost: selection of tokens, convolution and WK-Medoids on one model, and "
        "narrower DeiT models without downsampling.",
    ),
    Artifact(
        "figure",
        "3b",
        "Best trade-offs, against other methods",
        curves.of(curves.own_3b, curves.printed_3b),
        needed.trained(
            lambda study: needed.best_and_rivals(study, ("power_bert", "wkmedoids"), tuple(curves.OWN_OTHERS))
        ),
        caption="Top-1 accuracy against cost: the best of each method over widths and schedules, and the methods of "
        "other papers, as printed or trained here.",
    ),
    Artifact(
        "figure",
        "4",
        "Token Pooling on models of different width",
        curves.of(curves.own_4, curves.printed_4),
        needed.trained(lambda study: needed.whole_family(study, ["wkmedoids"])),
        caption="Top-1 accuracy against cost: WK-Medoids on each width of DeiT, one curve a width, and DeiT itself.",
    ),
    Artifact(
        "figure",
        "5a",
        "Methods that use significance scores",
        curves.of(curves.own_5a, curves.printed_methods("power_bert", "wkmedoids")),
        needed.trained(lambda study: needed.main(study, (*dropping(), "wkmedoids"))),
        caption="Top-1 accuracy against cost: methods that select tokens by their significance score, and WK-Medoids, "
        "which weights by it.",
    ),
    Artifact(
        "figure",
        "5b",
        "Clustering algorithms",
        curves.of(curves.own_5b, curves.printed_5b),
        needed.trained(lambda study: needed.main(study, ("power_bert", *merging()))),
        caption="Top-1 accuracy against cost: four clustering algorithms, and PoWER-BERT, which drops tokens.",
    ),
    Artifact(
        "figure",
        "6",
        "Initial cluster centres: by score, and at random",
        curves.of(curves.own_6, curves.printed_methods("kmedoids", "wkmedoids")),
        needed.trained(
            lambda study: [
                *needed.beside_others(study, ("kmedoids", "wkmedoids")),
                *study.finetunes(("kmedoids", "wkmedoids"), study.extra_seeds, init="random"),
            ]
        ),
        caption="Top-1 accuracy against cost: K-Medoids and WK-Medoids with the tokens of highest score as initial "
        "centres, and with random ones (hollow markers).",
    ),
    Artifact(
        "figure",
        "7",
        "Training once and twice, and distillation",
        curves.of(curves.own_7, curves.printed_7),
        needed.trained(needed.twice_trained),
        caption="Top-1 accuracy against cost of plain models: trained once, trained again for as long as the pooled "
        "models, and, in the paper's part, distilled.",
    ),
    Artifact(
        "figure",
        "8",
        "Convolution at all placements",
        curves.of(curves.own_8),
        needed.trained(
            lambda study: [*needed.beside_others(study, ["wkmedoids"]), *needed.convolutions(study)],
        ),
        caption="Top-1 accuracy against cost: one to three strided convolutions at every placement, the best "
        "placements, and WK-Medoids.",
    ),
    Artifact(
        "figure",
        "9",
        "Without fine-tuning",
        curves.of(curves.own_9),
        needed.not_fine_tuned,
        caption="Top-1 accuracy against cost of a model that never saw fewer tokens in training: merged tokens "
        "without and with carried sizes.",
    ),
    Artifact(
        "figure",
        "10a",
        "Normalised queries and keys, alpha = 1",
        curves.of(curves.own_10("10a")),
        needed.trained(lambda study: needed.normalised(study, "10a")),
        caption="Top-1 accuracy against cost with queries and keys of length one, and without (hollow markers). "
        "The scalar of the attention is 1.",
    ),
    Artifact(
        "figure",
        "10b",
        "Normalised queries and keys, alpha learned",
        curves.of(curves.own_10("10b")),
        needed.trained(lambda study: needed.normalised(study, "10b")),
        caption="Top-1 accuracy against cost with queries and keys of length one, and without (hollow markers). "
        "The scalar of the attention is learned.",
    ),
    Artifact(
        "figure",
        "11a",
        "DeiT-e252",
        curves.of(curves.own_11("deit_e252"), curves.printed_methods(*_POOLED, model="deit_e252")),
        needed.trained(lambda study: needed.family(study, _POOLED, ["deit_e252"])),
        caption="Top-1 accuracy against cost: PoWER-BERT, K-Medoids and WK-Medoids on a narrower model.",
    ),
    Artifact(
        "figure",
        "11b",
        "DeiT-e318",
        curves.of(curves.own_11("deit_e318"), curves.printed_methods(*_POOLED, model="deit_e318")),
        needed.trained(lambda study: needed.family(study, _POOLED, ["deit_e318"])),
        caption="Top-1 accuracy against cost: PoWER-BERT, K-Medoids and WK-Medoids on a model of middle width.",
    ),
    Artifact(
        "figure",
        "12",
        "Throughput",
        curves.throughput,
        needed.timed,
        caption="Top-1 accuracy against measured images a second. A curve further to the right is faster at the same "
        "accuracy.",
    ),
    Artifact(
        "figure",
        "reconstruction",
        "Reconstruction error by block, and accuracy",
        illustrations.reconstruction,
        needed.not_fine_tuned,
        caption="Left: how far tokens move in each block. Others: top-1 accuracy against the mean of this error, one "
        "curve a method, one point a schedule.",
    ),
    Artifact(
        "figure",
        "redundancy",
        "Redundancy of tokens before and after attention",
        illustrations.redundancy,
        Study.redundancies,
        caption="Three measures of how alike the tokens of a trained plain model are, block by block, before and "
        "after the attention.",
    ),
)
ARTIFACTS = {artifact.key: artifact for artifact in _ALL}


def names(kind: str) -> tuple[str, ...]:
    """Names of all tables ("table") or figures ("figure"), in the order of the paper."""
    return tuple(artifact.name for artifact in ARTIFACTS.values() if artifact.kind == kind)


def get(kind: str, name: str) -> Artifact:
    """The table or figure of that name.

    Raises:
        ValueError: if it is unknown; the message lists the known ones.
    """
    if f"{kind} {name}" not in ARTIFACTS:
        raise ValueError(f"unknown {kind} {name!r}; known are {', '.join(names(kind))}, all")
    return ARTIFACTS[f"{kind} {name}"]


def needs(study: Study, key: str) -> list[Run]:
    """The runs that a table ("table 3") or figure ("figure 3a") draws.

    A preset without such runs needs none. For example, a preset that does not train has no fine-tuned models.
    """
    return ARTIFACTS[key].runs(study)


def sections(studies: Sequence[Study], name: str) -> list[Section]:
    """The parts of a table: the paper's part, and one for each study of which runs are finished.

    Raises:
        ValueError: if the table is unknown; the message lists the known ones.
    """
    artifact = get("table", name)
    return artifact.draw([(study, study.points(artifact.runs(study))) for study in studies])


def draw(study: Study, name: str, stacked: bool = False) -> Figure | None:
    """A figure from the finished runs of the study and the paper's numbers; None where there is neither.

    Args:
        study: whose runs are drawn.
        name: of the figure.
        stacked: panels one below the other, for narrow screens.

    Raises:
        ValueError: if the figure is unknown; the message lists the known ones.
    """
    artifact = get("figure", name)
    return artifact.draw(study, study.points(artifact.runs(study)), stacked)


def status(study: Study, key: str) -> tuple[str, str]:
    """Of a table or figure: "done", "partial", "missing" or "none" (this preset has no runs for it), and in words."""
    runs = needs(study, key)
    if not runs:
        needs_none = ARTIFACTS[key].needs is None
        return ("done", "done, needs no runs") if needs_none else ("none", "not part of this preset")
    found = len(study.finished(runs))
    state = "done" if found == len(runs) else "partial" if found else "missing"
    return state, f"{state}, {found} of {len(runs)} runs"


def everything(study: Study) -> list[Run]:
    """The runs of all tables and figures of the full study, or the protocol of the quick one."""
    if not study.full:
        return needed.protocol_runs(study)
    runs = needed.protocol_runs(study) if study.preset.trains else []
    runs += [run for artifact in ARTIFACTS.values() for run in artifact.runs(study)]
    order = {"base": 0, "finetune": 1}
    unique = {run.name: run for run in runs}.values()
    return sorted(unique, key=lambda run: (order.get(run.stage, 2), run.seed))
