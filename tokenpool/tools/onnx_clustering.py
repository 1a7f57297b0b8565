"""K-Medoids in exported ONNX files: a few operators and a loop, in place of its iterations one after another.

`torch.export` unrolls the iterations of Algorithm 1: about two hundred operators for each block. A loop is exported in
a third of the time, and ends when no medoid moves.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch


def translations() -> dict[Callable, Callable]:
    """Return the translation of the operator, for `torch.onnx.export(custom_translation_table=...)`."""
    return {torch.ops.tokenpool.eager_kmedoids.default: _translated}


def _translated(tokens: Any, weights: Any, by: Any, init: Any, k: int, iterations: int) -> tuple[Any, Any, Any]:
    """Translate `clustering.algorithm._kmedoids`. The arguments are values of an ONNX graph."""
    onnx = import_module("tokenpool.tools.onnx_functions")  # needs onnxscript
    n = tokens.shape[1]
    first = onnx.first_rows(tokens, n=n)
    distance = onnx.squared_distances(by, n=n)
    medoids = onnx.ward_init(distance, weights, n=n, k=k) if init is None else init
    others, nearest, labels = onnx.alternate(distance, weights, medoids, first, n=n, k=k, iterations=iterations)
    centers = onnx.means(tokens, weights, others, nearest, labels, first, k=k)
    return centers, onnx.as_indices(labels), medoids


def add_functions(model: Any) -> None:
    """Add the functions that the translations call to a model of `onnx_ir`. Its `optimize` inlines all functions.

    The functions use operators of opset 18 that later opsets did not change.
    """
    import onnx_ir

    onnx = import_module("tokenpool.tools.onnx_functions")
    for called in onnx.CALLED:
        function = onnx_ir.from_proto(called.to_function_proto())
        model.functions[function.identifier()] = function
    for function in model.functions.values():
        if function.domain == onnx.DOMAIN.domain:
            function.opset_imports[""] = model.opset_imports[""]
