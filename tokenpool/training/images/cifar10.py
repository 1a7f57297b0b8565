"""CIFAR-10, downloaded by torchvision."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from tokenpool.files import cache_folder, file_lock
from tokenpool.training.images.base import Images
from tokenpool.training.images.sources import HUB


class Cifar10Images(Images):
    """CIFAR-10 (Krizhevsky 2009). torchvision downloads it into the cache folder and checks it."""

    def __init__(self, part: str, transform: Callable | None = None) -> None:
        folder = cache_folder() / "cifar10"
        try:
            with file_lock(folder / ".lock"):
                opened = CIFAR10(folder, train=part == "train", download=True)
        except Exception as error:  # errors of the network, of the disk, and of incomplete downloads
            raise ValueError(
                f"cannot download CIFAR-10 into {folder} ({error}): give --data a folder with CIFAR-10, or "
                f"{HUB}uoft-cs/cifar10"
            ) from error
        self.pixels = opened.data  # (N, 32, 32, 3) uint8
        self.title = f"{part} of CIFAR-10"
        files = opened.train_list if opened.train else opened.test_list
        self.files = " ".join(checksum for _, checksum in files)
        super().__init__(list(opened.classes), np.array(opened.targets), transform)

    def source(self, index: int) -> tuple[bytes, str]:
        file = BytesIO()
        Image.fromarray(self.pixels[index]).save(file, "PNG")  # PNG is lossless
        return file.getvalue(), f"{index} of {self.title}"

    def stamp(self, index: int) -> str:
        return f"{index} {self.files}"

    def relative_name(self, index: int) -> str:
        return str(index)

    def content(self, index: int) -> bytes:
        return self.pixels[index].tobytes()

    def size(self, index: int) -> int:
        return self.pixels[index].nbytes
