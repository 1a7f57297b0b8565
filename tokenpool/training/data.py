"""Data modules: scikit-learn's handwritten digits (no download), and image folders in ImageNet's layout."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import Mixup, create_transform
from timm.data.auto_augment import RandAugment
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset
from torchvision.transforms import Compose

from tokenpool.training.fingerprint import of_arrays
from tokenpool.training.images import Images, first_of_each_class, open_images
from tokenpool.training.mixing import mixed
from tokenpool.training.recipe import Recipe
from tokenpool.training.sampling import EpochSampler, EvaluationSampler, ResumableLoader, SeededDataset, length
from tokenpool.training.seeding import step_seed


class _DataModule(LightningDataModule):
    """Base class. Batches depend only on seed, epoch and step, not on the number of processes or on interruptions.

    The batch size of the recipe is the number of images of one optimiser step, over all processes and accumulated
    batches.
    """

    classes: Sequence[str]  # names of the classes; label l is class `classes[l]`
    num_classes: int
    train_set: Dataset
    test_set: Dataset

    def __init__(self, recipe: Recipe, workers: int, seed: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.workers = workers
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        rank, ranks = self._processes
        batch = self._training_batch()
        sampler = EpochSampler(self.train_set, batch, rank, ranks, self.seed, self.recipe.repeats)
        if self.trainer:
            # Lightning sets the epoch too, but in a resumed run only after the workers for its first epoch exist.
            progress = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(progress.processed)  # type: ignore[attr-defined]  # the declared type is a base class
        return self._loader(ResumableLoader, self.train_set, batch // ranks, sampler)

    def val_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader:
        rank, ranks = self._processes
        if length(self.test_set) < ranks:
            raise ValueError(
                f"{length(self.test_set)} test images are too few for {ranks} processes: use fewer processes"
            )
        sampler = EvaluationSampler(self.test_set, rank, ranks)
        return self._loader(DataLoader, self.test_set, max(self.recipe.batch_size // ranks, 1), sampler)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if self.trainer is None or not self.trainer.training:
            return images, labels
        accumulated = self.trainer.accumulate_grad_batches
        number = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready  # index of the batch in the epoch
        step = self.trainer.global_step * accumulated + number % accumulated
        images = self._augmented(images, step)
        if not self.recipe.mixup and not self.recipe.cutmix:
            return images, labels
        mixup = Mixup(self.recipe.mixup, self.recipe.cutmix, label_smoothing=0.0, num_classes=self.num_classes)
        return mixed(images, labels, mixup, self.seed, step, *self._processes)

    def _augmented(self, images: Tensor, step: int) -> Tensor:
        return images

    @property
    def _processes(self) -> tuple[int, int]:
        """Index of this process, and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _training_batch(self) -> int:
        """Return the number of images of a batch, over all processes. It is smaller for a small training set."""
        _, ranks = self._processes
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        unit = ranks * (2 if self.recipe.mixup or self.recipe.cutmix else 1)
        batch, rest = divmod(self.recipe.batch_size, accumulated)
        if rest or batch % unit:
            pairs = ", in pairs for mixup" if unit > ranks else ""
            raise ValueError(
                f"batch_size = {self.recipe.batch_size} must be a multiple of {unit * accumulated}, for {ranks} "
                f"processes and {accumulated} accumulated batches{pairs}"
            )
        batch = min(batch, length(self.train_set) // unit * unit)
        if not batch:
            raise ValueError(f"{length(self.train_set)} training images are too few, expected at least {unit}")
        return batch

    def _loader(self, kind: type[DataLoader], dataset: Dataset, batch: int, sampler: DistributedSampler) -> DataLoader:
        return kind(
            dataset,
            batch_size=batch,
            sampler=sampler,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0 and kind is ResumableLoader,  # workers for tests end after the test
            worker_init_fn=_ignore_signals,
        )


def _ignore_signals(worker: int) -> None:
    """Ignore signals in a worker. All processes of a job receive them, but the training process ends its workers."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class DigitsDataModule(_DataModule):
    """The 1,797 handwritten digits of scikit-learn's `load_digits`, enlarged from 8x8 to 16x16 pixels.

    1,347 images are for training and 450 for testing, with the same share of each digit. Training images are shifted at
    random.

    Args:
        recipe: hyper-parameters. Batch size, mixup, CutMix and repeats are used here.
        split: random state of the split.
        shift: maximum shift of a training image in each direction, in pixels.
        workers: number of processes that load data.
        seed: seed of order, shifts and mixing.
    """

    classes = tuple(map(str, range(10)))
    num_classes = 10
    test_images = 450

    def __init__(
        self,
        recipe: Recipe = Recipe(),
        split: int = 0,
        shift: int = 2,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(recipe, workers, seed)
        self.split = split
        self.shift = shift

    @staticmethod
    def fingerprint() -> str:
        """Return the fingerprint of the digits in the installed scikit-learn, see `tokenpool.training.fingerprint`."""
        digits = load_digits()
        return f"{len(digits.target)} handwritten digits, {of_arrays(digits.images, digits.target)}"

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

    def _augmented(self, images: Tensor, step: int) -> Tensor:
        # Draw for the full batch from the seed of the step, so that interruptions and processes change nothing.
        rank, ranks = self._processes
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        offsets = torch.randint(-self.shift, self.shift + 1, (len(images) * ranks, 2), generator=generator)
        return shifted(images, offsets[rank::ranks].to(images.device))


class ImageFolderDataModule(_DataModule):
    """Images from folders in ImageNet's layout, or from Hugging Face `datasets`, with timm's transforms.

    The augmentation of training images is DeiT's: random resized crops, flips, RandAugment and random erasing.

    Args:
        root: folder with `train/<class>/*` (not needed for evaluation) and `val/<class>/*` (or `test`), or "hf:" and a
            data set of Hugging Face `datasets`, see `tokenpool.training.images.open_images`.
        image_size: height and width in pixels. One number means a square.
        recipe: hyper-parameters. Batch size, mixup, CutMix, repeats, images of each class and `crop_pct` are used here.
            `augmentation` is not used: each class of data modules has one kind of augmentation.
        workers: number of processes that load data.
        seed: seed of order, augmentation and mixing.
        mean: mean of each channel, for normalisation.
        std: standard deviation of each channel, for normalisation.
        crop_pct: share of the resized image that evaluation crops, if the recipe's `crop_pct` is 0.
        limit: number of test images, evenly spaced over all test images. 0 for all.
        part: evaluate only a part of these images: "1/2" is the first of two interleaved halves. Empty for all.
        interpolation: timm's name of the interpolation for resizing: "bicubic", "bilinear" and so on.
        crop_mode: timm's name of the crop in evaluation: "center" crops the middle, "squash" changes the aspect ratio,
            "border" adds a border.
        allow_empty: see `tokenpool.training.images.open_images`.
        allow_truncated: see `tokenpool.training.images.load_image`.

    Raises:
        FileNotFoundError: if a needed folder is missing or has no image.
        ValueError: if an image cannot be read; the message names the image. Also if train and val have different
            classes, if a class has too few images, or if `mean` does not have three channels.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | tuple[int, int] = 224,
        recipe: Recipe = Recipe(batch_size=64),
        workers: int = 2,
        seed: int = 0,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        crop_pct: float = 0.9,
        limit: int = 0,
        part: str = "",
        interpolation: str = "bicubic",
        crop_mode: str = "center",
        allow_empty: bool = False,
        allow_truncated: bool = False,
    ) -> None:
        super().__init__(recipe, workers, seed)
        self.root = root
        size = {"input_size": (3, *to_2tuple(image_size))}
        self.transforms: dict[str, Any] = size | {"mean": mean, "std": std, "interpolation": interpolation}
        self.cropping: dict[str, Any] = {"crop_pct": recipe.crop_pct or crop_pct, "crop_mode": crop_mode}
        self.allowed = {"allow_empty": allow_empty, "allow_truncated": allow_truncated}
        self.limit = limit
        self.part = _part(part)

    def setup(self, stage: str | None = None) -> None:
        tested = self._tested_images(create_transform(**self.transforms, **self.cropping))
        if stage == "fit":
            folder = self._training_images(tested, training_transform(**self.transforms))
            chosen = first_of_each_class(folder, self.recipe.train_per_class, f"train of {self.root}")
            # An array, because workers can share it. torch declares a Sequence, but accepts an array.
            part = Subset(folder, chosen)  # type: ignore[arg-type]
            self.train_set = SeededDataset(part if self.recipe.train_per_class else folder, self.seed)
        chosen = first_of_each_class(tested, self.recipe.test_per_class, f"val of {self.root}")
        self.test_set = Subset(tested, [chosen[index] for index in self._evaluated(len(chosen))])

    def _tested_images(self, transform: Any = None) -> Images:
        images = open_images(self.root, "val", transform, **self.allowed)
        channels = len(self.transforms["mean"])
        if channels != 3:
            raise ValueError(f"the model expects {channels} channels, but the images of {self.root} have 3")
        self.classes = images.classes
        self.num_classes = len(self.classes)
        return images

    def _training_images(self, tested: Images, transform: Any = None) -> Images:
        images = open_images(self.root, "train", transform, **self.allowed)
        if images.classes != tested.classes:
            raise ValueError(f"train and val of {self.root} must have the same classes")
        return images

    def _evaluated(self, images: int) -> list[int]:
        """Return the indices of the test images, by `limit` and `part`."""
        order = list(range(images))
        if 0 < self.limit < images:
            order = torch.linspace(0, images - 1, self.limit).long().tolist()
        return order[self.part]


