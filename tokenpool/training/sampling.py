"""Samplers that distribute images over processes. The result does not depend on the number of processes.

An interrupted epoch can be resumed at any batch.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tokenpool.training.seeding import step_seed


def length(dataset: Dataset) -> int:
    """Return the number of images of a data set."""
    return len(dataset)  # type: ignore[arg-type]  # torch declares no length, because some data sets have none


class EpochSampler(DistributedSampler):
    """Yield the images of one process for an epoch, in an order that depends only on seed and epoch.

    The n-th batches of all processes together contain the n-th part of this order, for any number of processes. An
    incomplete last part is dropped. With repeated augmentation (Hoffer et al. 2020; 3 repeats in Touvron et al. 2021),
    an image is repeated `repeats` times in a row. The length of an epoch does not change, so an epoch contains fewer
    different images.

    The class is a DistributedSampler, because Lightning replaces other samplers.

    Args:
        dataset: data set of the images. For a `SeededDataset` the sampler yields
            (epoch * repeats + repetition) * length + index.
        batch: number of images of a batch, over all processes.
        rank: index of this process.
        ranks: number of processes.
        seed: seed of the order.
        repeats: how often an image is repeated in a row.

    Attributes:
        skipped: number of batches to skip in the next epoch, because an interrupted run has already used them.
    """

    def __init__(
        self, dataset: Dataset, batch: int, rank: int = 0, ranks: int = 1, seed: int = 0, repeats: int = 1
    ) -> None:
        super().__init__(dataset, num_replicas=ranks, rank=rank, seed=seed)
        self.batch = batch
        self.repeats = repeats
        self.skipped = 0

    def __iter__(self) -> Iterator[int]:
        images = length(self.dataset)
        generator = torch.Generator().manual_seed(step_seed(self.seed, self.epoch))
        order = torch.randperm(images, generator=generator).repeat_interleave(self.repeats)[:images]
        if isinstance(self.dataset, SeededDataset):
            repetition = torch.arange(images) % self.repeats
            order = order + images * (self.epoch * self.repeats + repetition)
        mine = order[: images // self.batch * self.batch][self.rank :: self.num_replicas]
        mine = mine[self.skipped * self.batch // self.num_replicas :]
        self.skipped = 0
        return iter(mine.tolist())

    def __len__(self) -> int:
        return length(self.dataset) // self.batch * self.batch // self.num_replicas


class EvaluationSampler(DistributedSampler):
    """Yield the test images of one process. Each image occurs exactly once, without padding.

    Args:
        dataset: data set of the images.
        rank: index of this process.
        ranks: number of processes.
    """

    def __init__(self, dataset: Dataset, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(dataset, num_replicas=ranks, rank=rank)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, length(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, length(self.dataset), self.num_replicas))


class ResumableLoader(DataLoader):
    """A loader with an `EpochSampler`. Lightning stores its position in checkpoints, and resumes there."""

    sampler: EpochSampler
    _yielded = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's type is private
        self._yielded = self.sampler.skipped
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and the number of batches that it has yielded."""
        return {"epoch": self.sampler.epoch, "batches": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that the epoch of the state has yielded, if the sampler starts with this epoch."""
        if state["epoch"] == self.sampler.epoch and state["batches"] < len(self):
            self.sampler.skipped = state["batches"]


class SeededDataset(Dataset):
    """A data set whose random transforms depend only on seed, epoch and index, not on worker, batch or restarts.

    Args:
        dataset: data set with random transforms.
        seed: seed of the transforms.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return length(self.dataset)

    def __getitem__(self, number: int) -> Any:
        """Return the item for a number from an `EpochSampler`."""
        with isolate_rng(include_cuda=False):
            seed = step_seed(self.seed, number)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            return self.dataset[number % length(self.dataset)]
