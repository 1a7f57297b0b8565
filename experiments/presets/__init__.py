"""Presets: what to train, on what, for how long. Each module states command, cost and expected result at its top."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

NAMES = ("digits",)


@dataclass(frozen=True)
class Preset:
    """All choices of a study.

    Attributes:
        name: of the preset.
        data: "digits", or a folder in ImageNet's layout.
        model: name of the timm model.
        base_epochs: of the base model's training (stage 1).
        search_epochs: of each search for a schedule (stage 2).
        finetune_epochs: of each method's fine-tuning (stage 3), and of the base model's (stage 4).
        batch_size: images a batch.
        learning_rate: at its peak, in stages 1, 3 and 4.
        warmup_epochs: of the learning rate.
        label_smoothing: of the cross-entropy.
        weight_decay: of AdamW.
        search_learning_rate: of the network in stage 2.
        retention_learning_rate: of the retention weights in stage 2.
        penalties: the weights lambda of stage 2, ascending; one schedule each. Level i is the i-th.
        full_penalties: the same for the full study.
        methods: fine-tuned with every schedule.
        full_methods: the same for the full study.
        convolutions: placements of the convolutions in the full study, appendix D.
        seeds: of the study; each has its own base model and its own split of the data.
        full_seeds: of the full study.
        model_options: further arguments of the timm model.
    """

    name: str
    data: str
    model: str
    base_epochs: int
    search_epochs: int
    finetune_epochs: int
    batch_size: int
    learning_rate: float
    warmup_epochs: float
    label_smoothing: float
    weight_decay: float
    search_learning_rate: float
    retention_learning_rate: float
    penalties: tuple[float, ...]
    full_penalties: tuple[float, ...]
    methods: tuple[str, ...]
    full_methods: tuple[str, ...]
    convolutions: tuple[tuple[int, ...], ...] = ()
    seeds: tuple[int, ...] = (0,)
    full_seeds: tuple[int, ...] = (0, 1, 2)
    model_options: dict[str, Any] = field(default_factory=dict)


def get(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: if there is none; the message lists those that there are.
    """
    if name not in NAMES:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(NAMES)}")
    return import_module(f"experiments.presets.{name}").PRESET
