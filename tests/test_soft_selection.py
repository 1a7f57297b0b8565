import pytest
import torch

import tokenpool
from tokenpool.training import soft_selection
from tokenpool.training.soft_selection import SoftSelection


def test_weights_of_one_change_nothing(small, photos) -> None:
    plain = small(photos)
    tokenpool.patch(small, SoftSelection)
    torch.testing.assert_close(small(photos), plain, rtol=0, atol=1e-5)
    assert soft_selection.learned_schedule(small) == [36] * 4


def test_tokens_are_scaled_by_the_weight_of_their_rank() -> None:
    layer = SoftSelection(4)
    layer.retention.data = torch.tensor([1.0, 0.7, 0.4, 0.1])
    tokens = torch.ones(2, 4, 3)
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [4.0, 3.0, 2.0, 1.0]])
    scaled, assignment = layer(tokens, scores)
    torch.testing.assert_close(scaled[:, :, 0], torch.tensor([[0.1, 1.0, 0.7, 0.4], [1.0, 0.7, 0.4, 0.1]]))
    assert assignment.tolist() == [[0, 1, 2, 3]] * 2
    scaled.sum().backward()
    assert layer.retention.grad.tolist() == [6.0] * 4


def test_soft_selection_of_zeros_and_ones_is_power_bert_but_for_the_lost_keys(small, photos) -> None:
    """With the last block's weights cut off after K ranks, the class token sees what PoWER-BERT leaves."""
    keep = [36, 36, 36, 9]
    expected = tokenpool.patch(small, "power_bert", keep, carry=False)(photos)
    tokenpool.patch(small, SoftSelection)
    small.blocks[3].downsampler.retention.data[9:] = 0
    torch.testing.assert_close(small(photos), expected, rtol=0, atol=1e-5)
    assert soft_selection.learned_schedule(small) == keep


def test_loss_schedule_and_clamping(small) -> None:
    tokenpool.patch(small, SoftSelection)
    assert soft_selection.retention_loss(small).item() == 36 * (1 + 2 + 3 + 4)
    with torch.no_grad():
        for layer, value in zip(soft_selection.layers(small), (1.5, -0.2, 0.51, 0.25), strict=True):
            layer.retention.fill_(value)
    soft_selection.clamp_retention(small)
    assert soft_selection.learned_schedule(small) == [36, 0, 18, 9]


def test_bad_use_is_named(small) -> None:
    with pytest.raises(ValueError, match="learns a schedule: leave out keep"):
        tokenpool.patch(small, SoftSelection, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="expects 4 tokens, got 5"):
        SoftSelection(4)(torch.ones(1, 5, 2), torch.ones(1, 5))
