"""Families of models that can be pooled: one adapter a family, one file an adapter.

To add a family, write a subclass of `Adapter` in a file of its own and add the class to `ADAPTERS`.
"""

from torch import nn

from tokenpool.hosts.adapter import Adapter, Layers
from tokenpool.hosts.obstacles import obstacle
from tokenpool.hosts.timm_vit import TimmViT

__all__ = ["ADAPTERS", "SUPPORTED", "Adapter", "Layers", "TimmViT", "find", "inside", "of", "wrapped_name"]

ADAPTERS: tuple[type[Adapter], ...] = (TimmViT,)
SUPPORTED = f"supported are {', '.join(adapter.FAMILY for adapter in ADAPTERS)}"


def find(model: nn.Module) -> Adapter | None:
    """Return the adapter of a model, patched or plain; None if the model belongs to no family."""
    return next((adapter(model) for adapter in ADAPTERS if adapter.fits(model)), None)


def inside(model: nn.Module) -> tuple[str, Adapter] | None:
    """Return name and adapter of the first module in a model that belongs to a family; the name of the model is "".

    `features_only` models of timm count as models without such a module: the model inside is not for use on its own.
    """
    if type(model).__name__.startswith("FeatureGetter"):
        return None
    found = ((name, find(module)) for name, module in model.named_modules())
    return next(((name, adapter) for name, adapter in found if adapter is not None), None)


def wrapped_name(model: nn.Module) -> str | None:
    """Return the name of the model to pool in a model that wraps it; None if the model wraps no such model."""
    return (inside(model) or ("", None))[0] or None


def of(model: nn.Module) -> Adapter:
    """Return the adapter of a model, patched or plain.

    Raises:
        TypeError: if the model belongs to no family; the message says why the model cannot be pooled, and names the
            model inside if this model only wraps one (peft's `PeftModel`, `DistributedDataParallel`, the result of
            `torch.compile`).
    """
    adapter = find(model)
    if adapter is not None:
        return adapter
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if inner := inside(model):
        name, adapter = inner
        raise TypeError(
            f"{kind} only wraps the {type(adapter.model).__name__} to pool: call patch and unpatch on its `{name}`, "
            "in place"
        )
    raise TypeError(f"{kind} cannot be pooled: {obstacle(model)}; {SUPPORTED}")
