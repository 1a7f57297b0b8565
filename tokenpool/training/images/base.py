"""The interface of all image data sets."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tokenpool.training.images.decoding import load_image


class Images(Dataset):
    """Images of one part of a data set, each with its label, by index.

    A subclass says where an image comes from (`source`) and what changes when the image does (`stamp`).

    Attributes:
        classes: their names; label l is class `classes[l]`.
        labels: of all images, (N,) integers.
    """

    def __init__(
        self, classes: list[str], labels: np.ndarray, transform: Callable | None, allow_truncated: bool = False
    ) -> None:
        self.classes = classes
        self.labels = labels
        self.transform = transform
        self.allow_truncated = allow_truncated  # here, so that it reaches the processes that load data

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = load_image(*self.source(index), self.allow_truncated)
        return self.transform(image) if self.transform else image, int(self.labels[index])

    def name(self, index: int) -> str:
        """What messages call the image."""
        return self.source(index)[1]

    def source(self, index: int) -> tuple[Path | bytes, str]:
        """What `load_image` takes: the image's file or its bytes, and its name."""
        raise NotImplementedError

    def stamp(self, index: int) -> str:
        """A text that is another one if the image has changed, without reading it."""
        raise NotImplementedError

    def relative_name(self, index: int) -> str:
        """The image's name within the data set, wherever that lies."""
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        """The image's bytes, not decoded."""
        file, _ = self.source(index)
        return file if isinstance(file, bytes) else Path(file).read_bytes()

    def size(self, index: int) -> int:
        """Length of `content` in bytes, or what comes near it without reading the image."""
        return os.stat(self.source(index)[0]).st_size


def first_of_each_class(images: Images, count: int, title: str) -> np.ndarray:
    """Numbers of the first `count` images of each class, ascending; of all images if `count` is 0.

    Args:
        images: with `labels` and `classes`.
        count: images a class.
        title: what messages call them.

    Raises:
        ValueError: if a class has fewer; the message says which class has how many.
    """
    if not count:
        return np.arange(len(images))
    chosen = [np.flatnonzero(images.labels == label)[:count] for label in range(len(images.classes))]
    short = [f"{name} has {len(few)}" for name, few in zip(images.classes, chosen, strict=True) if len(few) < count]
    if short:
        more = f" and {len(short) - 8} more" if len(short) > 8 else ""
        raise ValueError(f"{title}: expected {count} images of each class, but {', '.join(short[:8])}{more}")
    return np.sort(np.concatenate(chosen))
