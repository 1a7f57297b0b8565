"""Data: scikit-learn's handwritten digits, which need no download, and image folders in ImageNet's layout."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

from tokenpool.images import open_images
from tokenpool.seeding import step_seed


class EpochSampler(DistributedSampler):
    """Shuffles by seed and epoch alone, shares out among ranks, and tells the data set the epoch.

    Lightning sets the epoch. Instead of the index i this yields epoch * length + i, which reaches the workers, too.
    """

    def __iter__(self) -> Iterator[int]:
        return (self.epoch * len(self.dataset) + index for index in super().__iter__())


class SeededDataset(Dataset):
    """A data set whose random transforms depend on seed, epoch and index alone, not on worker, batch or restart."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, epoch_and_index: int) -> Any:
        epoch, index = divmod(epoch_and_index, len(self.dataset))
        with isolate_rng(include_cuda=False):
            seed = step_seed(self.seed, epoch * len(self.dataset) + index)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            return self.dataset[index]


class _DataModule(LightningDataModule):
    """Loaders whose order depends on seed and epoch alone, so that a resumed run sees what it would have seen."""

    num_classes: int
    sampler: type[DistributedSampler] = DistributedSampler
    train_set: Dataset
    test_set: Dataset

    def __init__(self, batch_size: int, workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = self.sampler(self.train_set, num_replicas=ranks, rank=rank, seed=self.seed)
        # Lightning tells it of later epochs. Of the one that a resumed run begins with it tells too late for workers.
        sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed if self.trainer else 0)
        return self._loader(self.train_set, sampler=sampler, drop_last=len(self.train_set) >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
            **options,
        )


class DigitsDataModule(_DataModule):
    """The 1,797 handwritten digits of scikit-learn's `load_digits`, enlarged from 8x8 to 16x16 pixels.

    1,347 train, 450 are held out, with the same share of each digit; `split` chooses which. Training images are
    shifted at random.

    Args:
        batch_size: images a batch.
        split: random state of the split.
        shift: the most pixels that a training image is shifted in each direction.
        workers: processes that load data.
        seed: of order and shifts.
    """

    num_classes = 10
    test_images = 450

    def __init__(self, batch_size: int = 32, split: int = 0, shift: int = 2, workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, workers, seed)
        self.split = split
        self.shift = shift

    def setup(self, stage: str | None = None) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
        images = F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)
        labels = torch.tensor(digits.target)
        train, test = train_test_split(
            torch.arange(len(labels)), test_size=self.test_images, random_state=self.split, stratify=labels
        )
        images = (images - images[train].mean()) / images[train].std()
        self.train_set = TensorDataset(images[train], labels[train])
        self.test_set = TensorDataset(images[test], labels[test])

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if self.trainer is None or not self.trainer.training:
            return images, labels
        # Drawn from the step's own seed, so that a resumed run shifts as an uninterrupted one.
        seed = step_seed(self.seed, self.trainer.global_step, self.trainer.global_rank)
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.randint(-self.shift, self.shift + 1, (len(images), 2), generator=generator)
        return shifted(images, offsets.to(images.device)), labels


class ImageFolderDataModule(_DataModule):
    """Images from folders in ImageNet's layout, or from Hugging Face `datasets`, with timm's transforms.

    Training images get DeiT's augmentation: random resized crops, flips, RandAugment and random erasing.

    Args:
        root: folder that holds `train/<class>/*` (not needed to evaluate) and `val/<class>/*` (or `test`); or "hf:" and
            what `datasets` can open, see `tokenpool.images.open_images`.
        image_size: height and width in pixels.
        batch_size: images a batch.
        workers: processes that load data.
        seed: of the order.
        mean: of each channel, for normalisation.
        std: of each channel.
        crop_pct: share of the resized image that evaluation crops.
        limit: evaluate on so many images only, evenly spaced over the list of all; 0 for all.
        part: evaluate on a part of those: "1/2" is the first of two interleaved halves; empty for all.

    Raises:
        FileNotFoundError: if a folder that is needed is missing or holds no image.
        ValueError: on reading an image that cannot be read; the message names it. Also if train and val have different
            classes.
    """

    sampler = EpochSampler

    def __init__(
        self,
        root: str | Path,
        image_size: int = 224,
        batch_size: int = 64,
        workers: int = 2,
        seed: int = 0,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        crop_pct: float = 0.9,
        limit: int = 0,
        part: str = "",
    ) -> None:
        super().__init__(batch_size, workers, seed)
        self.root = root
        self.transforms = {"input_size": (3, image_size, image_size), "mean": mean, "std": std}
        self.crop_pct = crop_pct
        self.limit = limit
        self.part = _part(part)

    def setup(self, stage: str | None = None) -> None:
        evaluate = create_transform(**self.transforms, interpolation="bicubic", crop_pct=self.crop_pct)
        self.test_set = open_images(self.root, "val", evaluate)
        self.num_classes = len(self.test_set.classes)
        if stage == "fit":
            train = create_transform(
                **self.transforms,
                is_training=True,
                interpolation="bicubic",
                auto_augment="rand-m9-mstd0.5-inc1",
                color_jitter=None,
                re_prob=0.25,
                re_mode="pixel",
            )
            folder = open_images(self.root, "train", train)
            if folder.classes != self.test_set.classes:
                raise ValueError(f"the classes of train and val of {self.root} differ")
            self.train_set = SeededDataset(folder, self.seed)
        order = list(range(len(self.test_set)))
        if 0 < self.limit < len(order):
            order = torch.linspace(0, len(order) - 1, self.limit).long().tolist()
        self.test_set = Subset(self.test_set, order[self.part])


def _part(text: str) -> slice:
    """Every how manieth image: "2/3" is slice(1, None, 3)."""
    if not text:
        return slice(None)
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f'part = {text!r} must be like "1/2", the first of two')
    return slice(int(index) - 1, None, int(count))


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Images (B, C, H, W) moved by offsets (B, 2) pixels, down and to the right; the edge fills what comes free."""
    batch, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)  # (B, W)
    image = torch.arange(batch, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
