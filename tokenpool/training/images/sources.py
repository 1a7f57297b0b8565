"""Names of image sources: folders, data sets of Hugging Face `datasets`, and data sets that torchvision downloads."""

from pathlib import Path

from tokenpool import files

HUB = "hf:"
DOWNLOADED = ("cifar10",)  # data sets that torchvision downloads

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}  # names of each part; the first wins
# Folders that operating systems create. Names that begin with a dot are also ignored.
_LEFTOVERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def is_downloaded(root: str | Path) -> bool:
    """Return whether a source is a data set that torchvision downloads. A folder of the same name has priority."""
    return str(root) in DOWNLOADED and not Path(root).is_dir()


def check_no_url(root: str | Path) -> None:
    """Check that a source of images is not a URL.

    Raises:
        ValueError: if it is a URL.
    """
    if not str(root).startswith(HUB):
        files.check_local(root, instead=f", or name a data set of the Hugging Face hub as {HUB}OWNER/NAME")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is not part of the data, according to its name."""
    return name.startswith(".") or name in _LEFTOVERS
