"""The interface of all image data sets."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tokenpool.training.images.decoding import load_image


class Images(Dataset):
    """Images of one part of a data set, each with its label.

    A subclass implements `source`, `stamp` and `relative_name`.

    Args:
        classes: names of the classes.
        labels: (N,) integers.
        transform: function from a PIL image to the returned image, or None.
        allow_truncated: see `load_image`.

    Attributes:
        classes: names of the classes. Label l is class `classes[l]`.
        labels: (N,) integers, the labels of all images.
    """

    def __init__(
        self, classes: list[str], labels: np.ndarray, transform: Callable | None, allow_truncated: bool = False
    ) -> None:
        self.classes = classes
        self.labels = labels
        self.transform = transform
        self.allow_truncated = allow_truncated  # an attribute, so that worker processes have it, too

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = load_image(*self.source(index), self.allow_truncated)
        return self.transform(image) if self.transform else image, int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        return self.source(index)[1]

    def source(self, index: int) -> tuple[Path | bytes, str]:
        """Return the file or the bytes of an image, and its name for messages, as arguments of `load_image`."""
        raise NotImplementedError

    def stamp(self, index: int) -> str:
        """Return a text that changes if the image changes, without reading the image."""
        raise NotImplementedError

    def relative_name(self, index: int) -> str:
        """Return the name of an image within the data set, without the location of the data set."""
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        """Return the bytes of an image, not decoded."""
        file, _ = self.source(index)
        return file if isinstance(file, bytes) else Path(file).read_bytes()

    def size(self, index: int) -> int:
        """Return the length of `content` in bytes, or an estimate, without reading the image."""
        return os.stat(self.source(index)[0]).st_size


def first_of_each_class(images: Images, count: int, title: str) -> np.ndarray:
    """Select the first images of each class.

    Args:
        images: the images.
        count: number of images of each class. 0 for all images.
        title: name of the images for messages.

    Returns:
        Ascending indices of the images.

    Raises:
        ValueError: if a class has fewer images. The message names these classes and their numbers of images.
    """
    if not count:
        return np.arange(len(images))
    chosen = [np.flatnonzero(images.labels == label)[:count] for label in range(len(images.classes))]
    short = [f"{name} has {len(few)}" for name, few in zip(images.classes, chosen, strict=True) if len(few) < count]
    if short:
        more = f" and {len(short) - 8} more" if len(short) > 8 else ""
        raise ValueError(f"{title}: expected {count} images of each class, but {', '.join(short[:8])}{more}")
    return np.sort(np.concatenate(chosen))
