"""Timing of calls in turns, so that all calls share the load of the machine."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


@contextmanager
def threads(number: int) -> Iterator[None]:
    """PyTorch computes with so many threads on a CPU, until the block ends; 0: with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed_on(outcome: dict[str, Any]) -> dict[str, Any]:
    """Machine and software that the times in a stored result depend on, as far as the result holds them.

    Args:
        outcome: a result with "environment" (see `tokenpool.runs.environment.environment`), and `device` in "metrics".

    Returns:
        `device`, `threads`, `torch`, `onnxruntime`, `openvino`, `system`, `processor`, `cpu` and `cores`; None where
        the result lacks it.
    """
    environment = outcome.get("environment", {})
    parts = [environment, environment.get("versions"), environment.get("machine"), outcome["metrics"]]
    told = {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}
    names = ("device", "threads", "torch", "onnxruntime", "openvino", "system", "processor", "cpu", "cores")
    return {name: told.get(name) for name in names}


def differences(first: dict[str, Any], second: dict[str, Any]) -> tuple[str, str]:
    """Differences between the machines and software of two times (see `timed_on`), in words; empty if there are none.

    Values that one of them lacks are not compared.
    """
    names = [name for name in first if None not in (first[name], second[name]) and first[name] != second[name]]
    return tuple(", ".join(f"{name} {one[name]}" for name in names) for one in (first, second))


def device_name(device: torch.device) -> str:
    """Name of a device in results: the GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


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
    with torch.inference_mode():
        calls = {"model": lambda: model(images), "plain": lambda: plain(images)}
        times = seconds(calls, images.device, repeats, warm_up)
    return summary(times, images)


def seconds(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int = 5, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds that each of the calls takes, called in turns, `repeats` times each after `warm_up` times."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warm_up + repeats):
        for name, call in calls.items():
            taken = _seconds(call, device)
            if index >= warm_up:
                times[name].append(taken)
    return times


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that a call allocates beyond the memory in use before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max(initial=0))


def summary(times: dict[str, list[float]], images: Tensor) -> dict[str, Any]:
    """What `measure` returns, from the seconds of "model" and of "plain" for the same images."""
    own, other = median(times["model"]), median(times["plain"])
    quartiles = torch.tensor(times["model"]).quantile(torch.tensor([0.25, 0.75])).tolist()
    return {
        "images_per_second": len(images) / own,
        "plain_images_per_second": len(images) / other,
        "speed_up": other / own,
        "spread": (quartiles[1] - quartiles[0]) / own,
        "measured_batch": len(images),
        "device": device_name(images.device),
        "threads": torch.get_num_threads(),
    }


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
