"""Every data set that a run can name: its data module, its fingerprint, and what messages call it.

To add a data set, add one entry to `DATA_SETS`. All other names mean folders in ImageNet's layout.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import LightningDataModule

from tokenpool.training.data import DigitsDataModule, ImageFolderDataModule
from tokenpool.training.stored import StoredImageDataModule

DATA = "TOKENPOOL_DATA"  # names the images of some data sets, so that results hold no path
AUGMENTATIONS = {"deit": ImageFolderDataModule, "light": StoredImageDataModule}  # data modules of image folders


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Attributes:
        name: what the setting of a run calls it.
        title: what messages call it.
        module: data module of images that a package contains. It takes a recipe, `split` and `seed`. None for image
            folders, whose data module the augmentation of the recipe chooses.
        fingerprint: of the test images of a split, where a package contains them. None for image folders.
        must_be_named: whether `--data` or $TOKENPOOL_DATA names the folder.
        split_by_seed: whether the runs of a study have their seed as `split`. Image folders are not split, but their
            stored settings have the seed, too.
        hub: its name on the Hugging Face Hub, for model cards; empty if it is not there.
    """

    name: str
    title: str
    module: Callable[..., LightningDataModule] | None = None
    fingerprint: Callable[[int], str] | None = None
    must_be_named: bool = False
    split_by_seed: bool = True
    hub: str = ""

    @property
    def embedded(self) -> bool:
        """Whether a package contains the images. They then have no folder and no preprocessing, and are few."""
        return self.module is not None

    @property
    def is_known(self) -> bool:
        """Whether it is known now which images are meant."""
        return not self.must_be_named or bool(os.environ.get(DATA))


_ALL = (
    DataSet("digits", "the digits", DigitsDataModule, lambda split: DigitsDataModule.fingerprint()),
    DataSet(
        "imagenet",
        "ImageNet, a folder in its layout or hf:ILSVRC/imagenet-1k",
        must_be_named=True,
        hub="ILSVRC/imagenet-1k",
    ),
    DataSet(
        "cifar10",
        "CIFAR-10: cifar10 to download it, a folder train/<class>/* and test/<class>/*, or hf:uoft-cs/cifar10",
        must_be_named=True,
        hub="uoft-cs/cifar10",
    ),
)
DATA_SETS = {each.name: each for each in _ALL}


def data_set(name: str) -> DataSet:
    """The data set that a run or a preset names; a folder in ImageNet's layout if none of them has that name."""
    return DATA_SETS.get(name) or DataSet(name, "a folder in ImageNet's layout")


def embedded() -> tuple[str, ...]:
    """Names of the data sets that a package contains."""
    return tuple(name for name, found in DATA_SETS.items() if found.embedded)
