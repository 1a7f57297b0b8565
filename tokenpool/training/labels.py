"""Which output of a model belongs to which class of a data set."""

import re
from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo, infer_imagenet_subset


def outputs_of(classes: Sequence[str], num_classes: int) -> list[int] | None:
    """For each class of the data the model's output that stands for it; None where output l is class l.

    WordNet ids decide by themselves where the model has as many classes as ImageNet-1k, or as a larger ImageNet that
    timm knows, and all classes of the data are among those. So a part of ImageNet can be measured, such as ImageNet-A,
    ImageNet-R or Imagenette: of the logits those of its classes are taken, and the others are left out.

    Args:
        classes: names of the data's classes; label l is class `classes[l]`.
        num_classes: of the model.

    Returns:
        Numbers of outputs, one for each class of the data.

    Raises:
        ValueError: if model and data do not have as many classes, and WordNet ids do not say which ones are meant; or
            if a few names among WordNet ids of ImageNet are none.
    """
    unknown = ""
    known = _imagenet(num_classes) if all(re.fullmatch(r"n\d{8}", name) for name in classes) else None
    if known:
        others = [name for name in classes if name not in known]
        if not others:
            outputs = [known[name] for name in classes]
            return None if outputs == list(range(num_classes)) else outputs
        shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        unknown = f"; {len(others)} are no classes of the ImageNet with {num_classes}: {shown}"
        if len(classes) == num_classes and 2 * len(others) < len(classes):  # not another thousand, but a mistake
            raise ValueError(f"of the data's classes{unknown.removeprefix(';')}")
    if len(classes) != num_classes:
        raise ValueError(f"the data have {len(classes)} classes, but the model has {num_classes}{unknown}")
    return None


@cache
def _imagenet(num_classes: int) -> dict[str, int] | None:
    """Number of each WordNet id among that many classes; None if timm knows no ImageNet of so many."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())} if subset else None
