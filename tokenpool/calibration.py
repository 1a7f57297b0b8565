"""Calibrate a retention schedule: find the schedule of a budget that changes a model's outputs least.

The search needs a few hundred images, no labels and no training. It is an extension of the paper, whose schedules are
learned in training (Marin et al. 2021, section 5).
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpool import files, hosts
from tokenpool.adoption import reference
from tokenpool.budget import ScheduleCost, meet, schedule_for
from tokenpool.downsampling import Downsampler, find
from tokenpool.patching import patch, unpatch

ROUNDS = 3  # each measures the slopes anew, and takes a step
SPREAD = 0.5  # change of the logarithms of the rates to measure slopes
STEPS = (0.6, 0.3, 0.15)  # largest change of the logarithm of a rate in a step; the first step that helps is taken
PARTS = 5  # parts of the images; an odd number, so that a part does not always meet the same signs of a block
BATCH = 50  # images that the model sees at a time

_ALGORITHM = f"steepest descent, {ROUNDS} rounds, spread {SPREAD}, steps {STEPS}, {PARTS} parts"

Schedule = tuple[int, ...]


def calibrate(
    model: nn.Module,
    images: Tensor,
    downsampler: str | type[Downsampler],
    gmacs: float,
    *,
    carry: bool = True,
    dense: bool = False,
    positions: str = "mean",
    state: str | Path | None = None,
    report: Callable[[str], None] | None = print,
    **options: Any,
) -> list[int]:
    """Find the schedule of a budget that changes the outputs of a model least: `keep` for `tokenpool.patch`.

    The search starts with `schedule_for`, and its result is never worse on the images. The change of the outputs is
    the mean over images of a divergence from the plain model, see `divergence`. The search takes minutes. The same
    arguments give the same schedule.

    Args:
        model: a model of a family in `tokenpool.hosts`, patched or plain. It is not changed. Its device and precision
            are used.
        images: (B, C, H, W), as the model expects them. A few hundred are enough. Do not use them in a later test.
        downsampler: see `tokenpool.patch`.
        gmacs: budget of one image's forward pass, in units of 10^9 multiply-adds, see `schedule_for`.
        carry: see `tokenpool.patch`.
        dense: see `tokenpool.patch`.
        positions: see `tokenpool.patch`.
        state: path of a file for the divergences found so far. An interrupted search with the same file goes on where
            it stopped. Default: no file.
        report: called with a line of text for each schedule that is measured. None for no progress.
        **options: arguments of the downsampler's class.

    Returns:
        The maximum number of patch tokens after each block. Its cost is as `schedule_for` promises.

    Raises:
        TypeError: if the model belongs to no supported family, or returns no tensor.
        ValueError: if there are no images, if an output is not finite, if the state file belongs to another search or
            is damaged, or if an option is not a JSON value. Also for an unusable method or budget, see `schedule_for`.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor (B, C, H, W) of one image or more, got {shape}")
    host_options: dict[str, Any] = {"dense": dense, "positions": positions}
    start = tuple(schedule_for(gmacs, model, downsampler, **host_options, **options))
    name, method = find(downsampler)
    plain = unpatch(copy.deepcopy(model)).eval()
    setting = {"carry": carry, **host_options, **options}
    identity = {
        "algorithm": _ALGORITHM,
        "model": _digest(repr(plain), plain.state_dict()),
        "images": _digest(str(len(images)), {"images": images}),
        "downsampler": name,
        "setting": _json_value(setting),
        "gmacs": float(gmacs),
        "start": list(start),
    }
    evaluate = _Evaluator(plain, images, downsampler, setting)
    measured = _Measurements(evaluate, _State(identity, None if state is None else Path(state)), report)
    cost = ScheduleCost(model, method, **host_options, **options)  # type: ignore[arg-type]  # `schedule_for` refuses None
    budget = math.floor(float(gmacs) * 1e9 * (1 + 1e-15))  # as in `schedule_for`
    return list(_Search(start, cost, budget, measured).run())


def divergence(outputs: Tensor, expected: Tensor, classifies: bool = True) -> Tensor:
    """Compute how far the outputs of a model are from the expected outputs, for each image.

    Args:
        outputs: (B, ..., C), logits of classes or features.
        expected: (B, ..., C).
        classifies: True for the Kullback-Leibler divergence of the predicted distributions, in nats. False for the
            cosine distance of features, 1 - cos.

    Returns:
        (B,), the mean over all dimensions between the first and the last one.
    """
    if classifies:
        found, target = outputs.float().log_softmax(-1), expected.float().log_softmax(-1)
        each = F.kl_div(found, target, log_target=True, reduction="none").sum(-1)
    else:
        each = 1 - F.cosine_similarity(outputs.float(), expected.float(), dim=-1)
    return each.reshape(len(each), -1).mean(1)


