"""Calibrate a retention schedule: find the schedule of a budget that changes a model's outputs least.

The search needs a few hundred images, no labels and no training. It is an extension of the paper, whose schedules are
learned in training (Marin et al. 2021, section 5).
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
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

KNOTS = (2, 4, 7)  # numbers of knots of the search, from coarse to fine
STEPS = (0.6, 0.3)  # changes of the logarithm of a rate at a knot, from large to small
PARTS = 4  # a schedule is rejected after a quarter of the images if it is worse on these
BATCH = 50  # images that the model sees at a time

_ALGORITHM = f"pattern search, knots {KNOTS}, steps {STEPS}, parts {PARTS}"

Schedule = tuple[int, ...]


def calibrate(
    model: nn.Module,
    images: Tensor,
    downsampler: str | type[Downsampler] = "key_medoids",
    gmacs: float | None = None,
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
        ValueError: if there are no images, if the state file belongs to another search or is damaged, or if an option
            is not a JSON value. Also for an unusable method or budget, see `schedule_for`.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor (B, C, H, W) of one image or more, got {shape}")
    if gmacs is None:
        raise ValueError("gmacs is missing: give the budget of an image in 10^9 multiply-adds")
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
    known = _Measured(identity, None if state is None else Path(state))
    race = _Race(_Evaluator(plain, images, downsampler, setting), known, start, report)
    cost = ScheduleCost(model, method, **host_options, **options)  # type: ignore[arg-type]  # `schedule_for` refuses None
    budget = math.floor(float(gmacs) * 1e9 * (1 + 1e-15))  # as in `schedule_for`
    return list(_search(start, cost, budget, race))


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
        device = reference(hosts.of(model).blocks).device
        with torch.inference_mode():
            return torch.cat([_tensor(model(batch.to(device))) for batch in self.images[part].split(BATCH)])


def _tensor(output: Any) -> Tensor:
    """Return the logits or the pooled feature of a model's output, which is a tensor or a named tuple of tensors."""
    named = (getattr(output, name, None) for name in ("logits", "pooler_output"))
    found = output if isinstance(output, Tensor) else next((value for value in named if value is not None), None)
    if found is None:
        raise TypeError(f"the model returns a {type(output).__name__}, expected a tensor of logits or features")
    return found


class _Measured:
    """Divergences that are known, by schedule and part. The file stores them for a search that goes on.

    Args:
        identity: values that determine the divergences.
        path: path of the file, or None.

    Raises:
        ValueError: if the file has another identity, or is damaged.
    """

    def __init__(self, identity: dict[str, Any], path: Path | None) -> None:
        self.identity, self.path = identity, path
        self.divergences: dict[str, list[list[float]]] = {}
        if path is None:
            return
        files.check_local(path)
        if path.exists():
            self.divergences = self._read(path)

    def _read(self, path: Path) -> dict[str, list[list[float]]]:
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

    def parts(self, keep: Schedule) -> list[list[float]]:
        """Return the divergences of the parts that have been measured."""
        return self.divergences.setdefault(",".join(map(str, keep)), [])

    def add(self, keep: Schedule, found: list[float]) -> None:
        """Store the divergences of the next part."""
        self.parts(keep).append(found)
        if self.path is not None:
            with files.atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps({"identity": self.identity, "divergences": self.divergences}))


