"""A self-contained HTML page: what pooling does to one photograph, block by block, for several methods and budgets."""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import Environment
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

import tokenpool
from tokenpool import files, hosts
from tokenpool.budget import ScheduleCost
from tokenpool.downsampling import METHODS, REGISTRY

AGAINST = ("power_bert", "wkmedoids", "tome")  # the first one is in the second panel: the paper's comparison
SHARES = (0.8, 0.65, 0.5)  # of the plain model's cost
TEMPLATE = Path(__file__).with_name("explain.html")
NEAR = 0.02  # of the plain model's cost: a share that is so near to the chosen cost is left out
ZOOM = 2  # the photograph of the page has ZOOM times the height and width of the model's input


@dataclass(frozen=True)
class Subject:
    """What the page is about.

    Attributes:
        title: name of the photograph.
        photograph: as loaded from a file.
        model: name of the timm model.
        method: name of the method in the first panel.
        schedule: its schedule, as arguments of `tokenpool.patch`: `keep` or `gmacs`.
        carry: see `tokenpool.patch`.
        credit: author and licence of the photograph, if they must be named.
    """

    title: str
    photograph: Image.Image
    model: str
    method: str
    schedule: dict[str, Any]
    carry: bool = True
    credit: str = ""


def write(
    path: Path, subject: Subject, model: nn.Module, against: Sequence[str] = AGAINST, shares: Sequence[float] = SHARES
) -> Iterator[str]:
    """Write the page. The model is patched meanwhile, and plain afterwards.

    Args:
        path: of the file.
        subject: photograph, and method and schedule of the first panel.
        model: the model, in evaluation mode, patched or plain.
        against: names of the methods to compare with.
        shares: further budgets, as shares of the plain model's cost.

    Yields:
        Lines to print: the methods and budgets that the model does not allow, and the path of the page.
    """
    data = describe(subject, model, against, shares)
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    page = template.render(data=data, subject=subject, version=tokenpool.__version__)
    with files.atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    yield from (f"not on the page: {reason}" for reason in data["skipped"])
    yield f"page: {path}"


def describe(
    subject: Subject, model: nn.Module, against: Sequence[str] = AGAINST, shares: Sequence[float] = SHARES
) -> dict[str, Any]:
    """Run the model on the photograph with each method and budget, for the page.

    Args:
        subject: see `write`.
        model: see `write`.
        against: see `write`.
        shares: see `write`.

    Returns:
        Values for JSON. `settings` has one entry for each pair of method and budget; its `blocks` are the assignments
        of `tokenpool.trace`, one list of N integers for each block.
    """
    tokenpool.unpatch(model)
    pixels = transformed(subject.photograph, model)[None]  # (1, 3, H, W)
    with torch.inference_mode():
        plain = model(pixels)[0]
    full = _macs(model, subject.method)[0] / 1e9

    def run(method: str, schedule: dict[str, Any]) -> dict[str, Any]:
        tokenpool.patch(model, method, carry=subject.carry, **schedule)
        return {"method": method, **_result(model, method, pixels, plain)}

    chosen = run(subject.method, subject.schedule)
    own = min(chosen["gmacs"], full)
    budgets = sorted([own, *(share * full for share in shares if abs(share * full - own) > NEAR * full)], reverse=True)
    settings, skipped = [], []
    pairs = list(product(dict.fromkeys([subject.method, *against]), enumerate(budgets)))
    for method, (index, gmacs) in tqdm(pairs, unit="setting", leave=False):
        is_chosen = method == subject.method and gmacs == own
        try:
            settings.append({"budget": index, **(chosen if is_chosen else run(method, {"gmacs": gmacs}))})
        except ValueError as error:
            skipped.append(f"{method} at {gmacs:.3g} GMACs: {error}")
    tokenpool.unpatch(model)
    grid = hosts.of(model).grid((pixels.shape[-2], pixels.shape[-1]))
    photograph = shown(subject.photograph, model)
    return {
        "photograph": data_uri(photograph),
        "pixels": [pixels.shape[-1], pixels.shape[-2]],  # width, height
        "grid": list(grid),  # rows, columns
        "colours": patch_colours(np.asarray(photograph), grid),
        "plain": {"gmacs": full, "classes": _with_plain(plain, plain, model)},
        "labels": {setting["method"]: REGISTRY[setting["method"]].label for setting in settings},
        "budgets": [f"{gmacs:#.3g} GMACs ({100 * gmacs / full:.0f} % of plain)" for gmacs in budgets],
        "settings": settings,
        "chosen": {"method": subject.method, "budget": budgets.index(own)},
        "skipped": skipped,
    }


