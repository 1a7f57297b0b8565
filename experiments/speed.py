"""Images a second, latency and memory of a pooled model and of the plain one, in turns: both meet the same machine.

The plain model is timm's own, with fused attention. The *realised fraction* is the measured speed-up over the counted
one, the ratio of FLOPs: at 1 the tokens saved are seconds saved.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tokenpool
from experiments import protocol
from experiments.throughput import peak_memory, seconds, summary
from tokenpool import flops, results
from tokenpool.attention import ScoredAttention

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
        compiled: with `torch.compile`, both models.
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
    compiled: bool = False
    train: bool = False
    carry: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the result's file."""
        size = f"at{self.image_size}" if self.image_size else ""
        keep = re.sub("[^0-9A-Za-z.]+", "_", str(self.keep)).strip("_") if self.keep is not None else ""
        flags = [flag for flag in ("compiled", "train", "carry") if getattr(self, flag)]
        parts = [self.model, size, self.method, keep, f"batch{self.batch_size}", self.precision, *flags]
        return "-".join(filter(None, parts))


def compare(setting: Setting, device: str = "cpu", repeats: int = 7, warm_up: int = 2) -> dict[str, Any]:
    """Time, memory and FLOPs of a setting and of timm's plain model, both with random weights and images.

    Args:
        setting: what is timed.
        device: where.
        repeats: times that are taken of each of the two, in turns.
        warm_up: passes of each that are not counted.

    Returns:
        A result as `tokenpool.results` stores it. Its metrics are what `measure` returns, and: `latency_ms` and
        `plain_latency_ms`, medians; `peak_mib` and `plain_peak_mib`, the most memory that a pass allocates beyond
        weights and images; `flops_ratio`, plain over pooled, clustering counted in; `realised_fraction` = speed-up /
        FLOPs ratio; for forward passes in eager mode `clustering_share` and `scoring_share` of the pass's time.

    Raises:
        ValueError: for an unknown model or precision.
    """
    if setting.precision not in PRECISIONS:
        raise ValueError(f"precision = {setting.precision!r} must be one of {', '.join(PRECISIONS)}")
    plain, pooled = _models(setting, device)
    size = plain.patch_embed.img_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch_size, plain.patch_embed.proj.in_channels, *size, generator=generator).to(device)
    count, plain_count = flops.count(pooled), flops.count(plain)
    networks = {"model": pooled, "plain": plain}
    if setting.compiled:
        networks = {name: torch.compile(network) for name, network in networks.items()}
    calls = {name: _pass(network, images, setting) for name, network in networks.items()}
    with nullcontext() if setting.train else torch.inference_mode():
        found = summary(seconds(calls, images.device, repeats, warm_up), images)
        peaks = {name: peak_memory(call, images.device) for name, call in calls.items()}
    ratio = plain_count.gmacs / count.gmacs
    found |= {
        "latency_ms": 1000 * len(images) / found["images_per_second"],
        "plain_latency_ms": 1000 * len(images) / found["plain_images_per_second"],
        "peak_mib": peaks["model"] / 2**20,
        "plain_peak_mib": peaks["plain"] / 2**20,
        "flops_ratio": ratio,
        "realised_fraction": found["speed_up"] / ratio,
    }
    cost = {"gmacs": count.gmacs, "clustering_gmacs": count.clustering_gmacs, "plain_gmacs": plain_count.gmacs}
    if not setting.train and not setting.compiled:
        found |= shares(pooled, images, setting.precision, repeats)
    keep = pooled.blocks.setting.keep
    exact = asdict(setting) | {"schedule": setting.keep, "keep": None if keep is None else list(keep)}
    return {"setting": exact, "metrics": found, "cost": cost, "environment": protocol.environment()}


def run(settings: Sequence[Setting], folder: Path, device: str = "cpu", repeats: int = 7) -> Iterator[dict[str, Any]]:
    """Compare each of the settings and write one JSON file each; those whose file is there are not timed again.

    Raises:
        ValueError: if a file is broken or holds another setting; the message names it.
    """
    for setting in settings:
        path = folder / f"{setting.name}-{device.replace(':', '')}.json"
        if not path.exists():
            results.save(compare(setting, device, repeats), path)
        outcome = results.read(path)
        before = outcome["setting"] | {"keep": outcome["setting"].get("schedule")}
        wanted = json.loads(json.dumps(asdict(setting)))  # tuples as lists, as the file has them
        if {name: before.get(name) for name in wanted} != wanted:
            raise ValueError(f"{path} holds another setting: choose another folder, or delete the file")
        yield {"run": path.stem} | outcome["setting"] | outcome["metrics"] | outcome["cost"]


