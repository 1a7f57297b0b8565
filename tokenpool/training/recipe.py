"""All hyper-parameters of training.

To add a hyper-parameter, add a field to `Recipe` and use it. The field is then an option of
`python -m experiments train`, and a part of all presets and all stored results.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any


def _field(default: Any, text: str, **limits: Any) -> Any:
    """Create a field with a help text and limits: `least`, `most` and `below` for numbers, or `choices`."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of training, including the choice of images.

    The metadata of each field contains its `help` text and its limits. A stored result without a field was made with
    the default of the field.

    Raises:
        ValueError: if a value is out of range. The message names all wrong values.
    """

    epochs: int = _field(0, "Epochs of training. 0 only evaluates.", least=0)
    batch_size: int = _field(32, "Images of one optimiser step, over all processes.", least=1)
    learning_rate: float = _field(5e-4, "Peak learning rate of AdamW.", least=0)
    warmup_epochs: float = _field(5, "Epochs in which the learning rate increases linearly.", least=0)
    weight_decay: float = _field(0.05, "Weight decay of AdamW, without biases, norms and embeddings.", least=0)
    label_smoothing: float = _field(0.1, "Label smoothing of the cross-entropy.", least=0, most=1)
    final_learning_rate: float = _field(0.0, "Learning rate at the end of the cosine.", least=0)
    mixup: float = _field(0.0, "Alpha of mixup's ratio (Zhang et al. 2018). 0 for no mixup.", least=0)
    cutmix: float = _field(
        0.0,
        "Alpha of CutMix's ratio (Yun et al. 2019). 0 for no CutMix. With mixup, each batch gets one of the two.",
        least=0,
    )
    repeats: int = _field(1, "Repeats of an image in a row: repeated augmentation (Hoffer et al. 2020).", least=1)
    ema_decay: float = _field(
        0.0,
        "Decay of the moving average of the weights, for each step. The average is tested, too. 0 for no average.",
        least=0,
        below=1,
    )
    crop_pct: float = _field(
        0.0, "Share of the resized image that evaluation crops. 0 for the model's value in timm.", least=0, most=1
    )
    augmentation: str = _field(
        "deit",
        "Augmentation of training images in folders: deit (random crops, RandAugment, erasing), or light (flips and "
        "shifts of images that are decoded once).",
        choices=("deit", "light"),
    )
    train_per_class: int = _field(0, "Train on the first N images of each class. 0 for all images.", least=0)
    test_per_class: int = _field(0, "Test on the first N images of each class. 0 for all images.", least=0)
    retention_penalty: float = _field(0.0, "Weight lambda of the retention loss, in a search for a schedule.", least=0)
    retention_learning_rate: float = _field(1e-2, "Peak learning rate of the retention weights.", least=0)
    ratio_penalty: float = _field(2.0, "Weight of the ratio loss, for DynamicViT.", least=0)
    distillation: float = _field(
        0.5,
        "Weight of each distillation loss, for DynamicViT. The teacher is the plain model at the start of training, "
        "so start from trained weights. 0 for none.",
        least=0,
    )

    def __post_init__(self) -> None:
        wrong = list(self._violations())
        if wrong:
            raise ValueError("; ".join(wrong))

    def _violations(self) -> Iterator[str]:
        for each in fields(self):
            found = _violation(getattr(self, each.name), each.type, each.metadata)
            if found:
                yield f"{each.name} = {getattr(self, each.name)!r} must {found}"
        if self.final_learning_rate > self.learning_rate:
            yield f"final_learning_rate = {self.final_learning_rate} is above learning_rate = {self.learning_rate}"


def _violation(value: Any, kind: Any, limits: Any) -> str:
    """Return the requirement that a value does not meet, in words, or "" for a valid value."""
    if "choices" in limits:
        return "" if value in limits["choices"] else f"be {' or '.join(limits['choices'])}"
    least = limits["least"]
    if kind is int:
        return "" if isinstance(value, int) and value >= least else f"be a whole number, at least {least}"
    if "below" in limits:
        return "" if least <= value < limits["below"] else f"lie in [{least}, {limits['below']})"
    if "most" in limits:
        return "" if least <= value <= limits["most"] else f"lie in [{least}, {limits['most']}]"
    return "" if value >= least else "not be negative"
