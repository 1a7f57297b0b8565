"""All methods by name. Tables, figures, studies, help texts and tests take all properties of a method from here."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tokenpool.downsampling.atc import ATC
from tokenpool.downsampling.contract import Downsampler
from tokenpool.downsampling.convolution import Convolution
from tokenpool.downsampling.diffrate import DiffRate
from tokenpool.downsampling.dpc_knn import DPCKNN
from tokenpool.downsampling.dynamic import DynamicSelection
from tokenpool.downsampling.evit import EViT
from tokenpool.downsampling.fusion import MultiCriteriaFusion, TokenFusion
from tokenpool.downsampling.hierarchical import HierarchicalPooling
from tokenpool.downsampling.matching import BipartiteMatching
from tokenpool.downsampling.mutual import MutualPairs
from tokenpool.downsampling.pitome import PiToMe
from tokenpool.downsampling.pooling import KeyMedoids, KMeans, KMedoids, WKMeans, WKMedoids
from tokenpool.downsampling.selection import Importance, PowerBert, Random
from tokenpool.downsampling.ward import WardPooling

T = TypeVar("T")
_WITHOUT_SCHEDULE = ("plain", "convolution")
KINDS = (*_WITHOUT_SCHEDULE, "selection", "clustering", "matching")


@dataclass(frozen=True)
class Method:
    """A downsampling method.

    Attributes:
        name: name for `tokenpool.patch` and the command line.
        downsampler: class of the method, or None for the plain model.
        kind: one of `KINDS`: "plain", "convolution" (a layer at given blocks), "selection" (drops tokens), "clustering"
            or "matching" (both merge tokens). The kind of a studied method decides in which figures it appears.
        label: name in figures.
        description: the tokens that remain after the attention of a block, where K = keep[l]. For help texts and the
            documentation.
        style: plot style: Matplotlib's `color`, `marker`, `linestyle`, `markersize`.
        in_paper: whether it is a method of Marin et al. 2021.
        studied: whether `reproduce --full`, tables and figures include it with every schedule.
        family: of the schedules that its own paper uses without learning them, see `tokenpool.schedule_for`.
        learned: whether it has weights of its own, which must be trained.
        carry: whether its own paper trains models with sizes carried (proportional attention). Studies fine-tune it in
            the same way.
    """

    name: str
    downsampler: type[Downsampler] | None
    kind: str
    label: str
    description: str
    style: Mapping[str, Any] = field(default_factory=lambda: {"marker": "."})
    in_paper: bool = False
    studied: bool = False
    family: str = "decay"
    learned: bool = False
    carry: bool = False

    @property
    def has_schedule(self) -> bool:
        """Whether the method takes `keep`, the number of tokens that remain after each block."""
        return self.kind not in _WITHOUT_SCHEDULE


REGISTRY: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry.

    Args:
        method: the entry. Users can register their own methods.

    Returns:
        The same entry.

    Raises:
        ValueError: if the name is already used or not valid, if the kind is unknown, or if a method without a schedule
            has `studied=True`.
        TypeError: if `downsampler` is not a subclass of `Downsampler`.
    """
    if method.name in REGISTRY:
        raise ValueError(f"method {method.name!r} is registered already; choose another name")
    if not re.fullmatch(r"[A-Za-z0-9_]+", method.name):
        raise ValueError(f"method name {method.name!r} must consist of letters, digits and _")
    if method.kind not in KINDS:
        raise ValueError(f"method {method.name!r}: kind = {method.kind!r} must be one of {', '.join(KINDS)}")
    if method.studied and not method.has_schedule:
        raise ValueError(f"method {method.name!r} cannot be studied: methods of kind {method.kind} have no schedule")
    if method.kind != "plain" and not _is_downsampler(method.downsampler):
        raise TypeError(f"method {method.name!r}: {method.downsampler!r} must be a subclass of tokenpool.Downsampler")
    REGISTRY[method.name] = method
    return method


