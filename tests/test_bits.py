import numpy as np
import pytest

from tokenpool.analysis import bits


@pytest.mark.parametrize("images", [0, 1, 7, 8, 9, 450, 10_000])
def test_bits_go_out_and_in(images: int) -> None:
    correct = np.random.default_rng(images).random(images) < 0.7
    text = bits.encode(correct)
    assert np.array_equal(bits.decode(text, images), correct)
    assert len(text) <= 4 * (images // 24 + 1) and text.isascii()
    assert bits.encode(correct.astype(int).tolist()) == text


def test_the_format_is_that_of_numpy() -> None:
    """A reader with NumPy alone gets the same: results outlive this package."""
    import base64

    text = bits.encode([1, 0, 0, 0, 0, 0, 0, 1, 1])
    assert base64.b64decode(text) == bytes([0b10000001, 0b10000000])


def test_texts_of_another_number_of_images_are_refused() -> None:
    text = bits.encode([True] * 12)
    for images in (0, 8, 11, 17):  # 11: a bit that is set would be lost
        with pytest.raises(ValueError, match=f"bits of 9..16 images, not of {images}"):
            bits.decode(text, images)
    for wrong in ("é", "abc", [1, 0]):
        with pytest.raises(ValueError, match="is not a base64 text of bits"):
            bits.decode(wrong, 3)
    for wrong in ([[True]], [0, 2], [0.5]):
        with pytest.raises(ValueError, match="must hold one 0 or 1 for each image"):
            bits.encode(wrong)
