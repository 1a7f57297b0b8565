import numpy as np
import pytest
import torch
from timm.data import Mixup

from tokenpool.training.mixing import PAIRS, mixed

CLASSES = 7


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 16, 16, generator=generator), torch.arange(count) % CLASSES


def both(**options: float) -> Mixup:
    alphas = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0} | options
    return Mixup(**alphas, label_smoothing=0.0, num_classes=CLASSES)


@pytest.mark.parametrize("alphas", [{}, {"mixup_alpha": 0.0}, {"cutmix_alpha": 0.0}])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_processes_mix_what_one_would_mix(ranks: int, alphas: dict) -> None:
    images, labels = batch(3 * 2 * PAIRS - 80)  # more than one group, the last one not full
    alone = mixed(images.clone(), labels, both(**alphas), seed=1, step=5)
    for rank in range(ranks):
        share = mixed(images[rank::ranks].clone(), labels[rank::ranks], both(**alphas), 1, 5, rank, ranks)
        assert all(torch.equal(found, expected[rank::ranks]) for found, expected in zip(share, alone, strict=True))


def test_a_group_is_mixed_as_timm_does() -> None:
    images, labels = batch(16)
    found, targets = mixed(images.clone(), labels, both(cutmix_alpha=0.0), seed=3, step=2)
    assert targets.shape == (16, CLASSES) and torch.allclose(targets.sum(1), torch.ones(16))
    ratio = targets[0, labels[0]].item()
    partners = [*range(8, 16), *range(8)]
    assert torch.allclose(found, ratio * images + (1 - ratio) * images[partners])
    classes = torch.nn.functional.one_hot(labels, CLASSES)
    assert torch.allclose(targets, ratio * classes + (1 - ratio) * classes[partners])


def test_ratios_depend_on_step_and_leave_the_global_state_alone() -> None:
    images, labels = batch(16)
    before = np.random.get_state()[1].copy()
    first, again, other = (mixed(images.clone(), labels, both(), 0, step)[1] for step in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (np.random.get_state()[1] == before).all()
