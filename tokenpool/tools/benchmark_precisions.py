"""The plain model and pooled models in float32 and in int8, run by ONNX Runtime: accuracy, size and time.

The images have two interleaved halves. The first half calibrates int8, the second half measures all models. Times are
taken in turns: the model, the plain model of the same precision, and the plain model in float32.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import tokenpool
from tokenpool import flops
from tokenpool.analysis import bits, results
from tokenpool.runs.environment import environment
from tokenpool.runs.timing import differences, seconds, timed_on
from tokenpool.tools import backends, int8
from tokenpool.tools.export import Export, build
from tokenpool.tools.formats import FORMATS, OPSET
from tokenpool.training import fingerprint
from tokenpool.training.data import ImageFolderDataModule
from tokenpool.training.images import open_images
from tokenpool.training.labels import outputs_of

FLOAT32 = "float32"
PRECISIONS = (FLOAT32, int8.DYNAMIC, int8.STATIC)
CALIBRATED, MEASURED = "1/2", "2/2"  # halves of the images


@dataclass(frozen=True)
class Source:
    """What all results of a study have in common.

    Attributes:
        model: name of the timm model.
        data: a folder in ImageNet's layout, see `tokenpool.training.images.open_images`.
        weights: file of weights; None for timm's.
        limit: use so many images only, evenly spaced; 0 for all.
        calibration: so many images of the first half calibrate int8, evenly spaced.
        batch_size: images a batch, of all passes.
        repeats: times that are taken of each model.
        carry: carry token sizes.
        model_options: of the timm model.
    """

    model: str
    data: str
    weights: Path | None = None
    limit: int = 0
    calibration: int = 64
    batch_size: int = 32
    repeats: int = 7
    carry: bool = True
    model_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One model in one precision.

    Attributes:
        method: downsampling method; "none" for the plain model.
        schedule: how `keep` was given, such as "share 0.65"; empty for the plain model.
        keep: retention schedule; None for the plain model.
        precision: one of `PRECISIONS`.
    """

    method: str
    schedule: str
    keep: tuple[int, ...] | None
    precision: str

    @property
    def name(self) -> str:
        """Name of the result's file."""
        words = [self.method, self.schedule, self.precision]
        return "-".join(re.sub("[^0-9A-Za-z.-]+", "_", word) for word in words if word)


def settings(source: Source, methods: Sequence[str], shares: Sequence[float], keeps: Sequence[str]) -> list[Setting]:
    """The plain model first, then each method with each schedule, in every precision.

    Args:
        source: names the model.
        methods: names of methods with a schedule.
        shares: budgets, as shares of the plain model's cost.
        keeps: schedules, in any spelling of `tokenpool.patch`.

    Raises:
        ValueError: for an unknown method, a share that is not between 0 and 1, or a schedule that cannot be met.
    """
    plain = tokenpool.create_model(source.model, **source.model_options)
    cost = flops.count(plain).gmacs
    models: list[tuple[str, str, tuple[int, ...] | None]] = [("none", "", None)]
    for share in shares:
        if not 0 < share < 1:
            raise ValueError(f"--share {share:g} must be above 0 and below 1")
        given = f"share {share:g}"
        models += [(name, given, tuple(tokenpool.schedule_for(share * cost, plain, name))) for name in methods]
    for keep in keeps:
        for name in methods:
            pooled = tokenpool.create_model(source.model, name, keep, **source.model_options)
            models.append((name, f"keep {keep}", tuple(tokenpool.hosts.of(pooled).setting.keep)))
    return [Setting(*model, precision) for model in models for precision in PRECISIONS]


def run(source: Source, chosen: Sequence[Setting], folder: Path, exports: Path) -> Iterator[dict[str, Any]]:
    """Measure each setting and write one JSON file each. Settings whose file is there are not measured again.

    Args:
        source: the model and the images.
        chosen: from `settings`.
        folder: for the results.
        exports: folder for exported files; files that are there are used.

    Returns:
        The results, as `tokenpool.results` stores them. Their metrics hold what was measured, one entry an image or a
        pass: `correct` (encoded by `tokenpool.analysis.bits`), `predicted` (classes of the data), and `seconds` of
        "model", "plain" (of the same precision) and "plain_float32" for one batch. `bytes` is the size of the file.

    Raises:
        ModuleNotFoundError: if a package is missing.
        ValueError: if a file holds another setting, or times of another machine; the message names the file.
    """
    FORMATS["onnx"].check("benchmark-precisions")
    study = _Study(source, exports)
    for setting in chosen:
        path = folder / f"{setting.name}.json"
        if not path.exists():
            results.save(study.measure(setting), path)
        outcome = results.read(path)
        study.check(outcome, setting, path)
        yield outcome


