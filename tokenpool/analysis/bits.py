"""Which images a model has classified right, as short text in a result: one bit an image."""

import base64
from collections.abc import Sequence

import numpy as np


def encode(correct: Sequence[bool] | np.ndarray) -> str:
    """Base64 of the packed bits (`numpy.packbits`, first image in the highest bit of the first byte).

    Args:
        correct: (N,) whether each image is classified right, in the order of the data set.

    Raises:
        ValueError: if it has more than one dimension, or other values than 0 and 1.
    """
    values = np.asarray(correct)
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"expected one 0 or 1 an image, got an array {values.shape} of {values.dtype}")
    return base64.b64encode(np.packbits(values.astype(bool)).tobytes()).decode()


def decode(text: str, images: int) -> np.ndarray:
    """Whether each image is classified right, (images,) booleans: what `encode` has been given.

    Args:
        text: `correct` of a result's metrics.
        images: `images` of the same metrics.

    Raises:
        ValueError: if the text is no base64, or is not of so many images.
    """
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(text)[:20]!r} is no base64 text of bits: {error}") from error
    found = np.unpackbits(packed).astype(bool)
    if len(packed) != -(-images // 8) or found[images:].any():
        raise ValueError(f"the text holds the bits of {8 * len(packed) - 7}..{8 * len(packed)} images, not of {images}")
    return found[:images]
