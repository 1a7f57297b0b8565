"""The output of a model for each class of a data set."""

import re
from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo, infer_imagenet_subset


def outputs_of(classes: Sequence[str], num_classes: int) -> list[int] | None:
    """Find the output of a model for each class of a data set.

    WordNet ids determine the outputs if the model has as many classes as ImageNet-1k, or as a larger ImageNet that timm
    knows, and if all classes of the data are classes of this ImageNet. So a model can be tested on a part of ImageNet,
    such as ImageNet-A, ImageNet-R or Imagenette. The logits of other classes are ignored.

    Args:
        classes: names of the classes of the data. Label l is class `classes[l]`.
        num_classes: number of classes of the model.

    Returns:
        The index of the output for each class of the data, or None if output l is class l.

    Raises:
        ValueError: if model and data have different numbers of classes, and WordNet ids do not determine the outputs.
            Also if most names are WordNet ids of ImageNet, but some are not.
    """
    unknown = ""
    known = _imagenet(num_classes) if all(re.fullmatch(r"n\d{8}", name) for name in classes) else None
    if known:
        others = [name for name in classes if name not in known]
        if not others:
            outputs = [known[name] for name in classes]
            return None if outputs == list(range(num_classes)) else outputs
        shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        unknown = f"{len(others)} classes of the data are not in the ImageNet with {num_classes} classes: {shown}"
        if len(classes) == num_classes and 2 * len(others) < len(classes):  # a mistake, not another set of classes
            raise ValueError(unknown)
    if len(classes) != num_classes:
        reason = f"; {unknown}" if unknown else ""
        raise ValueError(f"the data have {len(classes)} classes, but the model has {num_classes}{reason}")
    return None


@cache
def _imagenet(num_classes: int) -> dict[str, int] | None:
    """Return the index of each WordNet id, or None if timm knows no ImageNet with this number of classes."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())} if subset else None
