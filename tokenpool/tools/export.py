"""Export a model into a file for deployment, check the file against the model, and report both."""

import json
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.datasets.folder import is_image_file

import tokenpool
from tokenpool import files
from tokenpool.runs.environment import environment
from tokenpool.tools import int8
from tokenpool.tools.formats import FORMATS, OPSET
from tokenpool.training import fingerprint
from tokenpool.training.images import load_image

PRECISIONS = {"float32": torch.float32, "float16": torch.float16} | dict.fromkeys(int8.PRECISIONS, torch.float32)
BATCHES = (1, 3, 8)  # sizes of the batches that check a file, in turns


@dataclass(frozen=True)
class Export:
    """What is exported.

    Attributes:
        model: name of the timm model.
        to: one of `FORMATS`.
        method: downsampling method; "none" for the plain model.
        schedule: arguments of `tokenpool.patch`: `keep` or `gmacs`.
        carry: see `tokenpool.patch`.
        weights: file of weights. None for timm's download, or for random weights if `pretrained` is False.
        pretrained: whether to load timm's weights.
        ema: see `tokenpool.load_weights`.
        precision: one of `PRECISIONS`. float32 and float16 are of weights, images and logits. With int8 and
            int8-dynamic, linear layers are quantised (see `tokenpool.tools.int8`); images and logits are float32.
            Clustering and scores are always in float32.
        calibration: folder of photographs that calibrate int8, and only int8.
        calibration_limit: use so many of them only.
        opset: of ONNX.
        options: of the method.
        model_options: of the timm model.
    """

    model: str
    to: str
    method: str = "none"
    schedule: dict[str, Any] = field(default_factory=dict)
    carry: bool = True
    weights: Path | None = None
    pretrained: bool = False
    ema: bool | None = None
    precision: str = "float32"
    calibration: Path | None = None
    calibration_limit: int = 64
    opset: int = OPSET
    options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("to", FORMATS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.precision in int8.PRECISIONS and self.to != "onnx":
            raise ValueError(f"--precision {self.precision} is for --to onnx only, not for --to {self.to}")
        if (self.calibration is not None) != (self.precision == int8.STATIC):
            raise ValueError(
                f"--precision {int8.STATIC} needs --calibration FOLDER, or take --precision {int8.DYNAMIC}"
                if self.calibration is None
                else f"--calibration is for --precision {int8.STATIC} only, not for {self.precision}: leave it out"
            )


def export(chosen: Export, path: Path, images: Path | None = None, limit: int = 64) -> Iterator[str]:
    """Export a model and check the file. Lines to print; a JSON file beside the file, `report_of`, has the same report.

    Args:
        chosen: what is exported.
        path: file to write.
        images: folder of photographs to compare logits on; None for random images.
        limit: use so many of them only.

    Raises:
        ModuleNotFoundError: if a package is missing.
        ValueError: for an unusable setting, or if the folder has no image.
    """
    form = FORMATS[chosen.to]
    form.check(f"export --to {chosen.to}")
    model = build(chosen)
    config = resolve_model_data_config(model)
    # Mistakes before the export, which takes long.
    paths = None if images is None else _photographs("--images", images, limit)
    calibration = _calibration(chosen, config)
    dtype = PRECISIONS[chosen.precision]
    about = _description(chosen, model, config, len(calibration))
    _check_replaced(path, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = _random(config, limit) if paths is None else _pixels(paths, config)
    # The file gets its name when it is complete and checked, so an interrupted export leaves none.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as temporary:
        written = Path(temporary) / path.name
        started = time.perf_counter()
        _write(chosen, model.to(dtype), written, about, calibration)
        seconds = time.perf_counter() - started
        run, stored, operators = form.read(written)
        if stored != about:
            raise RuntimeError(f"the description in {path} is not the one that was written")
        expected, found = _in_batches(model.float(), pixels), _in_batches(run, pixels.to(dtype)).float()
        report = about | {
            "file": str(path),
            "bytes": sum(part.stat().st_size for part in form.parts(written)),
            "seconds": seconds,
            "operators": operators,
            "checked_on": "random images" if images is None else str(images),
            "images": len(pixels),
            "largest_difference": (found - expected).abs().max().item(),
            "largest_logit": expected.abs().max().item(),
            "differing_top1": int((found.argmax(1) != expected.argmax(1)).sum()),
            "environment": environment(),
        }
        for part in Path(temporary).iterdir():
            part.replace(path.parent / part.name)
    beside = report_of(path)
    with files.atomic_write(beside) as written:
        written.write_text(json.dumps(report, indent=1) + "\n")
    yield f"file: {path}, {report['bytes'] / 1e6:.1f} MB, exported in {seconds:.0f} s"
    yield f"{sum(operators.values())} operators: {', '.join(f'{count} {name}' for name, count in operators.items())}"
    yield (
        f"{len(pixels)} {'random images' if images is None else 'photographs'}, against eager mode in float32: largest "
        f"difference of a logit {report['largest_difference']:.2g} (largest logit {report['largest_logit']:.3g}), "
        f"another top-1 class for {report['differing_top1']}"
    )
    yield f"report: {beside}"


def _write(chosen: Export, model: nn.Module, path: Path, about: dict[str, Any], calibration: Tensor) -> None:
    """Write the file of an export, quantised if its precision says so."""
    form, config = FORMATS[chosen.to], about["preprocessing"]
    example = torch.zeros(2, *config["input_size"], dtype=PRECISIONS[chosen.precision])
    if chosen.precision not in int8.PRECISIONS:
        form.write(model, example, path, about, chosen.opset)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float32.onnx"
        form.write(model, example, source, about, chosen.opset)
        int8.quantise(chosen.precision, source, path, calibration.split(max(BATCHES)))


def path_of(chosen: Export, folder: Path) -> Path:
    """Return the file of an export: its name has the model, the method, the schedule, options and the precision."""
    given = [f"{name}{value}" for name, value in (chosen.schedule | chosen.options | chosen.model_options).items()]
    words = [chosen.model, chosen.method, *given, "" if chosen.carry else "no_carry", chosen.precision]
    safe = (re.sub("[^0-9A-Za-z._-]+", "_", word).strip("_") for word in words)
    return folder / ("-".join(filter(None, safe)) + FORMATS[chosen.to].suffix)


def _check_replaced(path: Path, about: dict[str, Any]) -> None:
    """Check that an existing file is an export of the same setting: names do not tell of weights and opset."""
    if not path.exists():
        return
    try:
        before = json.loads(report_of(path).read_text())
        same = all(before.get(name) == about[name] for name in about if name not in ("gmacs", "tokenpool", "torch"))
    except (OSError, ValueError, AttributeError):
        same = False
    if not same:
        raise ValueError(f"{path} is an export of another setting, or has no report: choose another folder by --output")


def report_of(path: Path) -> Path:
    """Return the report of an exported file. The name keeps the suffix, so that each format has a report of its own."""
    return path.with_name(f"{path.name}.json")


def build(chosen: Export) -> nn.Module:
    """Return the model of an export with its weights, in float32 and evaluation mode."""
    model = timm.create_model(chosen.model, pretrained=chosen.pretrained, **chosen.model_options).eval()
    if chosen.weights is not None:
        tokenpool.load_weights(model, chosen.weights, ema=chosen.ema)
    if chosen.method != "none":
        tokenpool.patch(model, chosen.method, carry=chosen.carry, **chosen.schedule, **chosen.options)
    return model.requires_grad_(False)


def _description(chosen: Export, model: nn.Module, config: dict[str, Any], calibration: int) -> dict[str, Any]:
    """What a file says of itself, as JSON values: model, setting, schedule, cost and preprocessing."""
    about: dict[str, Any] = {
        "model": chosen.model,
        "model_options": chosen.model_options,
        "method": chosen.method,
        "weights": _weights_of(chosen),
        "precision": chosen.precision,
        "gmacs": tokenpool.flops.count(model).gmacs,
        "preprocessing": config,
        "tokenpool": tokenpool.__version__,
        "torch": torch.__version__,
    }
    if calibration:
        about["calibration_images"] = calibration
    if chosen.to != "pt2":
        about["opset"] = chosen.opset
    if chosen.method != "none":
        setting = tokenpool.hosts.of(model).setting
        about |= {"setting": setting.arguments(), "keep": setting.keep}
    return json.loads(json.dumps(about, default=str))


def _weights_of(chosen: Export) -> str:
    """Where the weights come from: a file is named with its fingerprint, and without its folder."""
    if chosen.weights is None:
        return "timm" if chosen.pretrained else "random"
    return f"{chosen.weights.name}, {fingerprint.of_weights(chosen.weights)}"


def _calibration(chosen: Export, config: dict[str, Any]) -> Tensor:
    """Images that calibrate, none unless the precision is "int8"."""
    if chosen.calibration is None:
        return torch.empty(0)
    return _pixels(_photographs("--calibration", chosen.calibration, chosen.calibration_limit), config)


def _photographs(option: str, folder: Path, limit: int) -> list[Path]:
    files.check_local(folder)
    found = sorted(path for path in folder.rglob("*") if is_image_file(path.name))
    if not found:
        raise ValueError(f"{option} {folder} has no image: give a folder of photographs")
    step = max(len(found) // limit, 1)
    return found[::step][:limit]  # of all classes, if there is a folder for each


def _pixels(paths: list[Path], config: dict[str, Any]) -> Tensor:
    transform = create_transform(**config)
    return torch.stack([transform(load_image(path)) for path in paths])


def _random(config: dict[str, Any], count: int) -> Tensor:
    return torch.randn(count, *config["input_size"], generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _in_batches(model: Any, pixels: Tensor) -> Tensor:
    """Logits of images in batches of different sizes."""
    sizes = [BATCHES[index % len(BATCHES)] for index in range(len(pixels))]
    found, start = [], 0
    for size in sizes:
        if start < len(pixels):
            found.append(model(pixels[start : start + size]))
            start += size
    return torch.cat(found)
