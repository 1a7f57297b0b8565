"""Labelled images, from folders in ImageNet's layout and from Hugging Face `datasets`.

A source is a folder, or "hf:" and a data set: a folder written by `save_to_disk`, a folder of parquet files or of tar
shards in webdataset's layout, or a name on the Hugging Face hub, such as "hf:ILSVRC/imagenet-1k".
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tokenpool.training.images.base import Images, first_of_each_class
from tokenpool.training.images.cifar10 import Cifar10Images
from tokenpool.training.images.decoding import load_image
from tokenpool.training.images.folders import FolderImages, class_names, part_folder
from tokenpool.training.images.hub import HubImages
from tokenpool.training.images.shards import samples_of_shards
from tokenpool.training.images.sources import HUB, SPLITS, check_no_url, is_downloaded

__all__ = [
    "HUB",
    "Images",
    "check_no_url",
    "class_names",
    "first_of_each_class",
    "is_downloaded",
    "load_image",
    "open_images",
    "part_folder",
    "samples_of_shards",
]


def open_images(
    root: str | Path,
    part: str,
    transform: Callable[[Image.Image], Any] | None = None,
    allow_empty: bool = False,
    allow_truncated: bool = False,
) -> Images:
    """Open the images of one part of a data set. Their order never changes.

    Args:
        root: one of these sources. A folder with `<part>/<class>/<image>`. A string of "hf:" and a folder written by
            `datasets.save_to_disk`, a folder of parquet files or tar shards in webdataset's layout, whose names contain
            the part (`train-000.tar`), or a name on the Hugging Face hub. Parquet files and shards are copied once into
            the cache of `datasets` ($HF_HOME). "cifar10", if there is no folder of this name: torchvision's CIFAR-10,
            downloaded into `tokenpool.files.cache_folder`.
        part: "train" or "val". If there is no val (`validation` with "hf:"), `test` is used.
        transform: function from a PIL image to the returned image. None returns the PIL image.
        allow_empty: allow empty class folders. The class then has a label but no image.
        allow_truncated: see `load_image`.

    Returns:
        The images, as a PyTorch data set.

    Raises:
        FileNotFoundError: if a folder is missing or has no image.
        RuntimeError: if the package `datasets` is needed and not installed.
        ValueError: if there is no such part, if columns are missing, if labels are not 0..C-1, if images are outside
            class folders, or if `root` is a URL. The message contains the found and the expected value.
    """
    if part not in SPLITS:
        raise ValueError(f"part = {part!r} must be one of {', '.join(SPLITS)}")
    if str(root).startswith(HUB):
        return HubImages(str(root), part, transform, allow_truncated)
    if is_downloaded(root):
        return Cifar10Images(part, transform)
    return FolderImages(Path(root), part, transform, allow_empty, allow_truncated)
