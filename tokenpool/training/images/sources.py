"""Names of image sources: folders, data sets of Hugging Face `datasets`, and data sets that torchvision downloads."""

from pathlib import Path

from tokenpool import files

HUB = "hf:"
DOWNLOADED = ("cifar10",)  # data sets that torchvision downloads

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}  # names of each part, best first
# Folders that operating systems create, beside names that begin with a dot.
_LEFTOVERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def is_downloaded(root: str | Path) -> bool:
    """Whether a source names a data set that torchvision downloads. A folder of that name takes precedence."""
    return str(root) in DOWNLOADED and not Path(root).is_dir()


def check_no_url(root: str | Path) -> None:
    """Refuse a URL as a source of images.

    Raises:
        ValueError: if `root` is one.
    """
    if not str(root).startswith(HUB):
        files.check_local(root, instead=f", or name a data set of the Hugging Face hub as {HUB}OWNER/NAME")


def is_hidden(name: str) -> bool:
    """Whether the name of a file or folder says that it is no part of the data."""
    return name.startswith(".") or name in _LEFTOVERS