def find(downsampler: str | type[Downsampler]) -> tuple[str, type[Downsampler] | None]:
    """Return name and class of a method.

    Args:
        downsampler: name or class of the method. A class that is not registered is allowed.

    Returns:
        The name, and the class or None for the plain model.

    Raises:
        ValueError: for an unknown name. The message lists the known names.
    """
    if isinstance(downsampler, type) and _is_downsampler(downsampler):
        names = [name for name, method in METHODS.items() if method is downsampler]
        return (names or [downsampler.__name__])[0], downsampler
    if not isinstance(downsampler, str) or downsampler not in METHODS:
        raise ValueError(f"unknown downsampler {downsampler!r}; known are {', '.join(METHODS)}")
    return downsampler, METHODS[downsampler]


def with_schedule() -> tuple[str, ...]:
    """Return the names of the methods that take `keep`."""
    return tuple(method.name for method in REGISTRY.values() if method.has_schedule)


def studied(*kinds: str) -> tuple[str, ...]:
    """Return the names of the methods that studies run with every schedule.

    Args:
        *kinds: only methods of these kinds. Default: all kinds.
    """
    return tuple(method.name for method in REGISTRY.values() if method.studied and (not kinds or method.kind in kinds))


class Column(Mapping[str, T], Generic[T]):
    """A read-only mapping from the names of all registered methods to one property of them."""

    def __init__(self, read: Callable[[Method], T]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> T:
        return self._read(REGISTRY[name])

    def __iter__(self) -> Iterator[str]:
        return iter(REGISTRY)

    def __len__(self) -> int:
        return len(REGISTRY)

    def __repr__(self) -> str:
        return repr(dict(self))


METHODS: Mapping[str, type[Downsampler] | None] = Column(lambda method: method.downsampler)


def _is_downsampler(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, Downsampler)


# Tables, legends and runs use this order. The colours are from the palette of Okabe and Ito, which colour-blind readers
# can distinguish. Markers and lines also differ, for print in black and white.
for _method in (
    Method(
        "none",
        None,
        kind="plain",
        label="DeiT",
        description="all tokens (plain DeiT)",
        style={"color": "#000000", "marker": "*", "markersize": 11},
        in_paper=True,
    ),
    Method(
        "convolution",
        Convolution,
        kind="convolution",
        label="Convolution",
        description="a 2x2 convolution with stride 2 at the blocks at=[...] (appendix D)",
        style={"color": "#999999", "marker": "P"},
        in_paper=True,
        learned=True,
    ),
    Method(
        "random",
        Random,
        kind="selection",
        label="Random selection",
        description="K tokens at random",
        style={"color": "#E69F00", "marker": "v"},
        in_paper=True,
        studied=True,
    ),
    Method(
        "importance",
        Importance,
        kind="selection",
        label="Importance selection",
        description="K tokens at random, with probability proportional to the score",
        style={"color": "#56B4E9", "marker": "^"},
        in_paper=True,
        studied=True,
    ),
    Method(
        "power_bert",
        PowerBert,
        kind="selection",
        label="PoWER-BERT",
        description="the K tokens of highest significance score (equation 5)",
        style={"color": "#D55E00", "marker": "s"},
        in_paper=True,
        studied=True,
    ),
    Method(
        "kmeans",
        KMeans,
        kind="clustering",
        label="Token Pooling, K-Means",
        description="Token Pooling: the means of K clusters by K-Means (Algorithm 1)",
        style={"color": "#CC79A7", "marker": "d", "linestyle": "--"},
        in_paper=True,
        studied=True,
    ),
    Method(
        "kmedoids",
        KMedoids,
        kind="clustering",
        label="Token Pooling, K-Medoids",
        description="Token Pooling: the means of K clusters by K-Medoids (Algorithm 1)",
        style={"color": "#009E73", "marker": "D", "linestyle": "--"},
        in_paper=True,
        studied=True,
    ),
    Method(
        "wkmeans",
        WKMeans,
        kind="clustering",
        label="Token Pooling, WK-Means",
        description="Token Pooling by K-Means weighted by the scores (objective 13)",
        style={"color": "#CC79A7", "marker": "h"},
        in_paper=True,
        studied=True,
    ),
    Method(
        "wkmedoids",
        WKMedoids,
        kind="clustering",
        label="Token Pooling, WK-Medoids",
        description="Token Pooling by K-Medoids weighted by the scores (objective 13)",
        style={"color": "#0072B2", "marker": "o"},
        in_paper=True,
        studied=True,
    ),
    Method(
        "key_medoids",
        KeyMedoids,
        kind="clustering",
        label="KeyMedoids (extension)",
        description="WK-Medoids on attention keys, for models that are not fine-tuned (not in the paper)",
        style={"color": "#4B3B8F", "marker": "X"},
    ),
    Method(
        "ward",
        WardPooling,
        kind="clustering",
        label="Ward pooling (extension)",
        description="agglomerative clustering by objective (13), for models that are not fine-tuned (not in the paper)",
        style={"color": "#B22222", "marker": "D", "linestyle": "-."},
    ),
    Method(
        "tome",
        BipartiteMatching,
        kind="matching",
        label="ToMe's matching (extension)",
        description="bipartite soft matching (ToMe), to compare with (not in the paper)",
        style={"color": "#8C6D1F", "marker": "<", "linestyle": "-."},
        family="step",
        carry=True,
    ),
    Method(
        "pitome",
        PiToMe,
        kind="matching",
        label="PiToMe (extension)",
        description="matching of tokens of high energy (PiToMe), to compare with (not in the paper)",
        style={"color": "#AA4499", "marker": ">", "linestyle": "-."},
        family="step",
        carry=True,
    ),
    Method(
        "evit",
        EViT,
        kind="clustering",
        label="EViT (extension)",
        description="the K - 1 tokens that the class token attends to, and the others as one (EViT; not in the paper)",
        style={"color": "#882255", "marker": "p", "linestyle": "-."},
        family="stages",
    ),
    Method(
        "atc",
        ATC,
        kind="clustering",
        label="ATC (extension)",
        description="agglomerative clustering of attention keys (ATC), to compare with (not in the paper)",
        style={"color": "#117733", "marker": "H", "linestyle": "-."},
        family="stages",
        carry=True,
    ),
    Method(
        "dpc_knn",
        DPCKNN,
        kind="clustering",
        label="DPC-KNN (extension)",
        description="clusters around K density peaks (DPC-KNN), to compare with (not in the paper)",
        style={"color": "#6699CC", "marker": "8", "linestyle": "-."},
        family="stages",
    ),
    Method(
        "mctf",
        MultiCriteriaFusion,
        kind="matching",
        label="MCTF (extension)",
        description="bipartite matching in both directions by similarity, attention and size (MCTF; not in the paper)",
        style={"color": "#AA3377", "marker": "1", "linestyle": "-."},
        family="step",
        carry=True,
    ),
    Method(
        "tofu",
        TokenFusion,
        kind="matching",
        label="ToFu (extension)",
        description="ToMe's pairs, pruned in early blocks, merged at full norm in late ones (ToFu; not in the paper)",
        style={"color": "#CCBB44", "marker": "2", "linestyle": "-."},
        family="step",
    ),
    Method(
        "mpm",
        MutualPairs,
        kind="matching",
        label="MPM (extension)",
        description="pairs of mutual nearest neighbours, merged into their means (MPM; not in the paper)",
        style={"color": "#66CCEE", "marker": "3", "linestyle": "-."},
    ),
    Method(
        "diffrate",
        DiffRate,
        kind="matching",
        label="DiffRate (extension)",
        description="tokens pruned by class attention, others merged, by separate counts (DiffRate; not in the paper)",
        style={"color": "#228833", "marker": "4", "linestyle": "-."},
        carry=True,
    ),
    Method(
        "hvt",
        HierarchicalPooling,
        kind="convolution",
        label="HVT (extension)",
        description="max pooling of the sequence, kernel 3, stride 2, at the blocks at=[...] (HVT; not in the paper)",
        style={"color": "#555555", "marker": "|", "linestyle": ":"},
    ),
    Method(
        "dynamicvit",
        DynamicSelection,
        kind="selection",
        label="DynamicViT (extension)",
        description="the K tokens that a learned predictor keeps (DynamicViT; needs training; not in the paper)",
        style={"color": "#EE6677", "marker": "x", "linestyle": ":"},
        learned=True,
    ),
):
    register(_method)
