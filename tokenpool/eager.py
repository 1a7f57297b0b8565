"""Checks whether code may branch on the values of tensors, and which operators it may use."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_in_graph() -> bool:
    """Return whether the running code is compiled, exported or traced.

    A graph must not branch on the values of tensors or on the batch size.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return whether `torch.export` or `torch.onnx.export` captures the running code, but not `torch.compile`.

    An exported graph runs in other programs. It contains no scatter with a reduction, which TensorRT computes wrongly,
    and as few operators as possible, because the time of an export and of a single image depends on their number.

    `torch.compile` of PyTorch 2.7 to 2.13 replaces `torch.compiler.is_exporting()` by True (issue 176347 of PyTorch).
    The decorator makes it call the function instead.
    """
    return torch.compiler.is_exporting()


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values of a type. A graph contains nothing of a cast to the same type."""
    return values if values.dtype == dtype else values.to(dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for other floating types."""
    return dtype if dtype == torch.float64 else torch.float32


def detached(values: Tensor) -> Tensor:
    """Return values without gradient. A graph contains nothing of it if the values have no gradient."""
    return values.detach() if values.requires_grad else values


def needs_gradient(*tensors: Tensor) -> bool:
    """Return whether results that are computed from these tensors have a gradient."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast. Without autocast outside of it, a graph contains nothing of the context."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def is_eager_cpu(tensor: Tensor) -> bool:
    """Return whether code can branch on the values of this tensor without a cost.

    A graph cannot branch. On a GPU, a branch makes the CPU wait for the value. Code that does not branch gives the
    same result but takes longer: for example, it iterates past a fixed point.
    """
    return tensor.device.type == "cpu" and not is_in_graph()
