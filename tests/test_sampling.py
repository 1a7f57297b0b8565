import itertools

import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler, TensorDataset

from tokenpool.training.data import DigitsDataModule
from tokenpool.training.recipe import Recipe
from tokenpool.training.sampling import EpochSampler, EvaluationSampler, ResumableLoader, SeededDataset
from tokenpool.training.seeding import step_seed


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def batches(images: int, batch: int, ranks: int, epoch: int = 0, **options) -> list[list[set[int]]]:
    """The n-th batches of all processes, for each n."""
    shares = []
    for rank in range(ranks):
        sampler = EpochSampler(numbers(images), batch, rank, ranks, **options)
        sampler.set_epoch(epoch)
        found = list(BatchSampler(sampler, batch // ranks, drop_last=False))
        assert len(sampler) == sum(map(len, found)) and all(len(each) == batch // ranks for each in found)
        shares.append(found)
    return [[set(share) for share in each] for each in zip(*shares, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_processes_together_see_the_same_batches(ranks: int) -> None:
    found = batches(101, 8, ranks, epoch=3, seed=5)
    alone = [each[0] for each in batches(101, 8, 1, epoch=3, seed=5)]
    assert [set.union(*each) for each in found] == alone and len(alone) == 101 // 8
    assert len(set.union(*alone)) == 12 * 8  # no image twice


def test_order_is_that_of_pytorch_and_changes_with_epoch_and_seed() -> None:
    def order(**options) -> list[int]:
        epoch = options.pop("epoch", 0)
        sampler = EpochSampler(numbers(48), 8, **options)
        sampler.set_epoch(epoch)
        return list(sampler)

    reference = DistributedSampler(numbers(48), num_replicas=1, rank=0, seed=step_seed(2, 1))
    assert order(seed=2, epoch=1) == list(reference)
    orders = [tuple(order(seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)]
    assert order() == order() and len(set(orders)) == 16  # no seed repeats another one's epochs


def test_seeds_do_not_meet() -> None:
    """Neither nearby ones nor large ones: ImageNet's images of 300 epochs are numbered up to 1e9."""
    steps = [*range(20), 1_000_003, 1_000_004, 2_000_006, 10**9]
    seeds = [step_seed(seed, step, rank) for seed in range(4) for step in steps for rank in range(3)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_repeated_augmentation_repeats_images_with_other_augmentations() -> None:
    dataset = SeededDataset(numbers(60), seed=0)
    sampler = EpochSampler(dataset, 6, seed=1, repeats=3)
    for epoch in (0, 2):
        sampler.set_epoch(epoch)
        found = list(sampler)
        images = [number % 60 for number in found]
        assert len(found) == 60 and len(set(found)) == 60  # each with a seed of its own
        assert len(set(images)) == 20 and all(len(set(images[i : i + 3])) == 1 for i in range(0, 60, 3))
        assert {number // 60 for number in found} == {3 * epoch, 3 * epoch + 1, 3 * epoch + 2}
    pairs = [set(found[i : i + 6]) for i in range(0, 60, 6)]
    for batch, half in itertools.product(pairs, (3,)):
        images = [number % 60 for number in sorted(batch, key=found.index)]
        assert not set(images[:half]) & set(images[half:])  # mixup pairs no image of so large a batch with itself


@pytest.mark.parametrize("count, ranks", [(450, 4), (9, 2), (1, 2), (0, 3)])
def test_each_image_is_evaluated_once(count: int, ranks: int) -> None:
    shares = [EvaluationSampler(numbers(count), rank, ranks) for rank in range(ranks)]
    assert sorted(itertools.chain(*shares)) == list(range(count))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_its_state_says(workers: int) -> None:
    def loader() -> ResumableLoader:
        dataset = numbers(40)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        return ResumableLoader(dataset, batch_size=4, sampler=EpochSampler(dataset, 4), **options)

    whole = [batch[0].tolist() for batch in loader()]
    first = loader()
    seen = [batch[0].tolist() for batch, _ in zip(first, range(3), strict=False)]
    assert seen == whole[:3]
    stopped = loader()
    iterator = iter(stopped)
    for _ in range(3):
        next(iterator)
    assert stopped.state_dict() == {"epoch": 0, "batches": 3}
    second = loader()
    second.load_state_dict(stopped.state_dict())
    assert [batch[0].tolist() for batch in second] == whole[3:]
    assert second.state_dict() == {"epoch": 0, "batches": 10} and len(second) == 10
    assert [batch[0].tolist() for batch in second] == whole  # the next time it is whole again
    following = loader()
    following.sampler.set_epoch(1)
    following.load_state_dict(stopped.state_dict())  # saved at the end of an epoch of three batches
    assert len(list(following)) == 10


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    data = DigitsDataModule(Recipe(batch_size=33, mixup=0.8))
    data.setup()
    with pytest.raises(ValueError, match="batch_size = 33 must be a multiple of 2, for 1 processes .* in pairs"):
        data.train_dataloader()
    data = DigitsDataModule(Recipe(batch_size=4000))
    data.setup()
    assert len(data.train_dataloader()) == 1  # one batch of all images, where they are fewer than a batch
