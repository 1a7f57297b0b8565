"""What runs the models that `throughput` times: PyTorch in eager mode, `torch.compile`, ONNX Runtime or OpenVINO."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenpool.tools.formats import FORMATS, OPSET

EXPORTED = {"onnxruntime": "onnx", "openvino": "openvino"}  # the format of `tokenpool.tools.formats` of each
BACKENDS = ("eager", "compiled", *EXPORTED)


def check(backend: str, device: str, precision: str, train: bool) -> None:
    """Check that a backend can run a setting of `tokenpool.tools.benchmark` on a device.

    Raises:
        ModuleNotFoundError: if a package is missing. The message names the extra that provides it.
        ValueError: for an unknown backend, or one that has not this device or precision, or does not train.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} must be one of {', '.join(BACKENDS)}")
    if backend not in EXPORTED:
        return
    others = "use the backends eager or compiled"
    if train:
        raise ValueError(f"backend {backend} does not train: leave out --train, or {others}")
    if torch.device(device).type != "cpu":
        raise ValueError(
            f"backend {backend} is timed on the CPU only, not on {device}: leave out --device, or {others}"
        )
    if precision != "float32":
        raise ValueError(f"backend {backend} is timed in float32 only, not in {precision}: give float32, or {others}")
    FORMATS[EXPORTED[backend]].check(f"throughput --backend {backend}")


def versions(backend: str) -> dict[str, str]:
    """Version of the package that runs exported models; none for PyTorch's backends, which `environment` covers."""
    return {backend: import_module(backend).__version__} if backend in EXPORTED else {}


def exported(backend: str, network: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    """Export a network, and return the function from images to logits that the file holds.

    The function takes any number of images and computes with as many threads as PyTorch does now.

    Args:
        backend: one of `EXPORTED`.
        network: in evaluation mode, on the CPU.
        images: one batch (B, C, H, W).
        path: the file, without its suffix. A file that is there is read, and nothing is exported.
    """
    form = FORMATS[EXPORTED[backend]]
    path = path.with_name(path.name + form.suffix)
    if not path.exists():
        example = images.new_zeros(max(len(images), 2), *images.shape[1:])  # from one image, B would be fixed at 1
        form.write(network, example, path, {}, OPSET)
    return form.read(path, torch.get_num_threads())[0]
