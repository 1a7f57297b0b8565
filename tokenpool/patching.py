"""Put downsamplers into a model, and remove them again."""

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
from tokenpool.downsampling import Downsampler, find
from tokenpool.positions import POSITIONS

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
    positions: str = "mean",
    **options: Any,
) -> Model:
    """Put downsamplers into a model, in place. A model that is already patched is patched anew.

    Patch again after timm's `reset_classifier` or `set_input_size`, because the patch depends on the grid of patches
    and on the tokens that the head reads. Parameter-free methods do not change the keys of `state_dict()`.

    `patch` replaces `model.blocks`, each block, and the block's `attn`. All modules inside them (norms, `attn.qkv`,
    `attn.proj`, `mlp`, ...) stay the same objects. So adapters such as LoRA, quantised modules, parametrizations,
    modes (training or evaluation) and hooks in them stay, too. A replaced module would lose a hook, a parameter or a
    `forward` that a user has given to it. `patch` then raises an error. Downsamplers and learned alphas belong to the
    patch: `unpatch` removes them, and a second `patch` makes new ones.

    Args:
        model: a model of a family in `tokenpool.hosts`, such as any `timm.models.vision_transformer.VisionTransformer`
            of standard blocks.
        downsampler: a name in `tokenpool.METHODS`, or a subclass of `tokenpool.Downsampler`.
        keep: retention schedule: at most `keep[l]` patch tokens remain after the attention of block l. Other forms:
            0.9, the share that each block keeps; "-13", the number that each block removes; "deit_small:3", the
            paper's schedule of that level, but with at least one token if the head reads patches (see
            `schedules.resolve`). These forms are resolved at the model's own image size. Models for images of any size
            (NaFlexVit, `dynamic_img_size=True`) resolve them for the number of patches of each image, and a list is
            the same for all images.
        gmacs: instead of `keep`, the budget of one image in 10^9 multiply-adds, clustering included. The model uses
            at least 98 % of the budget (see `tokenpool.schedule_for`). The result is a list for the model's own image
            size.
        carry: add the log of a token's size to the logits of the token's key in later attentions (appendix E;
            *proportional attention* in Bolya et al. 2023). The size of a token is the number of original tokens that
            it stands for. Without fine-tuning, `carry` recovers most of the lost accuracy. It has no effect with
            methods that drop tokens.
        qk_norm: "l2" normalises queries and keys, and uses `alpha` in place of 1 / sqrt(d) (appendix F).
        alpha: the scalar alpha > 0 of equation (6), for `qk_norm="l2"`.
        learn_alpha: make alpha a parameter of each block; this adds the key `blocks.*.attn.alpha`.
        dense: let `forward_features` return all N patches, for dense heads such as segmentation. Each patch has the
            value of its token (see `unpool`). This needs a method that merges tokens. Models whose own head reads
            patches always get all patches.
        positions: the rotary position of a merged token, for models with rotary positions (DINOv3, EVA-02, ...).
            "mean": the mean of the sines and cosines of its patches. "medoid": the position of one patch, which was
            the most similar to the merged token. The default is better for scattered clusters, see
            docs/reference/backbones.md.
        **options: arguments of the downsampler's class, such as `init="random"` for Token Pooling, `at=[3, 6]` for
            convolution, `seed` or `generator` for random selection.

    Returns:
        The same model.

    Raises:
        TypeError: if the model belongs to no supported family. If it wraps a supported model (peft's `PeftModel`,
            `DistributedDataParallel`, the result of `torch.compile`), the message names the model inside.
        ValueError: for an unknown method or option, an unusable `keep`, or a hook that would be lost.
    """
    name, method = find(downsampler)
    adapter = hosts.of(model)
    adapter.check()
    if positions not in POSITIONS or (positions != "mean" and not adapter.is_rotary):
        known = " or ".join(map(repr, POSITIONS)) if adapter.is_rotary else "'mean': the model has no rotary positions"
        raise ValueError(f"positions = {positions!r} must be {known}")
    if gmacs is not None:
        if keep is not None:
            raise ValueError(f"keep = {keep!r} and gmacs = {gmacs!r} are two schedules: give one of them")
        keep = schedule_for(gmacs, model, downsampler, dense=dense, positions=positions, **options)
    _check_attention(qk_norm, alpha, learn_alpha)
    if dense and not (method and method.merges):
        raise ValueError(f"dense features need a method that merges tokens; {name!r} does not")
    host = adapter.host(dense)
    form: float | str | None = None
    if method is None:
        if keep is not None or options:
            raise ValueError('downsampler "none" takes no keep and no options')
        layers: list[Downsampler | None] = [None] * host.depth
    else:
        if host.is_dynamic and isinstance(keep, (str, Real)):  # `resolve` refuses a whole number
            form = keep if isinstance(keep, str) else float(keep)
        if keep is not None:
            keep = schedules.resolve(keep, math.prod(host.grid), host.depth, int(host.reads_patches))
        try:
            layers = method.for_blocks(host, keep, **options)
        except TypeError as error:
            raise ValueError(f"downsampler {name!r}: {error}") from error

    unpatch(model)
    if method is None and qk_norm is None:
        return model
    carry = carry or bool(method and method.masks)  # the masks of training are sizes
    schedule = None if keep is None else tuple(keep)
    setting = Setting(name, schedule, carry, qk_norm, alpha, learn_alpha, dense, options, positions, form)
    adapter.pool(layers, setting)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`, in place. The plain model keeps the weights and submodules of the patched model.

    Args:
        model: a patched model. A plain model stays as it is.

    Returns:
        The same model.

    Raises:
        TypeError: if the model only wraps a patched model, or if a block or an attention has been replaced.
        ValueError: for a hook that would be lost, see `patch`.
    """
    if any(isinstance(module, PooledBlocks) for module in model.modules()):
        adapter = hosts.of(model)
        adapter.check()
        adapter.unpool()
    elif plain := hosts.find(model):
        plain.record(None)
    return model


def is_patched(model: nn.Module) -> bool:
    """Return whether `patch` has been applied to the model."""
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
    positions: str = "mean",
    **options: Any,
) -> nn.Module:
    """Create a timm model with downsamplers.

    Args:
        name: name of a timm model of a supported family. `deit_e252_patch16_224` and `deit_e318_patch16_224` are
            registered with timm, too.
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
        positions: see `patch`.
        **options: arguments of the downsampler's class (see `patch`). All other options go to `timm.create_model`:
            `num_classes`, `img_size`, `drop_path_rate` and so on.

    Returns:
        The patched model, in training mode, as timm creates it.

    Raises:
        TypeError: if the model belongs to no supported family.
        ValueError: for an unknown model or method, or an unusable `keep`.
        OSError: if timm cannot download the weights.
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
    except OSError as error:  # of a download
        raise OSError(
            f"timm cannot load the weights of {name!r}: connect to the network, or read a file by "
            "tokenpool.load_weights (--weights FILE on the command line)"
        ) from error
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
        positions=positions,
        **pooling,
    )


def _check_attention(qk_norm: str | None, alpha: float, learn_alpha: bool) -> None:
    if qk_norm not in (None, "l2"):
        raise ValueError(f'qk_norm = {qk_norm!r} must be None or "l2"')
    if qk_norm is None and (learn_alpha or alpha != 1.0):
        raise ValueError('alpha and learn_alpha need qk_norm="l2"')
    if not isinstance(alpha, Real) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha = {alpha!r} must be a positive number")


def _option_names(method: type[Downsampler] | None) -> set[str]:
    if method is None:
        return set()
    names = {*inspect.signature(method.for_blocks).parameters, *inspect.signature(method.__init__).parameters}
    return names - {"self", "host", "keep", "options"}