def shares(model: VisionTransformer, images: Tensor, precision: str = "float32", repeats: int = 5) -> dict[str, float]:
    """Shares of a forward pass's time: downsampling (`clustering_share`) and significance scores (`scoring_share`).

    Scoring is what attention with scores takes beyond fused attention on the same tokens; it can be negative.
    """
    inputs: list[tuple[nn.Module, tuple]] = []
    parts = [part for block in model.blocks for part in (block.attn, block.downsampler) if part is not None]
    handles = [part.register_forward_pre_hook(lambda part, given: inputs.append((part, given))) for part in parts]
    with torch.inference_mode(), _autocast(images.device, precision):
        try:
            model(images)
        finally:
            for handle in handles:
                handle.remove()
        whole = _median(lambda: model(images), images.device, repeats)
        clustering = scoring = 0.0
        for part, given in inputs:
            taken = _median(lambda part=part, given=given: part(*given), images.device, repeats)
            if not isinstance(part, ScoredAttention):
                clustering += taken
            elif given[2]:  # with scores
                x, sizes, _, with_keys = given
                fused = (x, sizes, False, with_keys)
                scoring += taken - _median(lambda part=part, fused=fused: part(*fused), images.device, repeats)
    return {"clustering_share": clustering / whole, "scoring_share": scoring / whole}


def table(found: Sequence[dict[str, Any]]) -> str:
    """The results of `compare` as Markdown."""
    rows = [
        {
            "model": one["model"] + (f" at {one['image_size']}" if one["image_size"] else ""),
            "method": one["method"],
            "batch": one["batch_size"],
            "GMACs": f"{one['gmacs']:.2f} of {one['plain_gmacs']:.2f}",
            "images/s": f"{one['images_per_second']:.1f} / {one['plain_images_per_second']:.1f}",
            "latency (ms)": f"{one['latency_ms']:.1f} / {one['plain_latency_ms']:.1f}",
            "peak (MiB)": f"{one['peak_mib']:.0f} / {one['plain_peak_mib']:.0f}",
            "FLOPs ratio": f"{one['flops_ratio']:.2f}",
            "speed-up": f"{one['speed_up']:.2f} ± {one['speed_up'] * one['spread'] / 2:.2f}",
            "realised": f"{one['realised_fraction']:.2f}",
            "clustering": f"{100 * one['clustering_share']:.1f} %" if "clustering_share" in one else "",
            "scoring": f"{100 * one['scoring_share']:.1f} %" if "scoring_share" in one else "",
        }
        for one in found
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def picture(found: Sequence[dict[str, Any]]) -> Figure:
    """Measured speed-up over the ratio of FLOPs; on the diagonal the tokens saved are seconds saved."""
    figure, ax = plt.subplots(figsize=(5, 4.2), layout="constrained")
    names = sorted({(one["model"], one["method"]) for one in found})
    for model, method in names:
        chosen = [one for one in found if (one["model"], one["method"]) == (model, method)]
        chosen.sort(key=lambda one: one["flops_ratio"])
        ratios, speeds = ([one[key] for one in chosen] for key in ("flops_ratio", "speed_up"))
        ax.plot(ratios, speeds, "o-", label=f"{model}, {method}")
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot([low, high], [low, high], color="grey", linewidth=1, linestyle="--", label="as counted")
    ax.set(xlim=(low, high), ylim=(low, high), xlabel="ratio of FLOPs, plain to pooled", ylabel="measured speed-up")
    ax.legend(fontsize="small")
    return figure


def _models(setting: Setting, device: str) -> tuple[VisionTransformer, VisionTransformer]:
    """timm's plain model, and a copy of it that is pooled."""
    size = {} if setting.image_size is None else {"img_size": setting.image_size}
    plain = timm.create_model(setting.model, **size).to(device).train(setting.train)
    pooled = tokenpool.patch(
        copy.deepcopy(plain), setting.method, setting.keep, carry=setting.carry, **setting.options
    ).train(setting.train)
    return plain, pooled


def _pass(network: nn.Module, images: Tensor, setting: Setting) -> Callable[[], Any]:
    """One forward pass, or one step of training."""
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-9) if setting.train else None

    def forward() -> None:
        with _autocast(images.device, setting.precision):
            network(images)

    def step() -> None:
        with _autocast(images.device, setting.precision):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step if setting.train else forward


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _median(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    return median(seconds({"": call}, device, repeats)[""])
