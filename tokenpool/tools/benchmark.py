"""Images a second, latency and memory of a pooled model and of the plain one, in turns: both meet the same machine.

The plain model is timm's own, with fused attention. The *realised fraction* is the measured speed-up over the counted
one, the ratio of FLOPs: at 1 the tokens saved are seconds saved.
"""

import copy
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from numbers import Real
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenpool
from tokenpool import clustering, flops
from tokenpool.analysis import results
from tokenpool.attention import ScoredAttention
from tokenpool.runs.environment import environment
from tokenpool.runs.timing import device_name, differences, peak_memory, seconds, summary, timed_on
from tokenpool.tools import backends

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        model: name of the timm model.
        method: downsampling method.
        keep: retention schedule, in any spelling of `tokenpool.patch`; None for methods without one.
        batch_size: images a batch.
        image_size: in pixels; None for the model's own.
        precision: one of `PRECISIONS`; below float32 it is autocast.
        backend: what runs both models, one of `tokenpool.tools.backends.BACKENDS`.
        train: forward, backward and the optimiser's step (plain SGD), in place of a forward pass.
        carry: carry token sizes.
        options: of the method.
    """

    model: str
    method: str
    keep: Any = None
    batch_size: int = 32
    image_size: int | None = None
    precision: str = "float32"
    backend: str = "eager"
    train: bool = False
    carry: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a file is named after."""
        size = f"at{self.image_size}" if self.image_size else ""
        keep = re.sub("[^0-9A-Za-z.]+", "_", str(self.keep)).strip("_") if self.keep is not None else ""
        backend = "" if self.backend == "eager" else self.backend
        flags = [flag for flag in ("train", "carry") if getattr(self, flag)]
        parts = [self.model, size, self.method, keep, f"batch{self.batch_size}", self.precision, backend, *flags]
        return "-".join(filter(None, parts))

    def run_name(self, device: str) -> str:
        """Name of the result's file, where the setting is timed on that device."""
        return f"{self.name}-{device.replace(':', '')}"

    def check(self, device: str) -> None:
        """Check that the setting can be timed on that device.

        Raises:
            ModuleNotFoundError: if the backend lacks its package.
            ValueError: for an unknown precision or backend, or one that has not this device or precision, or does not
                train.
        """
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision = {self.precision!r} must be one of {', '.join(PRECISIONS)}")
        backends.check(self.backend, device, self.precision, self.train)