class _Evaluator:
    """Measures how far a pooled model is from the plain model.

    Args:
        plain: the plain model. It is patched from now on.
        images: (B, C, H, W).
        downsampler: see `tokenpool.patch`.
        setting: further arguments of `tokenpool.patch`.
    """

    def __init__(
        self, plain: nn.Module, images: Tensor, downsampler: str | type[Downsampler], setting: dict[str, Any]
    ) -> None:
        self.model, self.downsampler, self.setting = plain, downsampler, setting
        self.classifies = getattr(plain, "num_classes", 0) > 0
        # Interleaved, because images are often sorted by class.
        self.images = [images[first::PARTS] for first in range(min(PARTS, len(images)))]
        self.expected: list[Tensor | None] = [None] * len(self.images)

    def __call__(self, keep: Schedule, part: int) -> list[float]:
        """Return the divergence of each image of a part."""
        if self.expected[part] is None:
            self.expected[part] = self._outputs(unpatch(self.model), part)
        with torch.random.fork_rng(devices=[]):  # some downsamplers have random weights
            torch.manual_seed(0)
            patch(self.model, self.downsampler, list(keep), **self.setting)
        found = self._outputs(self.model, part)
        return divergence(found, self.expected[part], self.classifies).tolist()  # type: ignore[arg-type]  # not None

    def _outputs(self, model: nn.Module, part: int) -> Tensor:
        like = reference(hosts.of(model).blocks)
        with torch.inference_mode():
            return torch.cat([_tensor(model(batch.to(like))) for batch in self.images[part].split(BATCH)])


def _tensor(output: Any) -> Tensor:
    """Return the logits or the pooled feature of a model's output, which is a tensor or a named tuple of tensors."""
    named = (getattr(output, name, None) for name in ("logits", "pooler_output"))
    found = output if isinstance(output, Tensor) else next((value for value in named if value is not None), None)
    if found is None:
        raise TypeError(f"the model returns a {type(output).__name__}, expected a tensor of logits or features")
    return found


class _State:
    """Divergences that have been measured, by schedule and part. The file stores them for a search that goes on.

    Args:
        identity: values that determine the divergences.
        path: path of the file, or None.

    Raises:
        ValueError: if the file has another identity, or is damaged.
    """

    def __init__(self, identity: dict[str, Any], path: Path | None) -> None:
        self.identity, self.path = identity, path
        self.divergences: dict[str, list[float]] = {}
        if path is None:
            return
        files.check_local(path)
        if path.exists():
            self.divergences = self._read(path)

    def _read(self, path: Path) -> dict[str, list[float]]:
        try:
            stored = json.loads(path.read_text())
            before, divergences = stored["identity"], stored["divergences"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the state of a calibration: delete it, or choose another file") from error
        differing = [key for key, value in self.identity.items() if before.get(key) != value]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{path} is the state of another calibration ({key} was {before.get(key)!r}, now "
                f"{self.identity[key]!r}): delete it, or choose another file"
            )
        return divergences

    def add(self, key: str, found: list[float]) -> None:
        """Store the divergences of a schedule on a part."""
        self.divergences[key] = found
        if self.path is not None:
            with files.atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps({"identity": self.identity, "divergences": self.divergences}))


class _Measurements:
    """Divergences of schedules on parts of the images. Each is measured once.

    Args:
        evaluate: returns the divergence of each image of a part.
        state: divergences that are known.
        report: see `calibrate`.
    """

    def __init__(self, evaluate: _Evaluator, state: _State, report: Callable[[str], None] | None) -> None:
        self.evaluate, self.state, self.report = evaluate, state, report
        self.parts = len(evaluate.images)
        self.title = ""  # what the measurements serve, for the report

    def __call__(self, keep: Schedule, part: int) -> list[float]:
        """Return the divergence of each image of a part."""
        key = f"{','.join(map(str, keep))} on part {part}"
        if key not in self.state.divergences:
            found = self.evaluate(keep, part)
            if not all(map(math.isfinite, found)):
                raise ValueError(
                    f"the model's outputs are not finite with keep = {list(keep)}: check weights and images"
                )
            self.state.add(key, found)
            if self.report is not None:
                mean = math.fsum(found) / len(found)
                number = len(self.state.divergences)
                self.report(f"measurement {number}: {self.title}, divergence {mean:.5f} on {len(found)} images")
        return self.state.divergences[key]

    def root(self, keep: Schedule, part: int) -> float:
        """Return the mean square root of the divergences on a part."""
        found = self(keep, part)
        return math.fsum(math.sqrt(max(value, 0.0)) for value in found) / len(found)  # rounding errors are negative

    def mean(self, keep: Schedule) -> float:
        """Return the mean divergence on all images."""
        found = [value for part in range(self.parts) for value in self(keep, part)]
        return math.fsum(found) / len(found)


