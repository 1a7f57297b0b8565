import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenpool
from tokenpool.analysis import redundancy


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(3, 20, 7, generator=torch.Generator().manual_seed(1)) + 2


@pytest.mark.parametrize("alpha", [0.5, 1.0, 8.0])
def test_softmax_attention_is_gaussian_filtering(alpha: float) -> None:
    """Equation (7); without unit length it does not hold."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 8, dtype=torch.float64) for _ in range(3))
    unit_q, unit_k = 3 * F.normalize(q, dim=-1), 3 * F.normalize(k, dim=-1)
    expected = F.scaled_dot_product_attention(unit_q, unit_k, v, scale=alpha)
    assert torch.allclose(redundancy.softmax_attention(unit_q, unit_k, v, alpha), expected, atol=1e-12)
    assert torch.allclose(redundancy.gaussian_filter(unit_q, unit_k, v, alpha), expected, atol=1e-10)
    different = redundancy.gaussian_filter(q, k, v, alpha) - redundancy.softmax_attention(q, k, v, alpha)
    assert different.abs().max() > 1e-2


@pytest.mark.parametrize("share, count", [(0.1, 1), (0.3, 3), (1.0, 7)])
def test_leading_energy_against_numpy(tokens: Tensor, share: float, count: int) -> None:
    found = redundancy.leading_energy(tokens, share)
    for image, value in zip(tokens.double().numpy(), found, strict=True):
        energy = np.linalg.svd(image - image.mean(0), compute_uv=False) ** 2
        assert value == pytest.approx(energy[:count].sum() / energy.sum())


def test_leading_energy_of_few_tokens(tokens: Tensor) -> None:
    few = tokens[:, :4]  # fewer than dimensions
    energy = np.linalg.svd((few - few.mean(1, keepdim=True)).double().numpy(), compute_uv=False) ** 2
    assert redundancy.leading_energy(few).numpy() == pytest.approx(energy[:, 0] / energy.sum(-1))


def test_neighbour_distance_against_scikit_learn(tokens: Tensor) -> None:
    for image, value in zip(tokens.numpy(), redundancy.neighbour_distance(tokens), strict=True):
        distance, _ = NearestNeighbors(n_neighbors=len(image)).fit(image).kneighbors(image)
        assert value == pytest.approx(distance[:, 1].mean() / distance[:, 1:].mean(), rel=1e-4)


def test_measures_tell_redundant_tokens(tokens: Tensor) -> None:
    smooth = tokens.mean(1, keepdim=True) + 0.01 * (tokens - tokens.mean(1, keepdim=True))
    assert (redundancy.mean_energy(smooth) > redundancy.mean_energy(tokens)).all()
    assert redundancy.mean_energy(torch.ones(1, 5, 3)) == pytest.approx(1)
    doubled = tokens.repeat(1, 2, 1)
    assert (redundancy.neighbour_distance(doubled) < 1e-3).all()


def test_signals_are_the_blocks_own(small: VisionTransformer, photos: Tensor) -> None:
    found = redundancy.signals(small, photos)
    assert len(found) == 4 and found[0].queries.shape == (5, 3, 36, 16) and found[0].values.shape == (5, 36, 48)
    with torch.no_grad():
        tokens = small._pos_embed(small.patch_embed(photos))
        for block, signals in zip(small.blocks, found, strict=True):
            assert torch.allclose(signals.before, tokens[:, 1:], atol=1e-5)
            after = tokens + block.attn(block.norm1(tokens))
            assert torch.allclose(signals.after, after[:, 1:], atol=1e-4)
            projected = after - tokens
            assert torch.allclose(block.attn.proj(signals.filtered), projected[:, 1:], atol=1e-4)
            tokens = block(tokens)
    tokenpool.patch(small, "kmedoids", [20, 10, 5, 2])
    with pytest.raises(ValueError, match="plain model"):
        redundancy.signals(small, photos)
