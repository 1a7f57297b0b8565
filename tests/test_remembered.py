"""Remembered predictions are those of the model, for these images, and are made once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tokenpool
from tokenpool.runs import remembered


@pytest.fixture
def predict(small) -> Callable[..., tuple[Tensor, int]]:
    """Predictions for images, and how often a model ran for them."""

    def run(images: Tensor, model: nn.Module = small) -> tuple[Tensor, int]:
        ran: list[int] = []
        handle = model.register_forward_hook(lambda *given: ran.append(1))
        found = remembered.predict(model, images, remembered.fingerprint(model))
        handle.remove()
        return found, len(ran)

    return run


def test_equal_images_and_models_are_predicted_once(small, photos, predict, monkeypatch) -> None:
    monkeypatch.setattr(remembered, "memory", {})
    with torch.inference_mode():
        expected = small(photos)
    for times in (1, 0):
        found, ran = predict(photos)
        assert torch.equal(found, expected) and ran == times
    pooled = tokenpool.unpatch(tokenpool.patch(small, "tome", 0.8))
    assert predict(photos, pooled)[1] == 0  # a plain model again
    for change in (
        lambda: photos.mul_(1.001),
        lambda: small.head.weight.data.neg_(),
        lambda: tokenpool.patch(small, "tome", 0.8),
        lambda: tokenpool.patch(small, "tome", 0.7),
        lambda: setattr(tokenpool.unpatch(small), "pool_include_prefix", True),
    ):
        change()
        found, ran = predict(photos)
        with torch.inference_mode():
            assert ran == 1 and torch.equal(found, small(photos))


def test_memory_has_a_limit(photos, predict, monkeypatch) -> None:
    monkeypatch.setattr(remembered, "memory", {})
    monkeypatch.setattr(remembered, "MOST_BYTES", 4 * 7 * len(photos))
    assert [predict(photos + shift)[1] for shift in (0, 1, 0, 1)] == [1, 1, 0, 1]