class _Study:
    """Images, labels and exported models, which several settings share."""

    def __init__(self, source: Source, exports: Path) -> None:
        self.source, self.exports = source, exports
        found = environment()
        self.environment = found | {"versions": found["versions"] | backends.versions("onnxruntime")}
        self.plain = build(self._export(Setting("none", "", None, FLOAT32)))
        self.config = resolve_model_data_config(self.plain)
        images = open_images(source.data, "val")
        self.outputs = outputs_of(images.classes, self.plain.num_classes)
        self.identity = {"test_images": fingerprint.of_images(images), "pretrained_weights": self._weights()}
        self.runnable: dict[tuple[str, str, str], Callable[[Tensor], Tensor]] = {}

    def described(self, setting: Setting) -> dict[str, Any]:
        """The stored setting: no path, so that results do not depend on places."""
        common = asdict(self.source)
        for name in ("data", "weights"):
            del common[name]
        return json.loads(json.dumps(common | asdict(setting) | {"part": MEASURED, "opset": OPSET}))

    def measure(self, setting: Setting) -> dict[str, Any]:
        """The result of a setting."""
        run, path = self._exported(setting)
        names = {"model": setting, "plain": Setting("none", "", None, setting.precision)}
        names["plain_float32"] = Setting("none", "", None, FLOAT32)
        runs = {one: self._exported(one)[0] for one in names.values()}  # each once, if they are the same
        predicted, correct = [], []
        chosen = slice(None) if self.outputs is None else self.outputs
        for images, labels in self._loader(MEASURED):
            found = run(images)[:, chosen].argmax(-1)
            predicted += found.tolist()
            correct += (found == labels).tolist()
        batch = next(iter(self._loader(MEASURED)))[0]
        times = seconds({one: partial(run, batch) for one, run in runs.items()}, batch.device, self.source.repeats)
        model = build(self._export(setting))
        count, plain = flops.count(model), flops.count(self.plain)
        return {
            "setting": self.described(setting),
            "identity": self.identity,
            "metrics": {
                "top1": 100 * sum(correct) / len(correct),
                "images": len(correct),
                "bytes": path.stat().st_size,
                "measured_batch": len(batch),
                "correct": bits.encode(correct),
                "predicted": predicted,
                "seconds": {name: times[one] for name, one in names.items()},
                "device": "CPU",
                "threads": torch.get_num_threads(),
            },
            "cost": {
                "gmacs": count.gmacs,
                "clustering_gmacs": count.clustering_gmacs,
                "plain_gmacs": plain.gmacs,
            },
            "environment": self.environment,
        }

    def check(self, outcome: dict[str, Any], setting: Setting, path: Path) -> None:
        """Refuse a stored result that is not the result of the setting here."""
        expected = {"setting": self.described(setting), "identity": self.identity}
        for part, values in expected.items():
            for name, value in values.items():
                if outcome.get(part, {}).get(name) != value:
                    raise ValueError(
                        f"{path} has another {name}: choose another folder with --output, or delete the file"
                    )
        then, today = differences(
            timed_on(outcome), timed_on({"environment": self.environment, "metrics": outcome["metrics"]})
        )
        if then:
            raise ValueError(
                f"{path} was timed with {then}, now {today}: choose another folder with --output, or delete the file"
            )

    def _weights(self) -> str:
        if self.source.weights is not None:
            return fingerprint.of_weights(self.source.weights)
        return fingerprint.of_arrays(*(value.numpy() for value in self.plain.state_dict().values()))

    def _export(self, setting: Setting) -> Export:
        source = self.source
        return Export(
            source.model,
            "onnx",
            setting.method,
            {} if setting.keep is None else {"keep": list(setting.keep)},
            source.carry,
            source.weights,
            pretrained=source.weights is None,
            model_options=source.model_options,
        )

    def _exported(self, setting: Setting) -> tuple[Callable[[Tensor], Tensor], Path]:
        """The function from images to logits of a setting, and its file, which is written unless it is there."""
        path = self.exports / f"{setting.name}.onnx"
        if not path.exists():
            float32 = Setting(setting.method, setting.schedule, setting.keep, FLOAT32)
            if setting == float32:
                self._write(build(self._export(setting)), path)
            else:
                batches = self._calibration() if setting.precision == int8.STATIC else ()
                int8.quantise(setting.precision, self._exported(float32)[1], path, batches)
        key = setting.method, setting.schedule, setting.precision
        if key not in self.runnable:
            self.runnable = {one: run for one, run in self.runnable.items() if one[0] == "none"}  # the plain ones stay
            self.runnable[key] = FORMATS["onnx"].read(path, torch.get_num_threads())[0]
        return self.runnable[key], path

    def _write(self, model: nn.Module, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        FORMATS["onnx"].write(model, torch.zeros(2, *self.config["input_size"]), path, {}, OPSET)

    def _calibration(self) -> Iterator[Tensor]:
        images = self._loader(CALIBRATED).dataset
        chosen = torch.linspace(0, len(images) - 1, min(self.source.calibration, len(images))).long().tolist()
        for batch, _ in DataLoader(Subset(images, chosen), batch_size=8):
            yield batch

    def _loader(self, part: str) -> DataLoader:
        transform = {name: self.config[name] for name in ("mean", "std", "crop_pct", "interpolation", "crop_mode")}
        size = self.config["input_size"][1:]
        data = ImageFolderDataModule(self.source.data, size, workers=0, limit=self.source.limit, part=part, **transform)
        data.setup("test")
        return DataLoader(data.test_set, batch_size=self.source.batch_size)
