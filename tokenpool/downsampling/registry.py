"""All methods by name. One entry here is all that tables, figures, studies, help and tests need to know of a method."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tokenpool.downsampling.contract import Downsampler
from tokenpool.downsampling.convolution import Convolution
from tokenpool.downsampling.matching import BipartiteMatching
from tokenpool.downsampling.pooling import KeyMedoids, KMeans, KMedoids, WKMeans, WKMedoids
from tokenpool.downsampling.selection import Importance, PowerBert, Random

T = TypeVar("T")
_WITHOUT_SCHEDULE = ("plain", "convolution")
KINDS = (*_WITHOUT_SCHEDULE, "selection", "clustering", "matching")


@dataclass(frozen=True)
class Method:
    """A downsampling method.

    Attributes:
        name: what `tokenpool.patch` and the command line call it.
        downsampler: its class; None for the plain model.
        kind: one of `KINDS`: "plain", "convolution", "selection" (drops tokens), "clustering" or "matching" (both merge
            tokens). It decides in which figures a studied method is drawn.
        label: what figures call it.
        description: what remains after the attention of a block, where K = keep[l]; for help and the README.
        style: how figures draw it: Matplotlib's `color`, `marker`, `linestyle`, `markersize`.
        in_paper: whether it is a method of Marin et al. 2021.
        studied: whether `reproduce --full`, tables and figures run it with every schedule.
    """

    name: str
    downsampler: type[Downsampler] | None
    kind: str
    label: str
    description: str
    style: Mapping[str, Any] = field(default_factory=lambda: {"marker": "."})
    in_paper: bool = False
    studied: bool = False

    @property
    def has_schedule(self) -> bool:
        """Whether it takes `keep`, the number of tokens that remain after each block."""
        return self.kind not in _WITHOUT_SCHEDULE


REGISTRY: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method, so that it is known by its name everywhere.

    Args:
        method: the entry, of a built-in method or of your own.

    Raises:
        ValueError: if the name is taken or unusable, for an unknown kind, or if a method without a schedule is to be
            studied.
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
    """Name and class of a method that is given by either.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if isinstance(downsampler, type) and _is_downsampler(downsampler):
        names = [name for name, method in METHODS.items() if method is downsampler]
        return (names or [downsampler.__name__])[0], downsampler
    if not isinstance(downsampler, str) or downsampler not in METHODS:
        raise ValueError(f"unknown downsampler {downsampler!r}; known are {', '.join(METHODS)}")
    return downsampler, METHODS[downsampler]


def with_schedule() -> tuple[str, ...]:
    """Names of the methods that take `keep`."""
    return tuple(method.name for method in REGISTRY.values() if method.has_schedule)


def studied(*kinds: str) -> tuple[str, ...]:
    """Names of the methods that studies run with every schedule: those of some kinds, or all."""
    return tuple(method.name for method in REGISTRY.values() if method.studied and (not kinds or method.kind in kinds))


class Column(Mapping[str, T], Generic[T]):
    """A read-only mapping from the names of all methods to one of their properties. It follows the registry."""

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


# The order is that of tables, legends and runs. The colours are Okabe and Ito's, which colour-blind readers can tell
# apart. Markers and lines differ, too, for print in black and white.
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
        "tome",
        BipartiteMatching,
        kind="matching",
        label="ToMe's matching (extension)",
        description="bipartite soft matching (ToMe), to compare with (not in the paper)",
        style={"color": "#8C6D1F", "marker": "<", "linestyle": "-."},
    ),
):
    register(_method)
