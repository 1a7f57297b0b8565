"""The hyper-parameters of a training, in one place.

To add a hyper-parameter, add a field to `Recipe` and use it. The field then is an option of
`python -m experiments train`, a part of every preset and of every stored result.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any


def _field(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help text, and its limits: `least`, `most`, `below`, or `choices`."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, and on which images.

    The metadata of each field holds its `help` text and the values that it may have. The defaults are those of stored
    results that are older than a field.

    Raises:
        ValueError: if a value is out of its range; the message names all of them.
    """

    epochs: int = _field(0, "Epochs of training; 0 to evaluate only.", least=0)
    batch_size: int = _field(32, "Images of one step of the optimiser, over all processes.", least=1)
    learning_rate: float = _field(5e-4, "Of AdamW, at its peak.", least=0)
    warmup_epochs: float = _field(5, "Epochs over which the learning rate rises linearly.", least=0)
    weight_decay: float = _field(0.05, "Of AdamW; biases, norms and embeddings are spared.", least=0)
    label_smoothing: float = _field(0.1, "Of the cross-entropy.", least=0, most=1)
    final_learning_rate: float = _field(0.0, "Learning rate at which the cosine ends.", least=0)
    mixup: float = _field(0.0, "Alpha of mixup's ratio (Zhang et al. 2018); 0: none.", least=0)
    cutmix: float = _field(
        0.0, "Alpha of CutMix's ratio (Yun et al. 2019); 0: none. With mixup, each batch gets one of them.", least=0
    )
    repeats: int = _field(1, "Times that an image comes in a row: repeated augmentation (Hoffer et al. 2020).", least=1)
    ema_decay: float = _field(
        0.0, "Of the moving average of the weights, by step; it is tested beside the model. 0: none.", least=0, below=1
    )
    crop_pct: float = _field(
        0.0, "Share of the resized image that evaluation crops; 0: the model's own in timm.", least=0, most=1
    )
    augmentation: str = _field(
        "deit",
        "Of training images in folders: deit (random crops, RandAugment, erasing), or light (flips and shifts of "
        "images that are decoded once).",
        choices=("deit", "light"),
    )
    train_per_class: int = _field(0, "Train on the first so many images of each class; 0: all.", least=0)
    test_per_class: int = _field(0, "Test on the first so many images of each class; 0: all.", least=0)
    retention_penalty: float = _field(0.0, "Weight lambda of the retention loss, in a search for a schedule.", least=0)
    retention_learning_rate: float = _field(1e-2, "Of the retention weights, at its peak.", least=0)

    def __post_init__(self) -> None:
        wrong = list(self._wrong())
        if wrong:
            raise ValueError("; ".join(wrong))

    def _wrong(self) -> Iterator[str]:
        for each in fields(self):
            found = _refusal(getattr(self, each.name), each.type, each.metadata)
            if found:
                yield f"{each.name} = {getattr(self, each.name)!r} must {found}"
        if self.final_learning_rate > self.learning_rate:
            yield f"final_learning_rate = {self.final_learning_rate} is above learning_rate = {self.learning_rate}"


def _refusal(value: Any, kind: Any, limits: Any) -> str:
    """What a value must be, if it is something else; empty if it is right."""
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
