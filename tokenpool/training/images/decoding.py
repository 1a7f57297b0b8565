"""Decode one image file, whatever its format, into RGB."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError


def load_image(
    file: str | Path | bytes | BinaryIO, name: str | None = None, allow_truncated: bool = False
) -> Image.Image:
    """An image as RGB, upright, 8 bits a channel; what is transparent becomes white.

    Args:
        file: its path, its bytes, or a file that is open for reading.
        name: what messages call it; default: the path.
        allow_truncated: accept an image whose end is missing or whose checksums are wrong, as
            `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` does. What is missing becomes grey or black.

    Raises:
        ValueError: if the file is missing, empty, damaged or no image, or holds floating-point values; the message
            names it.
    """
    if name is None:
        name = f"of {len(file)} bytes" if isinstance(file, bytes) else str(file)
    try:
        with _truncated(allow_truncated), Image.open(BytesIO(file) if isinstance(file, bytes) else file) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("its values are floating-point, of no known range; expected 8 or 16 bits")
            if image.mode.startswith("I"):  # more than 8 bits, which Pillow would clip to white
                image = Image.fromarray(_eight_bits(np.asarray(image)))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except UnidentifiedImageError as error:  # whose message names a file once more, or an address in memory
        reason = "it is empty" if _is_empty(file) else "it is in no format that Pillow knows"
        raise ValueError(f"cannot read image {name}: {reason}") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ValueError(f"image {name} has more than {most} million pixels: scale it down first") from error
    except FileNotFoundError as error:
        reason = "there is no such file"
        if isinstance(file, str | Path) and os.path.islink(file):
            reason = f"it is a link to {os.readlink(file)}, which does not exist"
        raise ValueError(f"cannot read image {name}: {reason}") from error
    except Exception as error:  # Pillow raises whatever the decoder does
        raise ValueError(f"cannot read image {name}: {error}") from error


@contextmanager
def _truncated(allowed: bool) -> Iterator[None]:
    """Pillow has this switch for the whole process only."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = before or allowed
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _is_empty(file: str | Path | bytes | BinaryIO) -> bool:
    if isinstance(file, bytes):
        return not file
    if isinstance(file, str | Path):
        return os.path.isfile(file) and os.path.getsize(file) == 0
    return file.seek(0, os.SEEK_END) == 0


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Values of 16 bits, or of 8 in a wider type, as 8 bits."""
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(f"its values lie in {values.min()}..{values.max()}; expected 8 or 16 bits")
    wide = values.dtype.itemsize == 2 or values.max(initial=0) > 255
    return (values // 257 if wide else values).astype(np.uint8)
