"""Images with labels, by index: from folders in ImageNet's layout, and from Hugging Face `datasets`.

A source is a folder, or "hf:" and what `datasets` can open: a folder written by `save_to_disk`, a folder of parquet
files or of tar shards in webdataset's layout, or a name on the Hugging Face hub, such as "hf:ILSVRC/imagenet-1k".
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
    """The images of one part of a data set, in an order that does not change.

    Args:
        root: a folder that holds `<part>/<class>/<image>`; or, as a string, "hf:" and a folder written by
            `datasets.save_to_disk`, a folder of parquet files or tar shards in webdataset's layout whose names say the
            part (`train-000.tar`), or a name on the Hugging Face hub. Parquet files and shards are copied once into the
            cache of `datasets` ($HF_HOME), from which images are read by index. Or "cifar10", where there is no folder
            of that name: torchvision's, downloaded into `tokenpool.files.cache_folder`.
        part: "train" or "val". Where there is no val (`validation` with "hf:"), `test` is taken.
        transform: of the image; None leaves it a PIL image.
        allow_empty: let a class folder be empty. The class counts, and has no image.
        allow_truncated: see `load_image`.

    Raises:
        FileNotFoundError: if a folder is missing or holds no image.
        RuntimeError: if the package `datasets` is needed and missing.
        ValueError: if there is no such part, if columns are missing, if labels are not 0..C-1, if images lie outside of
            class folders, or if `root` is a URL; the message says what was found and what was expected.
    """
    if part not in SPLITS:
        raise ValueError(f"part = {part!r} must be one of {', '.join(SPLITS)}")
    if str(root).startswith(HUB):
        return HubImages(str(root), part, transform, allow_truncated)
    if is_downloaded(root):
        return Cifar10Images(part, transform)
    return FolderImages(Path(root), part, transform, allow_empty, allow_truncated)
