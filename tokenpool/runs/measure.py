"""Runs that measure more than accuracy: agreement, throughput, redundancy, convergence and clusters."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_sample_images
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.transforms import functional as transforms

import tokenpool
from tokenpool.analysis import redundancy
from tokenpool.downsampling import TokenPooling
from tokenpool.runs import remembered, timing
from tokenpool.training.callbacks import ReconstructionErrors
from tokenpool.training.data import DigitsDataModule
from tokenpool.training.labels import outputs_of

PHOTOGRAPHS = ("china", "flower")  # scikit-learn's, which need no download
TIMED_BATCH = 32  # images
MOST_ITERATIONS = 50  # of a clustering whose convergence is measured
CLUSTERED_DIGITS = 8  # images of the test set in Figure 1c


def measure_throughput(model: VisionTransformer, data: LightningDataModule) -> dict[str, Any]:
    """Images a second, against the plain model in turns."""
    plain = tokenpool.unpatch(copy.deepcopy(model))
    images = next(_batches(model, data))[:TIMED_BATCH]
    return timing.measure(model, plain, images)


def measure_agreement(model: VisionTransformer, data: LightningDataModule) -> dict[str, Any]:
    """Top-1, and how far the predictions are from the plain model's, with what is needed to pair runs by image.

    `correct`: for each image whether it is classified right, 1 or 0. `divergences`: for each image the Kullback-Leibler
    divergence of the predicted distribution from the plain model's, in nats, which varies less than `correct` does.
    Both are among the classes of the data, see `tokenpool.training.labels.outputs_of`. `relative_error`: of
    each block, see `tokenpool.training.callbacks.ReconstructionErrors`; empty for a plain model.
    """
    plain = tokenpool.unpatch(copy.deepcopy(model))
    of_plain = remembered.fingerprint(plain)
    outputs = outputs_of(data.classes, model.num_classes)
    chosen = slice(None) if outputs is None else outputs
    correct, divergences = [], []
    errors = ReconstructionErrors()
    errors.start(model)
    with torch.inference_mode():
        for images, labels in data.test_dataloader():
            logits = model(images.to(_device(model))), remembered.predict(plain, images, of_plain)
            found, expected = (each[:, chosen].log_softmax(-1) for each in logits)
            correct += (found.argmax(-1).cpu() == labels).int().tolist()
            divergences += F.kl_div(found, expected, log_target=True, reduction="none").sum(-1).tolist()
    errors.stop()
    top1, images = float(np.mean(correct)), len(correct)
    return {
        "top1": 100 * top1,
        "top1_error": 100 * (top1 * (1 - top1) / images) ** 0.5,
        "divergence": float(np.mean(divergences)),
        "relative_error": errors.relative,
        "images": images,
        "correct": correct,
        "divergences": [round(divergence, 5) for divergence in divergences],
    }


def measure_redundancy(model: VisionTransformer, data: LightningDataModule) -> dict[str, Any]:
    """Redundancy of each block's signals, mean over images, and how far equation (7) is from equation (6).

    The names are those of `tokenpool.analysis.redundancy.Signals` and of its measures: `leading_energy_before` and so
    on, one number a block. `gaussian_difference` is the greatest difference between both sides of equation (7) for
    the model's own queries and keys, normalised, with alpha = sqrt(d) and in double precision, relative to the largest
    output.
    """
    sums: dict[str, np.ndarray] = {}
    difference, images = 0.0, 0
    with timing.threads(1):  # several threads make small eigenvalue problems a thousand times slower
        for batch in _batches(model, data):
            images += len(batch)
            blocks = redundancy.signals(model, batch)
            difference = max(difference, *(_filter_difference(block) for block in blocks))
            for measure in (redundancy.leading_energy, redundancy.neighbour_distance, redundancy.mean_energy):
                for signal in ("values", "filtered", "before", "after"):
                    found = [measure(getattr(block, signal)).sum().item() for block in blocks]
                    name = f"{measure.__name__}_{signal}"
                    sums[name] = sums.get(name, 0) + np.array(found)
    means = {name: (total / images).tolist() for name, total in sums.items()}
    return means | {"gaussian_difference": difference, "images": images}


def measure_convergence(model: VisionTransformer, data: LightningDataModule) -> dict[str, Any]:
    """How many iterations clustering needs until the assignment of tokens to clusters changes no more.

    `iterations`: for each image the mean over the blocks that cluster. `within`: the share of clusterings (one image in
    one block) that need at most 1, 2, ... iterations. The last iteration, which changes nothing, is not counted. The
    model itself goes on with the clusters of its own setting.

    Raises:
        RuntimeError: if a clustering does not converge in `MOST_ITERATIONS`.
    """
    needed: list[Tensor] = []  # one (B,) a block and batch
    handles = [
        block.downsampler.register_forward_pre_hook(
            lambda layer, arguments: needed.append(_iterations_needed(layer, *arguments))
        )
        for block in model.blocks
        if block.downsampler is not None and block.downsampler.keep  # of no tokens there are no clusters
    ]
    by_image = []
    try:
        with torch.inference_mode():
            for batch in _batches(model, data):
                needed.clear()
                model(batch)
                by_image.append(torch.stack(needed, dim=1))  # (B, blocks that cluster)
    finally:
        for handle in handles:
            handle.remove()
    found = torch.cat(by_image).double()
    within = [(found <= most).double().mean().item() for most in range(1, int(found.max()) + 1)]
    return {"iterations": found.mean(dim=1).tolist(), "within": within, "images": len(found)}


def _iterations_needed(layer: TokenPooling, tokens: Tensor, scores: Tensor) -> Tensor:
    """After how many iterations the assignment of each image is final: (B,)."""
    needed = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    before, chosen = None, layer.iterations
    try:
        for iterations in range(1, MOST_ITERATIONS + 2):
            layer.iterations = iterations
            assignment = layer.reduce(tokens, scores).assignment
            if before is not None:
                same = (assignment == before).all(dim=1)
                needed = torch.where((needed == 0) & same, iterations - 1, needed)
            if needed.all():
                return needed
            before = assignment
    finally:
        layer.iterations = chosen
    raise RuntimeError(f"{int((needed == 0).sum())} clusterings do not converge in {MOST_ITERATIONS} iterations")


def trace_clusters(model: VisionTransformer, data: LightningDataModule) -> dict[str, Any]:
    """In which token each patch of some images is after each block: `assignments` (images, blocks, patches)."""
    images, names = clustered_images(model, data)
    trace = tokenpool.trace(model, images.to(_device(model)))
    blocks = torch.stack([block.assignment for block in trace.blocks], dim=1)  # (B, L, N)
    return {"assignments": blocks.tolist(), "names": names, "tokens": [block.tokens for block in trace.blocks]}


def clustered_images(model: VisionTransformer, data: LightningDataModule) -> tuple[Tensor, list[str]]:
    """The images of Figure 1c, ready for the model, and their names: digits, or scikit-learn's photographs."""
    if isinstance(data, DigitsDataModule):
        return data.test_set[:CLUSTERED_DIGITS][0], [f"digit {index}" for index in range(CLUSTERED_DIGITS)]
    mean, std = data.transforms["mean"], data.transforms["std"]
    pictures = [
        transforms.normalize(picture, mean, std) for picture in photographs(tokenpool.hosts.of(model).image_shape[1])
    ]
    return torch.stack(pictures), list(PHOTOGRAPHS)


