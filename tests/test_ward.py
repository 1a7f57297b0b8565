"""Ward pooling against a loop that computes objective (13) anew for each pair of clusters."""

from itertools import combinations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenpool
from tokenpool.downsampling import WardPooling


def objective(points: np.ndarray, weights: np.ndarray, group: list[int]) -> float:
    """Objective (13) of one cluster: the weighted sum of squared distances to its weighted mean."""
    mean = np.average(points[group], axis=0, weights=weights[group])
    return float(weights[group] @ ((points[group] - mean) ** 2).sum(axis=1))


def merged_groups(points: np.ndarray, weights: np.ndarray, keep: int) -> list[list[int]]:
    groups = [[token] for token in range(len(points))]
    while len(groups) > keep:
        one, other = min(
            combinations(groups, 2),
            key=lambda pair: (
                objective(points, weights, pair[0] + pair[1]) - sum(objective(points, weights, one) for one in pair)
            ),
        )
        groups = sorted([group for group in groups if group not in (one, other)] + [sorted(one + other)])
    return groups


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 12), keep=st.integers(1, 11), share=st.sampled_from((0, 0.5, 1)))
def test_ward_pooling_is_the_loop(seed: int, n: int, keep: int, share: float) -> None:
    keep, generator = min(keep, n - 1), torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
    scores, attention = (torch.rand(2, n, generator=generator, dtype=torch.float64) for _ in range(2))
    layer = WardPooling(keep, class_share=share)
    assert layer.uses_class_attention == (share > 0)
    found = layer(tokens, scores, **({"class_attention": attention} if share else {}))
    for image in range(2):
        given_scores, from_class, rows = (values[image].numpy() for values in (scores, attention, tokens))
        weights = (1 - share) * given_scores / given_scores.sum() + share * from_class / from_class.sum()
        lengths = np.linalg.norm(rows, axis=1)
        groups = merged_groups(rows / lengths[:, None], weights, keep)
        assert found.assignment[image].tolist() == [
            next(index for index, group in enumerate(groups) if token in group) for token in range(n)
        ]
        for group, token in zip(groups, found.tokens[image].numpy(), strict=True):
            mean = np.average(rows[group], axis=0, weights=weights[group])
            length = np.average(lengths[group], weights=weights[group])
            np.testing.assert_allclose(token, mean * length / np.linalg.norm(mean), rtol=1e-9, atol=1e-12)


def test_without_any_attention_all_weights_are_equal() -> None:
    tokens = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    none, equal = torch.zeros(2, 9), torch.full((2, 9), 0.3)
    found = WardPooling(4)(tokens, none, class_attention=none)
    expected = WardPooling(4)(tokens, equal, class_attention=equal)
    assert torch.equal(found.assignment, expected.assignment)
    torch.testing.assert_close(found.tokens, expected.tokens)


def test_a_model_without_class_token_uses_the_scores_alone() -> None:
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for class_token in (False, True):
        torch.manual_seed(0)
        options = {"class_token": class_token, "global_pool": "avg", "depth": 3, "embed_dim": 48, "num_heads": 3}
        model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=5, **options).eval()
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)  # so that attention has a shape
        found = tokenpool.patch(model, "ward", 0.7)(images)
        alone = tokenpool.patch(model, "ward", 0.7, class_share=0.0)(images)
        assert torch.equal(found, alone) == (not class_token)


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "half"])
def test_a_share_out_of_range_is_named(share: object) -> None:
    with pytest.raises(ValueError, match=r"class_share = .* must be a number in 0\.\.1"):
        WardPooling(3, class_share=share)