def _result(model: nn.Module, method: str, pixels: Tensor, plain: Tensor) -> dict[str, Any]:
    """Cost, classes and assignments of a patched model on one image (1, 3, H, W); `plain` is the plain output."""
    trace = tokenpool.trace(model, pixels)
    logits = trace.logits[0]
    total, clustering = _macs(model, method, hosts.of(model).setting.keep)
    return {
        "gmacs": total / 1e9,
        "clustering": clustering / 1e9,
        "cosine": _number(F.cosine_similarity(plain, logits, dim=0).item()),
        "classes": _with_plain(logits, plain, model),
        "tokens": [block.tokens for block in trace.blocks],
        "blocks": [block.assignment[0].tolist() for block in trace.blocks],
    }


def _number(value: float) -> float | None:
    """A value for the page; None if it is not finite, as JSON has no such numbers."""
    return round(value, 4) if math.isfinite(value) else None


def _macs(model: nn.Module, method: str, keep: Sequence[int] | None = None) -> tuple[int, int]:
    """Multiply-adds of one image, in total and for clustering; of all tokens without a schedule."""
    cost = ScheduleCost(model, METHODS[method])  # equals flops.count, which takes seconds for a clustering
    keep = keep or [cost.tokens] * len(cost.blocks)
    total = cost(keep)
    return total, total - cost.backbone(keep)


def transformed(photograph: Image.Image, model: nn.Module, zoom: int = 1) -> Tensor:
    """The part of a photograph that a timm model sees: (3, zoom H, zoom W), normalised for the model."""
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    return create_transform(**config | {"input_size": (channels, zoom * height, zoom * width)})(photograph)


def shown(photograph: Image.Image, model: nn.Module, zoom: int = ZOOM) -> Image.Image:
    """The part of a photograph that a timm model sees, in `zoom` times the height and width of the model's input."""
    config = resolve_model_data_config(model)
    mean, std = (np.array(config[key])[:, None, None] for key in ("mean", "std"))
    values = transformed(photograph, model, zoom).numpy() * std + mean
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def data_uri(photograph: Image.Image) -> str:
    """A photograph as the URI of a JPEG."""
    buffer = io.BytesIO()
    photograph.save(buffer, "jpeg", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def patch_colours(pixels: np.ndarray, grid: tuple[int, int]) -> list[list[int]]:
    """Mean colour of each patch, row by row: red, green and blue in 0..255.

    Args:
        pixels: (H, W, 3), values in 0..255.
        grid: rows and columns of patches.
    """
    height, width = pixels.shape[:2]
    labels = (np.arange(height) * grid[0] // height)[:, None] * grid[1] + np.arange(width) * grid[1] // width  # (H, W)
    count = np.bincount(labels.ravel(), minlength=grid[0] * grid[1])
    sums = [np.bincount(labels.ravel(), pixels[:, :, channel].ravel()) for channel in range(3)]
    return (np.stack(sums, 1) / count[:, None]).round().astype(int).tolist()


def likely(logits: Tensor, model: nn.Module, count: int = 5) -> list[tuple[int, str, float]]:
    """The most likely classes of an image: index, name and probability; an empty list for a model without classes.

    The names are ImageNet's, if the model has 1000 classes, and numbers otherwise.

    Args:
        logits: (classes,).
        model: a timm model.
        count: number of classes.
    """
    if not model.num_classes:
        return []
    shares, classes = logits.float().softmax(-1).topk(min(count, model.num_classes))
    names = ImageNetInfo() if model.num_classes == 1000 else None
    labels = [
        names.index_to_description(index).split(",")[0] if names else f"class {index}" for index in classes.tolist()
    ]
    return list(zip(classes.tolist(), labels, shares.tolist(), strict=True))


def _with_plain(logits: Tensor, plain: Tensor, model: nn.Module) -> list[dict[str, Any]]:
    """The most likely classes, beside their probability in the plain model."""
    before = plain.float().softmax(-1)
    return [
        {"name": name, "share": _number(share), "plain": _number(before[index].item())}
        for index, name, share in likely(logits, model)
    ]
