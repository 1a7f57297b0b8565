"""Images from folders in ImageNet's layout."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from timm.utils import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from tokenpool.training.images.base import Images
from tokenpool.training.images.sources import check_no_url, is_hidden

_VALIDATION = re.compile(r"ILSVRC2012_val_\d{8}\.", re.IGNORECASE)
_SORTING = (
    " These are ImageNet's original validation images. To sort them into folders of WordNet ids, put "
    "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into a folder, run in Python "
    'torchvision.datasets.ImageNet(FOLDER, split="val"), and give --data FOLDER. Or move each image into a folder of '
    "its WordNet id, which Kaggle's LOC_val_solution.csv lists"
)


class FolderImages(Images):
    """A folder in ImageNet's layout, `root/<part>/<class>/<image>`. The classes are in natural order."""

    def __init__(
        self,
        root: Path,
        part: str,
        transform: Callable | None = None,
        allow_empty: bool = False,
        allow_truncated: bool = False,
    ) -> None:
        self.folder = part_folder(root, part)
        classes = class_names(self.folder)
        listed = [_image_files(self.folder / name) for name in classes]
        empty = [name for name, found in zip(classes, listed, strict=True) if not found]
        if empty and not (allow_empty and len(empty) < len(classes)):
            raise FileNotFoundError(
                f"{len(empty)} of the {len(classes)} class folders in {self.folder} hold no image "
                f"({', '.join(IMG_EXTENSIONS)}): {_shortened(empty)}. Remove them, or allow empty classes "
                "(--allow-empty-classes, allow_empty=True)"
            )
        # An array, not a list of a million texts, because reference counts would copy the list into each worker.
        self.paths = np.array([os.fsencode(os.path.relpath(path, self.folder)) for found in listed for path in found])
        labels = np.repeat(np.arange(len(classes)), [len(found) for found in listed])
        super().__init__(classes, labels, transform, allow_truncated)

    def source(self, index: int) -> tuple[Path, str]:
        path = self.folder / self.relative_name(index)
        return path, str(path)

    def stamp(self, index: int) -> str:
        path, name = self.source(index)[0], self.relative_name(index)
        try:
            status = os.stat(path)
        except OSError as error:  # for example a broken link; reading the image raises an error later
            return f"{name} {error.strerror}"
        return f"{name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"

    def relative_name(self, index: int) -> str:
        return os.fsdecode(bytes(self.paths[index]))


def part_folder(root: Path, part: str) -> Path:
    """Return the folder of one part of the images, in ImageNet's layout.

    Args:
        root: folder of the data set.
        part: "train" or "val". If there is no folder `val`, `test` is used.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if `root` is a URL.
    """
    check_no_url(root)
    folders = [root / name for name in (("train",) if part == "train" else ("val", "test"))]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder {folders[0]}: expected ImageNet's layout, {folders[0]}/<class>/<image>")


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders in a folder. Label l is class l of this list.

    Names are in natural order (0, 1, 2, 10), as in timm. Names that begin with a dot are ignored.

    Raises:
        FileNotFoundError: if there is no class folder.
        ValueError: if there are images outside class folders, or broken links.
    """
    with os.scandir(folder) as listed:
        entries = [entry for entry in listed if not is_hidden(entry.name)]
    classes = sorted((entry.name for entry in entries if entry.is_dir()), key=lambda name: (natural_key(name), name))
    broken = sorted(entry.path for entry in entries if entry.is_symlink() and not os.path.exists(entry.path))
    if broken:  # perhaps a class on a disk that is not mounted; without it, other labels would be wrong
        raise ValueError(f"{broken[0]} is a link to {os.readlink(broken[0])}, which does not exist: fix or remove it")
    loose = sorted(entry.name for entry in entries if is_image_file(entry.name) and entry.is_file())
    if loose:
        raise ValueError(
            f"{len(loose)} images ({_shortened(loose)}) are directly in {folder} and have no class: expected "
            f"{folder}/<class>/<image>.{_SORTING if any(map(_VALIDATION.match, loose)) else ''}"
        )
    if not classes:
        raise FileNotFoundError(f"no class folder in {folder}: expected {folder}/<class>/<image>")
    return classes


def _image_files(folder: Path) -> list[str]:
    """Return the images in a class folder and its sub-folders, including links, sorted by folder and name."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path) and Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(path)):
                raise ValueError(f"{path} is a link to a folder that contains the link: remove it")
        found += [(parent, name) for name in names if is_image_file(name) and not is_hidden(name)]
    return [os.path.join(*pair) for pair in sorted(found)]


def _raise(error: OSError) -> None:
    """Raise the error. `os.walk` ignores folders without read permission by default."""
    raise error


def _shortened(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