def compare(
    setting: Setting, device: str = "cpu", repeats: int = 7, warm_up: int = 2, exports: Path | None = None
) -> dict[str, Any]:
    """Time, memory and FLOPs of a setting and of timm's plain model, both with random weights and images.

    Args:
        setting: what is timed.
        device: where.
        repeats: times that are taken of each model, in turns.
        warm_up: passes of each that are not counted.
        exports: folder of exported files, which settings that differ only in their batch size share; None for one that
            is deleted at the end.

    Returns:
        A result as `tokenpool.results` stores it. Its metrics are what `measure` returns, and: `latency_ms` and
        `plain_latency_ms`, medians; `peak_mib` and `plain_peak_mib`, the most memory that a pass allocates beyond
        weights and images (absent for exported models: they allocate outside of PyTorch); `flops_ratio`, plain over
        pooled, clustering counted in; `realised_fraction` = speed-up / FLOPs ratio; `tokens`, the patches of an image;
        for forward passes in eager mode `clustering_share` and `scoring_share` of the pass's time, and on a CPU
        `realised_against_parts`, the realised fraction against `plain_in_parts`.

    Raises:
        ModuleNotFoundError: if the backend lacks its package.
        ValueError: for an unknown model, or a setting that cannot be timed on the device.
    """
    setting.check(device)
    plain, pooled = _models(setting, device)
    adapter = tokenpool.hosts.of(plain)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch_size, *adapter.image_shape, generator=generator).to(device)
    count, plain_count = flops.count(pooled), flops.count(plain)
    is_eager = not setting.train and setting.backend == "eager"
    parts = {"in_parts": plain_in_parts(plain)} if is_eager and images.device.type == "cpu" else {}
    networks = {"model": pooled, **parts, "plain": plain}  # so the pooled model follows the plain one
    with tempfile.TemporaryDirectory() as folder:
        runnable = _runnable(networks, images, setting, exports or Path(folder))
        calls = {name: _pass(network, runnable[name], images, setting) for name, network in networks.items()}
        with nullcontext() if setting.train else torch.inference_mode():
            times = seconds(calls, images.device, repeats, warm_up)
            found = summary(times, images)
            if setting.backend not in backends.EXPORTED:
                found["peak_mib"] = peak_memory(calls["model"], images.device) / 2**20
                found["plain_peak_mib"] = peak_memory(calls["plain"], images.device) / 2**20
    ratio = plain_count.gmacs / count.gmacs
    found |= {
        "latency_ms": 1000 * len(images) / found["images_per_second"],
        "plain_latency_ms": 1000 * len(images) / found["plain_images_per_second"],
        "flops_ratio": ratio,
        "realised_fraction": found["speed_up"] / ratio,
    }
    cost = {"gmacs": count.gmacs, "clustering_gmacs": count.clustering_gmacs, "plain_gmacs": plain_count.gmacs}
    if "in_parts" in times:
        found["realised_against_parts"] = median(times["in_parts"]) / median(times["model"]) / ratio
    if is_eager:
        found |= shares(pooled, images, setting.precision, repeats)
    keep = tokenpool.hosts.of(pooled).setting.keep
    exact = asdict(setting) | {"schedule": setting.keep, "keep": None if keep is None else list(keep)}
    found |= {"tokens": math.prod(adapter.grid(adapter.image_shape[1:])), "repeats": repeats}
    return {"setting": exact, "metrics": found, "cost": cost, "environment": _environment(setting.backend)}


def plain_in_parts(plain: nn.Module) -> nn.Module:
    """A copy of the plain model whose blocks get a few images at a time on a CPU, as those of pooled models do.

    What is gained so is no merit of pooling: a stricter baseline.
    """
    adapter = tokenpool.hosts.of(plain)
    keep = [math.prod(adapter.grid(adapter.image_shape[1:]))] * adapter.depth
    return tokenpool.patch(copy.deepcopy(plain), "power_bert", keep, carry=False)


def run(settings: Sequence[Setting], folder: Path, device: str = "cpu", repeats: int = 7) -> Iterator[dict[str, Any]]:
    """Compare each of the settings and write one JSON file each; those whose file is there are not timed again.

    Raises:
        ModuleNotFoundError: if a backend lacks its package. Nothing is timed then.
        ValueError: if a setting cannot be timed on the device (nothing is timed then); if a file is broken, or holds
            another setting, or times of another machine, number of threads, version of PyTorch or of the backend, or
            number of repeats (the message names the file).
    """
    for setting in settings:
        setting.check(device)
    with tempfile.TemporaryDirectory() as exports:
        for setting in settings:
            path = folder / f"{setting.run_name(device)}.json"
            if not path.exists():
                results.save(compare(setting, device, repeats, exports=Path(exports)), path)
            outcome = _read(path)
            _check_stored(outcome, path, setting, device, repeats)
            yield _row(path, outcome)


def _check_stored(outcome: dict[str, Any], path: Path, setting: Setting, device: str, repeats: int) -> None:
    """Refuse a stored result of another setting, or one whose times cannot be compared with times of today."""
    before = outcome["setting"] | {"keep": outcome["setting"].get("schedule")}
    wanted = json.loads(json.dumps(asdict(setting)))  # tuples as lists, as the file has them
    if {name: before.get(name) for name in wanted} != wanted:
        raise ValueError(f"{path} holds another setting: choose another folder, or delete the file")
    here = {"device": device_name(torch.device(device)), "repeats": repeats, "threads": torch.get_num_threads()}
    now = {"environment": _environment(setting.backend), "metrics": here}
    then, today = differences(_times(outcome), _times(now))
    if then:
        raise ValueError(
            f"{path} was timed with {then}, now {today}: choose another folder (--output), or delete the file"
        )


