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
    " These are ImageNet's validation images as they come. To sort them into folders of WordNet ids, put "
    "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into a folder, and run in Python "
    'torchvision.datasets.ImageNet(FOLDER, split="val"); then FOLDER is what --data takes. Or move each image into a '
    "folder of its WordNet id, which Kaggle's LOC_val_solution.csv lists"
)


class FolderImages(Images):
    """A folder in ImageNet's layout, `root/<part>/<class>/<image>`; labels number the classes in natural order."""

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
                f"({', '.join(IMG_EXTENSIONS)}): {_some(empty)}. Remove them, or let classes be empty "
                "(--allow-empty-classes, allow_empty=True)"
            )
        # An array, not a list of a million texts: counting references to those copies them into every worker.
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
        except OSError as error:  # a link to nothing, for one: what reads the image says so
            return f"{name} {error.strerror}"
        return f"{name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"

    def relative_name(self, index: int) -> str:
        return os.fsdecode(bytes(self.paths[index]))


def part_folder(root: Path, part: str) -> Path:
    """The folder of a part of images in ImageNet's layout.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if `root` is a URL.
    """
    check_no_url(root)
    folders = [root / name for name in (("train",) if part == "train" else ("val", "test"))]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder {folders[0]}: expected ImageNet's layout, {folders[0]}/<class>/<image>")


def class_names(folder: Path) -> list[str]:
    """The class folders in a folder; label l is the l-th of them.

    Names are in natural order (0, 1, 2, 10), as in timm. Names that begin with a dot are no classes.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are images beside them, which have no class, or a link to nothing.
    """
    with os.scandir(folder) as listed:
        entries = [entry for entry in listed if not is_hidden(entry.name)]
    classes = sorted((entry.name for entry in entries if entry.is_dir()), key=lambda name: (natural_key(name), name))
    broken = sorted(entry.path for entry in entries if entry.is_symlink() and not os.path.exists(entry.path))
    if broken:  # of a class whose disk is not mounted, perhaps; without it the labels of all others would be wrong
        raise ValueError(f"{broken[0]} is a link to {os.readlink(broken[0])}, which does not exist: mend or remove it")
    loose = sorted(entry.name for entry in entries if is_image_file(entry.name) and entry.is_file())
    if loose:
        raise ValueError(
            f"{len(loose)} images ({_some(loose)}) lie in {folder} itself and so have no class: expected "
            f"{folder}/<class>/<image>.{_SORTING if any(map(_VALIDATION.match, loose)) else ''}"
        )
    if not classes:
        raise FileNotFoundError(f"no class folder in {folder}: expected {folder}/<class>/<image>")
    return classes


def _image_files(folder: Path) -> list[str]:
    """The images in a class folder and its sub-folders, links followed, sorted by folder and name."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path) and Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(path)):
                raise ValueError(f"{path} is a link to a folder that it lies in: remove it")
        found += [(parent, name) for name in names if is_image_file(name) and not is_hidden(name)]
    return [os.path.join(*pair) for pair in sorted(found)]


def _raise(error: OSError) -> None:
    """What `os.walk` does not do by itself: it passes over a folder that it must not read."""
    raise error


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
