"""Functions that are one operator of a graph which `torch.compile` makes for a CPU.

A graph cannot branch on values and does not depend on the batch size. So it cannot stop iterations early, omit
distances, or process a few images at a time. Inside a graph for a CPU, the clustering and the attention with scores are
therefore one operator each, and the operator runs the eager code. An exported graph runs without this package and has
no such operator, unless `tokenpool.tools.formats` translates it to ONNX.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from tokenpool.eager import detached, is_exporting

Function = Callable[..., tuple[Tensor, ...]]


def is_opaque(tensor: Tensor) -> bool:
    """Return whether the running code is compiled for the CPU."""
    return tensor.device.type == "cpu" and torch.compiler.is_compiling() and not is_exporting()


_kept: ContextVar[bool] = ContextVar("kept", default=False)


@contextmanager
def kept_in_exports() -> Iterator[None]:
    """Keep the operators that can be exported in graphs that are exported inside this context."""
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def opaque(
    shapes: Function, exported_if: Callable[..., bool] = lambda *arguments: False
) -> Callable[[Function], Function]:
    """Return a decorator that makes a function an operator `tokenpool::eager_name` of graphs compiled for a CPU.

    The function has annotations, takes a tensor first, and returns tensors. The operator has no gradient.

    Args:
        shapes: takes the same arguments, and returns empty results.
        exported_if: takes the same arguments, and returns whether the operator can be exported: see `kept_in_exports`.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__.strip("_")
        operator = torch.library.custom_op(f"tokenpool::eager_{name}", _without_aliases(function), mutates_args=())
        operator.register_fake(shapes)

        @wraps(function)
        def call(first: Tensor, *others: Any) -> tuple[Tensor, ...]:
            if not (is_opaque(first) or (is_exporting() and _kept.get() and exported_if(first, *others))):
                return function(first, *others)
            return operator(*(detached(value) if isinstance(value, Tensor) else value for value in (first, *others)))

        return call

    return decorate


def _without_aliases(function: Function) -> Function:
    """Return contiguous results, and copy a result that is an argument: an operator must not return its arguments."""

    @wraps(function)
    def call(*arguments: Any) -> tuple[Tensor, ...]:
        given = {value.data_ptr() for value in arguments if isinstance(value, Tensor)}
        results = (found.contiguous() for found in function(*arguments))
        return tuple(found.clone() if found.data_ptr() in given else found for found in results)

    return call