def _read(path: Path) -> dict[str, Any]:
    """A stored result. Old ones do not name the backend, but say whether the models were compiled."""
    outcome = results.read(path)
    old = {"backend": "compiled" if outcome["setting"].get("compiled") else "eager"}
    return outcome | {"setting": old | outcome["setting"]}


def _environment(backend: str) -> dict[str, Any]:
    """`environment`, with the version of the backend."""
    found = environment()
    return found | {"versions": found["versions"] | backends.versions(backend)}


def _times(outcome: dict[str, Any]) -> dict[str, Any]:
    """What the times of a result depend on."""
    return timed_on(outcome) | {"repeats": outcome["metrics"].get("repeats")}


def shares(model: nn.Module, images: Tensor, precision: str = "float32", repeats: int = 5) -> dict[str, float]:
    """Shares of a forward pass's time: downsampling (`clustering_share`) and significance scores (`scoring_share`).

    Scoring is what attention with scores takes beyond fused attention on the same tokens; it can be negative.
    """
    inputs: list[tuple[nn.Module, tuple, dict[str, Any]]] = []

    def record(part: nn.Module, *given: Any, **named: Any) -> Any:
        inputs.append((part, given, named))
        return type(part).forward(part, *given, **named)

    parts = [
        part
        for block in tokenpool.hosts.of(model).blocks
        for part in (block.scored_attention, block.downsampler)
        if part is not None
    ]
    for part in parts:  # no hooks: where there are any, a batch goes through the blocks whole
        part.forward = partial(record, part)
    with torch.inference_mode(), _autocast(images.device, precision):
        try:
            model(images)
        finally:
            for part in parts:
                del part.forward
        whole = _median(lambda: model(images), images.device, repeats)
        pooling = scoring = 0.0
        for part, given, named in inputs:
            taken = _median(partial(part, *given, **named), images.device, repeats)
            if not isinstance(part, ScoredAttention):
                pooling += taken
            elif given[1].scores:
                x, asked = given
                without = partial(part, x, asked._replace(scores=False))
                scoring += taken - _median(without, images.device, repeats)
    return {"clustering_share": pooling / whole, "scoring_share": scoring / whole}


def fallen(found: Sequence[dict[str, Any]], stored: Sequence[dict[str, Any]], tolerance: float) -> list[str]:
    """A line for each setting whose realised fraction is less than (1 - tolerance) of the stored one.

    Ratios are compared, not times, so that results from another machine serve.
    """
    before = {one["run"]: one["realised_fraction"] for one in stored}
    return [
        f"{one['run']}: realised {one['realised_fraction']:.2f}, {before[one['run']]:.2f} before"
        for one in found
        if one["realised_fraction"] < (1 - tolerance) * before[one["run"]]
    ]


def stored(folder: Path) -> tuple[list[Setting], list[dict[str, Any]]]:
    """Settings and rows, as `run` gives them, of the results in a folder.

    Raises:
        ValueError: if the folder holds none, or a file that `run` has not written; the message names it.
    """
    settings, rows = [], []
    for path in sorted(folder.glob("*.json")):
        outcome = _read(path)
        known = {name: outcome["setting"].get(name) for name in Setting.__dataclass_fields__}
        numbers = ("threads", "speed_up", "flops_ratio", "realised_fraction")
        lacking = [name for name in numbers if not isinstance(outcome["metrics"].get(name), Real)]
        lacking += [name for name in ("model", "method", "schedule") if name not in outcome["setting"]]
        if lacking:
            raise ValueError(f"{path} is no result of throughput: it lacks {', '.join(lacking)}")
        settings.append(Setting(**known | {"keep": outcome["setting"]["schedule"]}))
        rows.append(_row(path, outcome))
    if not settings:
        raise ValueError(f"{folder} holds no results of throughput")
    return settings, rows


