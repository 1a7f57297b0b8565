"""Families of models that can be pooled. Each family has an adapter in its own file.

To add a family, write a subclass of `Adapter`, and call `register`. See docs/how-to/new-backbone.md.
"""

from torch import nn

from tokenpool.hosts.adapter import Adapter, Layers
from tokenpool.hosts.huggingface import HuggingFaceViT
from tokenpool.hosts.obstacles import obstacle
from tokenpool.hosts.open_clip import OpenClip
from tokenpool.hosts.timm_eva import TimmEva
from tokenpool.hosts.timm_naflex import TimmNaFlex
from tokenpool.hosts.timm_vit import TimmViT

__all__ = [
    "ADAPTERS",
    "Adapter",
    "HuggingFaceViT",
    "Layers",
    "OpenClip",
    "TimmEva",
    "TimmNaFlex",
    "TimmViT",
    "find",
    "inside",
    "of",
    "register",
    "supported",
    "wrapped_name",
]

ADAPTERS: list[type[Adapter]] = [TimmViT, TimmEva, TimmNaFlex, OpenClip, HuggingFaceViT]


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Add a family of models. `tokenpool.patch` then finds its adapter by `Adapter.fits`.

    Args:
        adapter: the class. It comes before the families of this library.

    Returns:
        The same class, so that `register` can be a decorator.

    Raises:
        TypeError: if the class is not a subclass of `Adapter`, or lacks one of its methods.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise TypeError(f"{adapter!r} must be a subclass of tokenpool.hosts.Adapter")
    if missing := sorted(adapter.__abstractmethods__):
        raise TypeError(f"{adapter.__name__} lacks {', '.join(missing)}: see tokenpool.hosts.Adapter")
    if adapter not in ADAPTERS:
        ADAPTERS.insert(0, adapter)
    return adapter


def supported() -> str:
    """Return the supported families in words."""
    return f"supported are {', '.join(adapter.FAMILY for adapter in ADAPTERS)}"


def find(model: nn.Module) -> Adapter | None:
    """Return the adapter of a model, patched or plain, or None if the model belongs to no family."""
    return next((adapter(model) for adapter in ADAPTERS if adapter.fits(model)), None)


def inside(model: nn.Module) -> tuple[str, Adapter] | None:
    """Find the first module in a model that belongs to a family.

    Args:
        model: a model. It may belong to a family itself; the name is "" then.

    Returns:
        Name of the module in the model, and its adapter. None if there is no such module, and for `features_only`
        models of timm, because the model inside cannot be used alone.
    """
    if type(model).__name__.startswith("FeatureGetter"):
        return None
    found = ((name, find(module)) for name, module in model.named_modules())
    return next(((name, adapter) for name, adapter in found if adapter is not None), None)


def wrapped_name(model: nn.Module) -> str | None:
    """Return the name of the module to pool inside a wrapper, or None if the model is no wrapper of such a module."""
    return (inside(model) or ("", None))[0] or None


def of(model: nn.Module) -> Adapter:
    """Return the adapter of a model, patched or plain.

    Raises:
        TypeError: if the model belongs to no family. The message says why the model cannot be pooled. If the model
            wraps a supported model (peft's `PeftModel`, `DistributedDataParallel`, the result of `torch.compile`), the
            message names the model inside.
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
    raise TypeError(f"{kind} cannot be pooled: {obstacle(model)}; {supported()}")