class _Race:
    """Compares schedules with the best one so far, on as few images as needed.

    It compares mean square roots of divergences. A few images have most of the divergence, so a mean of divergences
    needs several times as many images to tell two schedules apart.

    Args:
        evaluate: returns the divergence of each image of a part.
        known: divergences that are known.
        start: the first schedule.
        report: see `calibrate`.

    Attributes:
        best: the best schedule so far.
    """

    def __init__(
        self, evaluate: _Evaluator, known: _Measured, start: Schedule, report: Callable[[str], None] | None
    ) -> None:
        self.evaluate, self.known, self.report = evaluate, known, report
        self.parts = len(evaluate.images)
        self.start = self.best = start
        self.total = sum(map(len, evaluate.images))
        list(self._sums(start))

    def wins(self, keep: Schedule) -> bool:
        """Return whether a schedule is better than the best one so far. It is then the best one.

        A schedule that is worse on the first parts is rejected without the other parts. A schedule with a larger mean
        divergence than the first schedule is rejected, too.
        """
        if keep == self.best:
            return False
        for ours, theirs in zip(self._sums(keep), self._sums(self.best), strict=True):
            if ours >= theirs:
                return False
        if self.mean(keep) >= self.mean(self.start):
            return False
        self.best = keep
        return True

    def _sums(self, keep: Schedule) -> Iterator[float]:
        """Yield the sum of square roots over the first part, over the first two parts, and so on."""
        total = 0.0
        for part in range(self.parts):
            known = self.known.parts(keep)
            if part == len(known):
                self.known.add(keep, self.evaluate(keep, part))
                self._report(keep)
            total += math.fsum(math.sqrt(max(value, 0.0)) for value in known[part])  # rounding errors are negative
            yield total

    def _report(self, keep: Schedule) -> None:
        if self.report is None:
            return
        images, number = sum(map(len, self.known.parts(keep))), len(self.known.divergences)
        text = f"schedule {number}: divergence {self.mean(keep):.5f} on {images} of {self.total} images"
        if keep != self.start:
            text += f"; best {self.mean(self.best):.5f}, at the start {self.mean(self.start):.5f}"
        self.report(text)

    def mean(self, keep: Schedule) -> float:
        """Return the mean divergence over the images that have been measured."""
        known = [value for part in self.known.parts(keep) for value in part]
        return math.fsum(known) / len(known)


def _search(start: Schedule, cost: ScheduleCost, budget: int, race: _Race) -> Schedule:
    """Change the rates at which blocks remove tokens, knot by knot, while the divergence falls.

    The rate of a block is the logarithm of the share of tokens that it removes. A change of the rates at a knot is
    linear between knots. After each change, a common factor of all rates meets the budget again. First, few knots
    change the rates of many blocks together. They have few free numbers, so a few hundred images determine them. More
    knots follow. This is a pattern search (Hooke and Jeeves 1961) with as many variables as knots.
    """
    depth, tokens = len(start), cost.tokens
    rates = [(2 * block + 1) / depth**2 for block in range(depth)]  # of `schedules.by_decay`
    for knots in sorted({min(number, depth) for number in KNOTS}):
        signs = [1] * knots
        for step in STEPS:
            moved = True
            while moved:
                moved = False
                for knot in range(knots):
                    for sign in (signs[knot], -signs[knot]):
                        changed = _changed(rates, knots, knot, sign * step)
                        keep = _meeting(changed, tokens, cost, budget)
                        if keep is not None and race.wins(keep):
                            rates, signs[knot], moved = changed, sign, True
                            break
    return race.best


def _changed(rates: Sequence[float], knots: int, knot: int, step: float) -> list[float]:
    """Multiply the rate at a knot by exp(step). The factor falls to 1 at the neighbouring knots."""
    spacing = (len(rates) - 1) / max(knots - 1, 1)
    near = (max(0.0, 1 - abs(block / max(spacing, 1e-9) - knot)) for block in range(len(rates)))
    return [rate * math.exp(step * share) for rate, share in zip(rates, near, strict=True)]


def _meeting(rates: Sequence[float], tokens: int, cost: ScheduleCost, budget: int) -> Schedule | None:
    """Return the schedule with these rates, times a factor, that meets the budget. None if there is none."""
    exponents = list(accumulate(rates))
    steepest = math.log(2 * tokens) / exponents[0]  # keeps one token after the first block

    def schedule(steepness: float) -> list[int]:
        return [max(round(tokens * math.exp(-steepness * steepest * exponent)), 1) for exponent in exponents]

    try:
        return tuple(meet(budget, cost, cost.backbone, schedule))
    except ValueError:  # clustering makes some schedules impossible
        return None


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