def clustering_speed(batch: int, n: int, k: int, width: int, device: str = "cpu", repeats: int = 7) -> dict[str, float]:
    """Seconds of weighted K-Medoids on random tokens: `kmedoids`, and loops over images and clusters in Python.

    All start from the tokens of highest weight. `looped` makes five iterations; `looped_ending_early`, like `kmedoids`,
    none after no medoid has moved.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, n, width, generator=generator).to(device)
    weights = torch.rand(batch, n, generator=generator).to(device)
    with torch.inference_mode():
        calls = {
            "kmedoids": lambda: clustering.kmedoids(tokens, k, weights),
            "looped": lambda: looped_kmedoids(tokens, k, weights),
            "looped_ending_early": lambda: looped_kmedoids(tokens, k, weights, ends_early=True),
        }
        return {name: median(taken) for name, taken in seconds(calls, tokens.device, repeats).items()}


def looped_kmedoids(tokens: Tensor, k: int, weights: Tensor, iterations: int = 5, ends_early: bool = False) -> Tensor:
    """Means (B, K, D) of weighted K-Medoids as one would write it down, a baseline: Python goes over the clusters."""
    means = []
    for points, weight in zip(tokens, weights, strict=True):
        distance = torch.cdist(points, points).square()  # (N, N)
        medoids = weight.argsort(descending=True)[:k]
        for _ in range(iterations):
            assignment = distance[medoids].argmin(dim=0)  # (N,)
            previous, medoids = medoids, medoids.clone()
            for cluster in range(k):
                members = (assignment == cluster).nonzero()[:, 0]
                if len(members):
                    cost = distance[members][:, members] @ weight[members]
                    medoids[cluster] = members[cost.argmin()]
            if ends_early and torch.equal(medoids, previous):
                break
        rows = []
        for cluster in range(k):
            members = assignment == cluster
            share = weight[members] / weight[members].sum()
            rows.append(share @ points[members] if members.any() else points[previous[cluster]])
        means.append(torch.stack(rows))
    return torch.stack(means)


def _row(path: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """A stored result as one flat row."""
    return {"run": path.stem} | outcome["setting"] | outcome["metrics"] | outcome["cost"]


def _models(setting: Setting, device: str) -> tuple[nn.Module, nn.Module]:
    """timm's plain model, and a copy of it that is pooled."""
    size = {} if setting.image_size is None else {"img_size": setting.image_size}
    plain = timm.create_model(setting.model, **size).to(device).train(setting.train)
    pooled = tokenpool.patch(
        copy.deepcopy(plain), setting.method, setting.keep, carry=setting.carry, **setting.options
    ).train(setting.train)
    return plain, pooled


def _runnable(
    networks: dict[str, nn.Module], images: Tensor, setting: Setting, exports: Path
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The networks as the setting's backend runs them."""
    if setting.backend == "compiled":
        torch.compiler.reset()  # after eight models that share their code PyTorch would no longer compile, but go on
        return {name: torch.compile(network) for name, network in networks.items()}
    if setting.backend not in backends.EXPORTED:
        return dict(networks)
    shared = replace(setting, batch_size=0)
    stems = {"model": f"{shared.name}-{shared.options}", "plain": f"{setting.model}-{setting.image_size}"}
    paths = {name: exports / re.sub("[^0-9A-Za-z.]+", "_", stem) for name, stem in stems.items()}
    return {name: backends.exported(setting.backend, networks[name], images, paths[name]) for name in networks}


def _pass(network: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, setting: Setting) -> Callable[[], Any]:
    """One forward pass, or one step of training, of a network that `run` runs."""
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-9) if setting.train else None

    def forward() -> None:
        with _autocast(images.device, setting.precision):
            run(images)

    def step() -> None:
        with _autocast(images.device, setting.precision):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step if setting.train else forward


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _median(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    return median(seconds({"": call}, device, repeats)[""])
