"""Images a second, of a model and of a plain one in turns, so that both meet the same machine."""

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn


def measure(model: nn.Module, plain: nn.Module, images: Tensor, repeats: int = 5, warm_up: int = 2) -> dict[str, Any]:
    """Time forward passes of two models alternately.

    Args:
        model: to measure.
        plain: the baseline.
        images: one batch (B, C, H, W).
        repeats: times that are taken of each.
        warm_up: forward passes of each that are not counted.

    Returns:
        Images a second of both, by the median time, the ratio of the medians (`speed_up`), the spread of the model's
        times (`spread`: interquartile range over the median), batch size, device and threads.
    """
    times: dict[str, list[float]] = {"model": [], "plain": []}
    with torch.inference_mode():
        for index in range(warm_up + repeats):
            for name, each in (("model", model), ("plain", plain)):
                seconds = _seconds(each, images)
                if index >= warm_up:
                    times[name].append(seconds)
    own, other = median(times["model"]), median(times["plain"])
    quartiles = torch.tensor(times["model"]).quantile(torch.tensor([0.25, 0.75])).tolist()
    return {
        "images_per_second": len(images) / own,
        "plain_images_per_second": len(images) / other,
        "speed_up": other / own,
        "spread": (quartiles[1] - quartiles[0]) / own,
        "measured_batch": len(images),
        "device": torch.cuda.get_device_name(images.device) if images.is_cuda else "CPU",
        "threads": torch.get_num_threads(),
    }


def _seconds(model: nn.Module, images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