def photographs(size: int) -> list[Tensor]:
    """scikit-learn's two photographs as squares (3, size, size) with values in 0..1."""
    pictures = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    squares = [transforms.center_crop(picture, min(picture.shape[1:])) for picture in pictures]
    return [F.interpolate(square[None], (size, size), mode="area")[0] for square in squares]


MEASURES: dict[str, Callable[[VisionTransformer, LightningDataModule], dict[str, Any]]] = {
    "agreement": measure_agreement,
    "throughput": measure_throughput,
    "redundancy": measure_redundancy,
    "convergence": measure_convergence,
    "clusters": trace_clusters,
}


def _filter_difference(block: redundancy.Signals) -> float:
    queries, keys = (F.normalize(signal.double(), dim=-1) for signal in (block.queries, block.keys))
    batch, heads, n, width = queries.shape
    values = block.values.double().reshape(batch, n, heads, width).transpose(1, 2)
    expected = redundancy.softmax_attention(queries, keys, values, width**0.5)
    found = redundancy.gaussian_filter(queries, keys, values, width**0.5)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _batches(model: VisionTransformer, data: LightningDataModule) -> Iterator[Tensor]:
    for images, _ in data.test_dataloader():
        yield images.to(_device(model))


def _device(model: VisionTransformer) -> torch.device:
    return model.pos_embed.device
