"""What pooling does to one image: predictions, cost, and a picture and a page of which patches become one token."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenpool
from tokenpool import files, hosts
from tokenpool.analysis import plotting
from tokenpool.budget import ScheduleCost
from tokenpool.downsampling import METHODS, REGISTRY, find, with_schedule
from tokenpool.tools import explain_page
from tokenpool.training.images import load_image

LONGEST = 4  # times the shorter side; what lies beyond is cut off, as it is no part of the centre that a model sees


def explain(
    image: Path,
    name: str,
    method: str,
    schedule: dict[str, Any],
    carry: bool,
    weights: Path | None,
    output: Path,
    ema: bool | None = None,
    against: Sequence[str] = explain_page.AGAINST,
    shares: Sequence[float] = explain_page.SHARES,
) -> Iterator[str]:
    """Lines to print; the picture and the page are written to `output`.

    Args:
        image: file of the photograph.
        name: of the timm model.
        method: name of the downsampler.
        schedule: arguments of `tokenpool.patch`: `keep` or `gmacs`.
        carry: see `tokenpool.patch`.
        weights: to use instead of timm's download.
        output: folder for the picture and the page.
        ema: see `tokenpool.load_weights`.
        against: methods to compare with on the page.
        shares: further budgets of the page, as shares of the plain model's cost.

    Raises:
        ValueError: if the image cannot be read, or for an unusable setting; the message names it.
    """
    for each in (method, *against):
        if not REGISTRY[find(each)[0]].has_schedule:
            raise ValueError(f"method {each!r} has no schedule; choose one of {', '.join(with_schedule())}")
    files.check_local(image)
    photograph = _not_too_long(load_image(image))  # all mistakes before the weights are fetched
    if tokenpool.create_model(name, method, carry=carry, **schedule).in_chans != 3:
        raise ValueError(f"model {name} does not take photographs: they have three channels")
    output.mkdir(parents=True, exist_ok=True)
    model = tokenpool.create_model(name, pretrained=weights is None).eval()
    if weights is not None:
        tokenpool.load_weights(model, weights, ema=ema)
    config = resolve_model_data_config(model)
    pixels = create_transform(**config)(photograph)[None]  # (1, 3, H, W)
    cost = ScheduleCost(model, METHODS[method])  # equals flops.count, which takes seconds for a clustering
    with torch.inference_mode():
        before = model(pixels)
        yield f"plain: {_costs(cost, [cost.tokens] * len(cost.blocks))}{_likely(before, model)}"
        tokenpool.patch(model, method, carry=carry, **schedule)
        trace = tokenpool.trace(model, pixels)
    yield f"{method}: {_costs(cost, hosts.of(model).setting.keep)}{_likely(trace.logits, model)}"
    yield f"cosine of the two outputs: {F.cosine_similarity(before, trace.logits).item():.3f}"
    yield f"tokens after each block: {', '.join(str(block.tokens) for block in trace.blocks)}"

    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    shown = (pixels[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    figure = plotting.strip(shown, trace)
    path = output / f"{image.stem}-{method}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    yield f"picture: {path}"
    subject = explain_page.Subject(image.name, photograph, name, method, schedule, carry)
    yield from explain_page.write(path.with_suffix(".html"), subject, model, against, shares)


def _not_too_long(photograph: Image.Image) -> Image.Image:
    """The centre of a very long image: scaled to the model's height, the whole of it could fill the memory."""
    width, height = photograph.size
    most = LONGEST * min(width, height)
    left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
    return photograph.crop((left, top, left + min(width, most), top + min(height, most)))


def _costs(cost: ScheduleCost, keep: Sequence[int]) -> str:
    macs, clustering = cost(keep), cost(keep) - cost.backbone(keep)
    return f"{macs / 1e9:.4g} GMACs" + (f", of which clustering {clustering / 1e9:.3g}" if clustering else "")


def _likely(logits: Tensor, model: VisionTransformer, count: int = 5) -> str:
    """The most likely classes, nothing for a model without classes."""
    found = explain_page.likely(logits[0], model, count)
    return "; " * bool(found) + ", ".join(f"{label} {share:.0%}" for _, label, share in found)
