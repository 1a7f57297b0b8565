"""Put downsamplers into a model and take them out again."""

import difflib
import inspect
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

import timm
from torch import nn

from tokenpool import hosts, schedules
from tokenpool.blocks import PooledBlocks, Setting
from tokenpool.budget import schedule_for
from tokenpool.downsampling import Downsampler, Host, find

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    downsampler: str | type[Downsampler],
    keep: Sequence[int] | float | str | None = None,
    *,
    gmacs: float | None = None,
    carry: bool = True,
    qk_norm: str | None = None,
    alpha: float = 1.0,
    learn_alpha: bool = False,
    dense: bool = False,
    **options: Any,
) -> Model:
    """Put downsamplers into a model, in place. A model that is already patched is patched anew.

    Patch again after timm's `reset_classifier` or `set_input_size`: this function looks up what the head reads, and
    the grid of patches. Parameter-free methods leave `state_dict()` as it is, key for key.

    Only `model.blocks`, each block and its `attn` are exchanged. All modules inside them (norms, `attn.qkv`,
    `attn.proj`, `mlp`, ...) stay as they are: also adapters such as LoRA, quantised modules, parametrizations, modes
    (training or evaluation), and hooks. `unpatch` and patching anew keep the modules that are there at that time. A
    hook, parameter or `forward` that a user gave to one of the exchanged modules would be lost, and is refused.
    Downsamplers and learned alphas are part of the patch: `unpatch` removes them, and patching anew makes new ones.

    Args:
        model: a model of a family in `tokenpool.hosts`, such as any `timm.models.vision_transformer.VisionTransformer`
            of standard blocks.
        downsampler: a name in `tokenpool.METHODS`, or a subclass of `tokenpool.Downsampler`.
        keep: retention schedule: at most `keep[l]` patch tokens remain after the attention of block l. Other forms:
            0.9, the share that each block keeps; "-13", the number that each block removes; "deit_small:3", the
            paper's schedule of that level, but with at least one token if the head reads patches (see
            `schedules.resolve`). These forms and budgets are resolved at the size that the model is built for.
        gmacs: instead of `keep`, the budget of one image in 10^9 multiply-adds, clustering included. At least 98 % of
            it is used (see `tokenpool.schedule_for`).
        carry: let each token carry its size, the number of original tokens that it stands for, into the next
            attentions: the log of the size is added to the logits of the token's key (appendix E; *proportional
            attention* in Bolya et al. 2023). Without fine-tuning, this makes up for most of the loss in accuracy. It
            has no effect with methods that drop tokens.
        qk_norm: "l2" normalises queries and keys, and uses `alpha` in place of 1 / sqrt(d) (appendix F).
        alpha: see `qk_norm`.
        learn_alpha: make alpha a parameter of each block; this adds the key `blocks.*.attn.alpha`.
        dense: let `forward_features` return all N patches, each with the value of the token that it is in (see
            `unpool`), for dense heads such as segmentation. This needs a method that merges tokens. Models whose own
            head reads patches always get all patches.
        **options: arguments of the downsampler's class, such as `init="random"` for Token Pooling, `at=[3, 6]` for
            convolution, `seed` or `generator` for random selection.

    Returns:
        The same model.

    Raises:
        TypeError: if the model belongs to no supported family. If it wraps a model that does (peft's `PeftModel`,
            `DistributedDataParallel`, the result of `torch.compile`), the message names the model inside.
        ValueError: for an unknown method or option, an unusable `keep`, or a hook that would be lost.
    """
    name, method = find(downsampler)
    adapter = hosts.of(model)
    adapter.check()
    if gmacs is not None:
        if keep is not None:
            raise ValueError(f"keep = {keep!r} and gmacs = {gmacs!r} are two schedules: give one of them")
        keep = schedule_for(gmacs, model, downsampler, dense=dense, **options)
    _check_attention(qk_norm, alpha, learn_alpha)
    if dense and not (method and method.merges):
        raise ValueError(f"dense features need a method that merges tokens; {name!r} does not")
    host = adapter.host(dense)
    if method is None:
        if keep is not None or options:
            raise ValueError('downsampler "none" takes no keep and no options')
        layers: list[Downsampler | None] = [None] * host.depth
    else:
        keep = None if keep is None else _resolved(keep, host)
        try:
            layers = method.for_blocks(host, keep, **options)
        except TypeError as error:
            raise ValueError(f"downsampler {name!r}: {error}") from error

    unpatch(model)
    if method is None and qk_norm is None:
        return model
    setting = Setting(name, None if keep is None else tuple(keep), carry, qk_norm, alpha, learn_alpha, dense, options)
    adapter.pool(layers, setting)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`, in place: the result is the plain model with the weights and submodules that it has now.

    Returns:
        The same model. A model that is not patched stays as it is.

    Raises:
        TypeError: if the model only wraps a patched one, or a block or attention has been replaced.
        ValueError: for a hook that would be lost, see `patch`.
    """
    if any(isinstance(module, PooledBlocks) for module in model.modules()):
        adapter = hosts.of(model)
        adapter.check()
        adapter.unpool()
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` has been applied to the model."""
    adapter = hosts.find(model)
    return adapter is not None and adapter.is_patched


def create_model(
    name: str,
    downsampler: str | type[Downsampler] = "none",
    keep: Sequence[int] | float | str | None = None,
    *,
    gmacs: float | None = None,
    carry: bool = True,
    pretrained: bool = False,
    qk_norm: str | None = None,
    alpha: float = 1.0,
    learn_alpha: bool = False,
    dense: bool = False,
    **options: Any,
) -> nn.Module:
    """Create a model of timm with downsamplers.

    Args:
        name: any model of a supported family that timm knows, also `deit_e252_patch16_224` and
            `deit_e318_patch16_224`.
        downsampler: see `patch`.
        keep: see `patch`.
        gmacs: see `patch`.
        carry: see `patch`. The paper's own models have carry=False: "when the models are trained with Token Pooling
            layers, the carry operation is not important" (appendix E).
        pretrained: load timm's weights.
        qk_norm: see `patch`.
        alpha: see `patch`.
        learn_alpha: see `patch`.
        dense: see `patch`.
        **options: arguments of the downsampler's class (see `patch`); all others go to `timm.create_model`:
            `num_classes`, `img_size`, `drop_path_rate` and so on.

    Raises:
        TypeError: if the model belongs to no supported family.
        ValueError: for an unknown model or method, or an unusable `keep`.
    """
    _, method = find(downsampler)
    if not isinstance(name, str):
        raise ValueError(f"name = {name!r} must be the name of a timm model")
    if not timm.is_model(name.split(".")[0]) and ":" not in name:
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ValueError(f"timm knows no model {name!r}{hint}. timm.list_models('*vit*') lists the names")
    pooling = {option: options.pop(option) for option in _option_names(method) & options.keys()}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"neither {name!r} nor downsampler {downsampler!r} takes these options: {error}") from error
    return patch(
        model,
        downsampler,
        keep,
        gmacs=gmacs,
        carry=carry,
        qk_norm=qk_norm,
        alpha=alpha,
        learn_alpha=learn_alpha,
        dense=dense,
        **pooling,
    )


def _check_attention(qk_norm: str | None, alpha: float, learn_alpha: bool) -> None:
    if qk_norm not in (None, "l2"):
        raise ValueError(f'qk_norm = {qk_norm!r} must be None or "l2"')
    if qk_norm is None and (learn_alpha or alpha != 1.0):
        raise ValueError('alpha and learn_alpha need qk_norm="l2"')
    if not isinstance(alpha, Real) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha = {alpha!r} must be a positive number")


def _resolved(keep: Sequence[int] | float | str, host: Host) -> Sequence[int]:
    """The schedule as a list of numbers of tokens."""
    resolved = schedules.resolve(keep, math.prod(host.grid), host.depth)
    if isinstance(keep, str) and host.reads_patches:  # the paper's schedules end with no patch
        return [max(limit, 1) for limit in resolved]
    return resolved


def _option_names(method: type[Downsampler] | None) -> set[str]:
    if method is None:
        return set()
    names = {*inspect.signature(method.for_blocks).parameters, *inspect.signature(method.__init__).parameters}
    return names - {"self", "host", "keep", "options"}