class _Search:
    """Steepest descent on the rates at which blocks remove tokens (Box and Wilson 1951).

    The rate of a block is the logarithm of the share of tokens that remain, with opposite sign. A common factor of all
    rates meets the budget. A step changes the logarithms of the rates against their slopes.

    The search minimises the mean square root of the divergences. A few images have most of the divergence, so its mean
    would need several times as many images to tell two schedules apart.

    Args:
        start: the first schedule, of `schedules.by_decay`.
        cost: returns the cost of a schedule.
        budget: multiply-adds of one image.
        measured: returns divergences.

    Attributes:
        best: the best schedule so far.
    """

    def __init__(self, start: Schedule, cost: ScheduleCost, budget: int, measured: _Measurements) -> None:
        self.start = self.best = start
        self.cost, self.budget, self.measured = cost, budget, measured
        self.rates = [(2 * block + 1) / len(start) ** 2 for block in range(len(start))]

    def run(self) -> Schedule:
        """Return the best schedule."""
        self.measured.title = "the start"
        before = self.measured.mean(self.start)
        for number in range(ROUNDS):
            self.measured.title = f"round {number + 1} of {ROUNDS}, slopes"
            slopes = self._slopes(number)
            steepest = max(map(abs, slopes))
            self.measured.title = f"round {number + 1} of {ROUNDS}, step"
            if not steepest or not any(self._step([step * slope / steepest for slope in slopes]) for step in STEPS):
                continue
            if self.measured.report is not None:
                self.measured.report(f"divergence {before:.5f} at the start, now {self.measured.mean(self.best):.5f}")
        return self.best

    def _slopes(self, number: int) -> list[float]:
        """Return the slope of the mean square root for the logarithm of each block's rate.

        Each measurement changes all rates at once, by signs that are orthogonal. So each slope depends on all
        measurements, and is as precise as if all of them had changed only its own block.
        """
        signs = _orthogonal_signs(len(self.rates))
        slopes = [0.0] * len(self.rates)
        for index, row in enumerate(signs):
            part = (index + number) % self.measured.parts
            pair = [self._schedule([direction * SPREAD * sign for sign in row]) for direction in (1, -1)]
            if pair[0] is None or pair[1] is None:
                continue
            more, less = (self.measured.root(keep, part) for keep in pair if keep is not None)
            for block, sign in enumerate(row):
                slopes[block] += sign * (more - less) / (2 * SPREAD * len(signs))
        return slopes

    def _step(self, descent: Sequence[float]) -> bool:
        """Change the logarithms of the rates by -descent, if this helps. Return whether it does."""
        changes = [-change for change in descent]
        keep = self._schedule(changes)
        if keep is None or not self._is_better(keep):
            return False
        self.rates = _changed(self.rates, changes)
        self.best = keep
        return True

    def _is_better(self, keep: Schedule) -> bool:
        """Compare a schedule with the best one. A schedule that is worse on the first parts does not see the others."""
        if keep == self.best:
            return False
        ours = theirs = 0.0
        for part in range(self.measured.parts):
            ours += self.measured.root(keep, part) * len(self.measured(keep, part))
            theirs += self.measured.root(self.best, part) * len(self.measured(keep, part))
            if ours >= theirs:
                return False
        return self.measured.mean(keep) < self.measured.mean(self.start)

    def _schedule(self, changes: Sequence[float]) -> Schedule | None:
        """Return the schedule of changed rates that meets the budget, or None if there is none."""
        exponents = list(accumulate(_changed(self.rates, changes)))
        steepest = math.log(2 * self.cost.tokens) / exponents[0]  # keeps one token after the first block

        def schedule(steepness: float) -> list[int]:
            shares = (math.exp(-steepness * steepest * exponent) for exponent in exponents)
            return [max(round(self.cost.tokens * share), 1) for share in shares]

        try:
            return tuple(meet(self.budget, self.cost, self.cost.backbone, schedule))
        except ValueError:  # clustering makes some schedules impossible
            return None


def _changed(rates: Sequence[float], changes: Sequence[float]) -> list[float]:
    return [rate * math.exp(change) for rate, change in zip(rates, changes, strict=True)]


def _orthogonal_signs(depth: int) -> list[list[int]]:
    """Return rows of `depth` signs, whose columns are orthogonal: a part of a Hadamard matrix (Sylvester 1867)."""
    order = 1 << depth.bit_length()
    return [[(-1) ** (row & column).bit_count() for column in range(1, depth + 1)] for row in range(order)]


def _digest(text: str, tensors: dict[str, Any]) -> str:
    """Return a hash of a text and of the names, types, shapes and values of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _json_value(setting: dict[str, Any]) -> Any:
    """Return the setting as the state file stores it."""
    try:
        return json.loads(json.dumps(setting))
    except TypeError as error:
        raise ValueError(f"a calibration needs options that are JSON values: {error}") from error