def training_transform(**options: Any) -> Compose:
    """Create DeiT's augmentation (Touvron et al. 2021, Table 9) with timm.

    Args:
        **options: arguments of timm's `create_transform`: `input_size`, `mean`, `std` and `interpolation` (default:
            bicubic).
    """
    transform = create_transform(
        **{"interpolation": "bicubic"} | options,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=None,  # type: ignore[arg-type]  # timm accepts None
        re_prob=0.25,
        re_mode="pixel",
    )
    augment = next(step for step in transform.transforms if isinstance(step, RandAugment))
    for operation in augment.ops:
        if operation.name == "PosterizeIncreasing":
            # At magnitude 10, timm keeps 0 bits, which is an error in Pillow 13. Below 10, at least 1 bit remains.
            operation.magnitude_max = 9.99
    return transform


def _part(text: str) -> slice:
    """Convert the text of a part to a slice: "2/3" is slice(1, None, 3)."""
    if not text:
        return slice(None)
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f'part = {text!r} must be like "1/2", the first of two')
    return slice(int(index) - 1, None, int(count))


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Shift images down and to the right. The edge is repeated.

    Args:
        images: (B, C, H, W).
        offsets: (B, 2) integers, shifts in pixels.

    Returns:
        (B, C, H, W).
    """
    batch, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)  # (B, W)
    image = torch.arange(batch, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
