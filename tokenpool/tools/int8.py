"""Post-training quantisation of ONNX files to 8-bit integers, with ONNX Runtime.

The linear layers are quantised: their weights once and for each output channel, their inputs for each tensor. All other
operators compute in float32: clustering, scores, products of attention, and the patch embedding. The patch embedding is
a convolution; in int8 it would take longer in ONNX Runtime, and the error of the logits would be larger.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenpool import files

STATIC, DYNAMIC = "int8", "int8-dynamic"
PRECISIONS = (STATIC, DYNAMIC)
_LAYERS = ["MatMul", "Gemm"]


def quantise(precision: str, source: Path, path: Path, batches: Iterable[Tensor] = ()) -> None:
    """Quantise an ONNX file in one of `PRECISIONS`.

    Args:
        precision: "int8" for `quantise_static`, "int8-dynamic" for `quantise_dynamic`.
        source: the file, in float32.
        path: file to write.
        batches: calibration images of "int8".

    Raises:
        ValueError: for another precision, or "int8" without calibration images.
    """
    if precision == STATIC:
        quantise_static(source, path, batches)
    elif precision == DYNAMIC:
        quantise_dynamic(source, path)
    else:
        raise ValueError(f"precision = {precision!r} must be one of {', '.join(PRECISIONS)}")


def quantise_dynamic(source: Path, path: Path) -> None:
    """Quantise an ONNX file; the range of each input is measured when the file runs.

    The range is the range of the whole batch. So the logits of an image depend a little on the other images of its
    batch.

    Args:
        source: the file, in float32.
        path: file to write. It has the description of the source.
    """
    from onnxruntime import quantization

    with files.atomic_write(path) as written, _quiet():
        quantization.quantize_dynamic(source, written, **_options(quantization, _graph(source)))


def quantise_static(source: Path, path: Path, batches: Iterable[Tensor]) -> None:
    """Quantise an ONNX file; the range of each input is its range on calibration images.

    Args:
        source: the file, in float32, with one input.
        path: file to write. It has the description of the source.
        batches: calibration images, batches (B, C, H, W). The ranges are the extremes over all batches.

    Raises:
        ValueError: if there are no images.
    """
    from onnxruntime import quantization

    graph = _graph(source)
    given = [{graph.input[0].name: batch.numpy()} for batch in batches]
    if not given:
        raise ValueError("static quantisation needs calibration images: give at least one batch, or use int8-dynamic")
    # Outputs stay in float32, because the bias is added to them. ONNX Runtime fuses product, scales and bias.
    outputs = {"OpTypesToExcludeOutputQuantization": _LAYERS}
    with files.atomic_write(path) as written, _quiet():
        quantization.quantize_static(
            source,
            written,
            _reader(quantization, given),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            extra_options=outputs,
            **_options(quantization, graph),
        )


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False).graph


def _options(quantization: Any, graph: Any) -> dict[str, Any]:
    """What both kinds of quantisation have in common.

    `reduce_range`: weights have 7 bits. The kernels of ONNX Runtime for x86 CPUs without VNNI instructions add two
    products in 16 bits, and the sum could overflow if weights had 8 bits. With 7 bits the file is right on every CPU,
    and the error of the logits is hardly larger.
    `nodes_to_exclude`: products of two activations, in attention and clustering. (The option `MatMulConstBOnly` of ONNX
    Runtime has no effect on static quantisation.) Operators in a `Loop` are never quantised.
    """
    constants = {each.name for each in graph.initializer}
    products = [node.name for node in graph.node if node.op_type in _LAYERS and node.input[1] not in constants]
    return {
        "op_types_to_quantize": _LAYERS,
        "nodes_to_exclude": products,
        "per_channel": True,
        "reduce_range": True,
        "weight_type": quantization.QuantType.QInt8,
    }


def _reader(quantization: Any, given: list[dict[str, Any]]) -> Any:
    """The calibration images as ONNX Runtime asks for them."""

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(given)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the advice of ONNX Runtime to run its preprocessing: exported files are optimised already."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
