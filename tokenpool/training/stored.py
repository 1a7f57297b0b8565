"""Images that are decoded and resized once, to save time in training on a CPU."""

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

_BATCH = 64  # number of images that are written at a time


class StoredImageDataModule(ImageFolderDataModule):
    """Images from the sources of `ImageFolderDataModule`, stored at the size of the model's input.

    `setup` decodes the images, resizes and crops them as in evaluation, and stores them in a file in
    `tokenpool.files.cache_folder`, once for all processes and later runs. In training, half of the images are flipped,
    and all images are shifted by up to an eighth of their size in each direction. The edge is repeated. Flips and
    shifts depend only on seed and step, not on interruptions or on the number of processes.

    The arguments are the same as for `ImageFolderDataModule`.

    Raises:
        OSError: if the disk is too small for the images. Other errors are the same as for `ImageFolderDataModule`.
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
        # With use_prefetcher, the transform does not normalise, so that the values stay 8 bits.
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
    """Images in a file of `store`, as normalised floats (3, H, W), each with its label.

    Args:
        path: path of the file.
        labels: (N,), labels of the images in the file.
        mean: mean of each channel, for normalisation.
        std: standard deviation of each channel, for normalisation.

    Raises:
        ValueError: if the file is damaged, or does not contain N images. The message names the file.
    """

    def __init__(self, path: Path, labels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> None:
        self.path = path
        self.labels = labels
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or len(self.pixels) != len(labels):
            raise ValueError(f"{path} does not hold {len(labels)} images: delete it, and it will be created again")

    @cached_property
    def pixels(self) -> np.ndarray:
        """(N, 3, H, W) uint8, memory-mapped: all processes share the memory, and the file may be larger than it."""
        try:
            return np.load(self.path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it, and it will be created again") from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.tensor(self.pixels[index]).float().div_(255)
        return image.sub_(self.mean).div_(self.std), int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the pixels, so that a process that is not forked maps the file instead of receiving a copy."""
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}


def store(images: Images, chosen: np.ndarray, transform: Callable, folder: Path | None = None) -> Path:
    """Transform images once and store them in a file. An existing file is used again.

    The name of the file is a hash of names, sizes and times of the images (`Images.stamp`), of the transform, and of
    the version of Pillow. So changed images are stored again. One process writes the file atomically, while other
    processes wait.

    Args:
        images: images of one part of a data set.
        chosen: indices of the images to store, in this order.
        transform: deterministic function from a PIL image to 8 bits (3, H, W). Its `repr` must describe it completely.
        folder: folder of the file. Default: "images" in `tokenpool.files.cache_folder`.

    Returns:
        The path of the file, (N, 3, H, W) in NumPy's format.

    Raises:
        OSError: if the disk is too small.
        ValueError: if an image cannot be read. The message names the image.
    """
    folder = folder or files.cache_folder() / "images"
    text = "\n".join(
        [repr(transform), PIL.__version__, str(images.allow_truncated), *(images.stamp(index) for index in chosen)]
    )
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
    if not path.exists():
        with files.file_lock(path.with_suffix(".lock")):
            if not path.exists():  # another process may have written the file in the meantime
                _write(path, images, chosen, transform)
    return path


def _write(path: Path, images: Images, chosen: np.ndarray, transform: Callable) -> None:
    def pixels(index: int) -> np.ndarray:
        return np.ascontiguousarray(transform(load_image(*images.source(index), images.allow_truncated)))

    first = pixels(chosen[0])
    size, free = first.nbytes * len(chosen), shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            f"{len(chosen)} images take {size / 2**30:.1f} GiB, but {path.parent} has {free / 2**30:.1f} GiB free: set "
            "$TOKENPOOL_CACHE to a folder on another disk"
        )
    with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *first.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        # Not by a memory map, because on a full disk the system kills a process that writes to it.
        bar = tqdm(total=len(chosen), desc=f"storing images in {path.parent}", unit="image", mininterval=1)
        with bar:
            for start in range(0, len(chosen), _BATCH):
                batch = [pixels(index) for index in chosen[start : start + _BATCH]]
                file.write(np.stack(batch).tobytes())
                bar.update(len(batch))
