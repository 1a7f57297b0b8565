"""Decode an image file of any format to RGB."""

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
    """Load an image as RGB with 8 bits for each channel. The EXIF orientation is applied. Transparency becomes white.

    Args:
        file: path of the image, its bytes, or a file that is open for reading.
        name: name of the image for messages. Default: the path.
        allow_truncated: accept an image with a missing end or wrong checksums, as
            `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` does. Missing pixels become grey or black.

    Returns:
        The image, in mode "RGB".

    Raises:
        ValueError: if the file is missing, empty, damaged, not an image, or has floating-point values. The message
            names the file.
    """
    if name is None:
        name = f"of {len(file)} bytes" if isinstance(file, bytes) else str(file)
    try:
        with _truncated(allow_truncated), Image.open(BytesIO(file) if isinstance(file, bytes) else file) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("its values are floating-point numbers of unknown range, expected 8 or 16 bits")
            if image.mode.startswith("I"):  # more than 8 bits; Pillow would clip the values to white
                image = Image.fromarray(_eight_bits(np.asarray(image)))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except UnidentifiedImageError as error:  # its message repeats the file name, or has a memory address
        reason = "it is empty" if _is_empty(file) else "Pillow does not know its format"
        raise ValueError(f"cannot read image {name}: {reason}") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ValueError(f"image {name} has more than {most} million pixels: scale it down first") from error
    except FileNotFoundError as error:
        reason = "there is no such file"
        if isinstance(file, str | Path) and os.path.islink(file):
            reason = f"it is a link to {os.readlink(file)}, which does not exist"
        raise ValueError(f"cannot read image {name}: {reason}") from error
    except Exception as error:  # Pillow does not catch errors of its decoders
        raise ValueError(f"cannot read image {name}: {error}") from error


@contextmanager
def _truncated(allowed: bool) -> Iterator[None]:
    """Set Pillow's option for truncated images, which is global for the process, during the block."""
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
    """Convert values of 16 bits, or of 8 bits in a wider type, to 8 bits."""
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(f"its values are in {values.min()}..{values.max()}, expected 8 or 16 bits")
    wide = values.dtype.itemsize == 2 or values.max(initial=0) > 255
    return (values // 257 if wide else values).astype(np.uint8)
