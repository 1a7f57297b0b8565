"""Encode as short text which images a model classified correctly, with one bit for each image."""

import base64
from collections.abc import Sequence

import numpy as np


def encode(correct: Sequence[bool] | np.ndarray) -> str:
    """Encode bits as base64.

    The bits are packed by `numpy.packbits`: the first image is the highest bit of the first byte.

    Args:
        correct: (N,), whether each image is classified correctly, in the order of the data set.

    Returns:
        The text.

    Raises:
        ValueError: if `correct` has more than one dimension, or values other than 0 and 1.
    """
    values = np.asarray(correct)
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"correct must hold one 0 or 1 for each image, got an array {values.shape} of {values.dtype}")
    return base64.b64encode(np.packbits(values.astype(bool)).tobytes()).decode()


def decode(text: str, images: int) -> np.ndarray:
    """Decode the text of `encode`.

    Args:
        text: `correct` in the metrics of a result.
        images: number of images, `images` in the same metrics.

    Returns:
        (images,) booleans, whether each image is classified correctly.

    Raises:
        ValueError: if the text is not base64, or if the number of bits does not match `images`.
    """
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(text)[:20]!r} is not a base64 text of bits: {error}") from error
    found = np.unpackbits(packed).astype(bool)
    if len(packed) != -(-images // 8) or found[images:].any():
        raise ValueError(f"the text holds the bits of {8 * len(packed) - 7}..{8 * len(packed)} images, not of {images}")
    return found[:images]
