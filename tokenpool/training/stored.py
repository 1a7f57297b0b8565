"""Images that are decoded and resized once, so that training on a CPU spends no time on JPEG and interpolation."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from tokenpool import files
from tokenpool.training.data import ImageFolderDataModule, shifted
from tokenpool.training.images import Images, first_of_each_class, load_image
from tokenpool.training.seeding import step_seed

_BATCH = 64  # images written at a time


class StoredImageDataModule(ImageFolderDataModule):
    """Images from folders and other sources as of `ImageFolderDataModule`, stored as the model takes them.

    `setup` decodes the images, resizes and crops them as for evaluation, and keeps them in a file in
    `tokenpool.files.cache_folder`, once for all processes and all later runs. In training, half of the images are
    flipped, and all are shifted by up to an eighth of their size in each direction; the edge fills what comes free.
    Flips and shifts are drawn from seed and step alone, so that neither an interruption nor the number of processes
    matters.

    Arguments and errors are those of `ImageFolderDataModule`; also

    Raises:
        OSError: if the disk cannot hold the images.
    """

    def setup(self, stage: str | None = None) -> None:
        tested = self._tested_images()
        chosen = first_of_each_class(tested, self.recipe.test_per_class, f"val of {self.root}")
        if stage == "fit":
            trained = self._training_images(tested)
            kept = first_of_each_class(trained, self.recipe.train_per_class, f"train of {self.root}")
            self.train_set = self._stored(trained, kept)
        self.test_set = Subset(self._stored(tested, chosen), self._evaluated(len(chosen)))

    def _stored(self, images: Images, chosen: np.ndarray) -> "StoredImages":
        # A prefetcher normalises by itself, so that the values stay 8 bits.
        transform = create_transform(**self.transforms, **self.cropping, use_prefetcher=True)
        path = store(images, chosen, transform)
        return StoredImages(path, images.labels[chosen], self.transforms["mean"], self.transforms["std"])

    def _augmented(self, images: Tensor, step: int) -> Tensor:
        rank, ranks = self._processes
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        most = images.shape[-1] // 8
        offsets = torch.randint(-most, most + 1, (len(images) * ranks, 2), generator=generator)
        flips = torch.rand(len(images) * ranks, generator=generator) < 0.5
        flips = flips[rank::ranks, None, None, None].to(images.device)
        return shifted(torch.where(flips, images.flip(-1), images), offsets[rank::ranks].to(images.device))


class StoredImages(Dataset):
    """Images of a file that `store` has written, as normalised floats (3, H, W), each with its label.

    Args:
        path: of the file.
        labels: (N,) of the images in it.
        mean: of each channel, for normalisation.
        std: of each channel.

    Raises:
        ValueError: if the file is damaged, or does not hold N images; the message names it.
    """

    def __init__(self, path: Path, labels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> None:
        self.path = path
        self.labels = labels
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or len(self.pixels) != len(labels):
            raise ValueError(f"{path} does not hold {len(labels)} images: delete it to have it made again")

    @cached_property
    def pixels(self) -> np.ndarray:
        """(N, 3, H, W) uint8, memory-mapped: all processes share it, and it need not fit into memory."""
        try:
            return np.load(self.path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it to have it made again") from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.tensor(self.pixels[index]).float().div_(255)
        return image.sub_(self.mean).div_(self.std), int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        """Without the pixels: a process that is not forked maps the file itself instead of getting a copy."""
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}


def store(images: Images, chosen: np.ndarray, transform: Callable, folder: Path | None = None) -> Path:
    """Transform images once, and keep them in a file. What is there already is not made again.

    The file's name stands for names, sizes and times of the images (`Images.stamp`), the transform and the version of
    Pillow: images that have changed are stored anew. The file is written whole or not at all, by one process while
    others wait.

    Args:
        images: of one part of a data set.
        chosen: numbers of the images to store, in this order.
        transform: of a PIL image, to 8 bits (3, H, W), without chance; its text (`repr`) must tell what it does.
        folder: default: "images" in `tokenpool.files.cache_folder`.

    Returns:
        The file, (N, 3, H, W) in NumPy's format.

    Raises:
        OSError: if the disk is full, or would be.
        ValueError: if an image cannot be read; the message names it.
    """
    folder = folder or files.cache_folder() / "images"
    text = "\n".join(
        [repr(transform), PIL.__version__, str(images.allow_truncated), *(images.stamp(index) for index in chosen)]
    )
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
    if not path.exists():
        with files.alone(path.with_suffix(".lock")):
            if not path.exists():  # another process has made it meanwhile
                _write(path, images, chosen, transform)
    return path


def _write(path: Path, images: Images, chosen: np.ndarray, transform: Callable) -> None:
    def pixels(index: int) -> np.ndarray:
        return np.ascontiguousarray(transform(load_image(*images.source(index), images.allow_truncated)))

    first = pixels(chosen[0])
    size, free = first.nbytes * len(chosen), shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            f"{len(chosen)} images take {size / 2**30:.1f} GiB, but {path.parent} has {free / 2**30:.1f} GiB free: let "
            "$TOKENPOOL_CACHE name a folder on another disk"
        )
    with files.whole(path) as temporary, open(temporary, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *first.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        # Not through a memory map: on a full disk its owner is killed.
        bar = tqdm(total=len(chosen), desc=f"storing images in {path.parent}", unit="image", mininterval=1)
        with bar:
            for start in range(0, len(chosen), _BATCH):
                batch = [pixels(index) for index in chosen[start : start + _BATCH]]
                file.write(np.stack(batch).tobytes())
                bar.update(len(batch))
