"""Which images a process gets, and when: exact, whatever the number of processes, and resumable at any batch."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tokenpool.training.seeding import step_seed


def length(dataset: Dataset) -> int:
    """Number of images of a data set."""
    return len(dataset)  # type: ignore[arg-type]  # torch declares no length, for data sets that are iterated only


class EpochSampler(DistributedSampler):
    """The share of one process in an epoch's images, in an order that seed and epoch alone decide.

    The n-th batches of all processes together hold the n-th piece of that order, whatever the number of processes. What
    is left of the last piece is dropped. With repeated augmentation (Hoffer et al. 2020; Touvron et al. 2021 take 3) an
    image comes `repeats` times in a row and an epoch stays as long as it was, so that it has fewer different images.

    A DistributedSampler, because Lightning replaces others.

    Args:
        dataset: of the images. For a `SeededDataset` this yields (epoch * repeats + repetition) * length + index.
        batch: images a batch of all processes together.
        rank: number of this process.
        ranks: number of processes.
        seed: of the order.
        repeats: how many times in a row an image comes.

    Attributes:
        skipped: batches of the next epoch to pass over, because an interrupted run has seen them.
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
    """The share of one process in the images to evaluate: each image once, none twice to make shares equal."""

    def __init__(self, dataset: Dataset, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(dataset, num_replicas=ranks, rank=rank)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, length(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, length(self.dataset), self.num_replicas))


class ResumableLoader(DataLoader):
    """A loader with an `EpochSampler` whose place in the epoch Lightning keeps in checkpoints, and goes on from."""

    sampler: EpochSampler
    _yielded = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's type is private
        self._yielded = self.sampler.skipped
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many batches of it have been yielded."""
        return {"epoch": self.sampler.epoch, "batches": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """If the sampler is to begin with the state's epoch, let it go on where that was left."""
        if state["epoch"] == self.sampler.epoch and state["batches"] < len(self):
            self.sampler.skipped = state["batches"]


class SeededDataset(Dataset):
    """A data set whose random transforms depend on seed, epoch and index alone, not on worker, batch or restart."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return length(self.dataset)

    def __getitem__(self, number: int) -> Any:
        """The image that an `EpochSampler` means by a number."""
        with isolate_rng(include_cuda=False):
            seed = step_seed(self.seed, number)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            return self.dataset[number % length(self.dataset)]
