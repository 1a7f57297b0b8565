"""Whether code runs eagerly, so that it may branch on the values of tensors."""

import torch
from torch import Tensor


def is_in_graph() -> bool:
    """Whether the running code is compiled, exported or traced. It must not branch on values or batch size then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_eager_cpu(tensor: Tensor) -> bool:
    """Whether code may branch on the values of this tensor at no cost.

    A graph cannot branch. On a GPU the CPU would have to wait for the value. Code that does not branch gives the same
    result and takes longer: for instance, it iterates past a fixed point.
    """
    return tensor.device.type == "cpu" and not is_in_graph()
