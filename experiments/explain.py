"""What pooling does to one image: predictions, cost, and a picture of which patches become one token."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenpool
from tokenpool import plotting
from tokenpool.data import load_image


def explain(
    image: Path, name: str, method: str, keep: str, carry: bool, weights: Path | None, output: Path
) -> Iterator[str]:
    """Lines to print; the picture is written to `output`.

    Args:
        image: file of the photograph.
        name: of the timm model.
        method: name of the downsampler.
        keep: schedule, see `tokenpool.schedules.resolve`.
        carry: see `tokenpool.patch`.
        weights: to use instead of timm's download.
        output: folder for the picture.

    Raises:
        ValueError: if the image cannot be read; the message names it.
    """
    photograph = load_image(image)  # before the model is fetched
    model = tokenpool.create_model(name, pretrained=weights is None).eval()
    if weights is not None:
        tokenpool.load_weights(model, weights)
    config = resolve_model_data_config(model)
    pixels = create_transform(**config)(photograph)[None]  # (1, 3, H, W)
    with torch.inference_mode():
        yield f"plain:  {_costs(model)}; {_likely(model(pixels))}"
        tokenpool.patch(model, method, keep, carry=carry)
        trace = tokenpool.trace(model, pixels)
    yield f"{method}: {_costs(model)}; {_likely(trace.logits)}"
    yield f"keep: {list(model.blocks.setting.keep)}"

    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    shown = (pixels[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    figure = plotting.strip(shown, trace)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{image.stem}-{method}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    yield f"picture: {path}"


def _costs(model: VisionTransformer) -> str:
    count = tokenpool.flops.count(model)
    return f"{count.gmacs:.3g} GMACs, of which clustering {count.clustering_gmacs:.3g}"


def _likely(logits: Tensor, count: int = 5) -> str:
    """The most likely classes by name, if the model has ImageNet's 1000, else by number."""
    shares, classes = logits[0].softmax(-1).topk(min(count, logits.shape[1]))
    names = ImageNetInfo() if logits.shape[1] == 1000 else None
    labels = [
        names.index_to_description(index).split(",")[0] if names else f"class {index}" for index in classes.tolist()
    ]
    return ", ".join(f"{label} {share:.0%}" for label, share in zip(labels, shares.tolist(), strict=True))
