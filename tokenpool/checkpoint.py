"""Patched models as files: safetensors, with all that is needed to build the model again as metadata. No pickle."""

import argparse
import json
import math
import pickle
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenpool import files
from tokenpool.downsampling import METHODS
from tokenpool.version import __version__
from tokenpool.vit import Setting, is_patched, patch

_KEY = "tokenpool"
# timm's arguments that users change, read back from the model.
_OPTIONS: dict[str, Callable[[VisionTransformer], Any]] = {
    "img_size": lambda model: list(model.patch_embed.img_size),
    "patch_size": lambda model: list(model.patch_embed.patch_size),
    "in_chans": lambda model: model.in_chans,
    "num_classes": lambda model: model.num_classes,
    "global_pool": lambda model: model.global_pool,
    "embed_dim": lambda model: model.embed_dim,
    "depth": lambda model: len(model.blocks),
    "num_heads": lambda model: model.blocks[0].attn.num_heads,
    "dynamic_img_size": lambda model: model.dynamic_img_size,
    "dynamic_img_pad": lambda model: model.patch_embed.dynamic_img_pad,
    "class_token": lambda model: model.cls_token is not None,
    "reg_tokens": lambda model: model.num_reg_tokens,
    "pool_include_prefix": lambda model: model.pool_include_prefix,
}


def save(model: VisionTransformer, path: str | Path) -> None:
    """Write a model, patched or plain, so that `load` can build it again.

    Any tool that reads safetensors can read the weights; those of a parameter-free method are timm's own. Of timm's
    arguments those in `model_options` of the metadata are kept; rates of dropout are not, and a model that differs
    otherwise from what its name stands for is refused.

    Args:
        model: made by `tokenpool.create_model` or `timm.create_model`.
        path: of the file to write, atomically.

    Raises:
        ValueError: if the model could not be built again: one that timm does not know, or a downsampler or option that
            is no name or plain value.
    """
    description = {
        "version": __version__,
        "model": _architecture(model),
        "model_options": {name: read(model) for name, read in _OPTIONS.items()},
        "setting": _setting(model),
        "dtype": str(model.blocks[0].attn.qkv.weight.dtype).removeprefix("torch."),
    }
    try:
        text = json.dumps(description)
    except TypeError as error:
        raise ValueError(f"the model's setting cannot be saved: {error}") from error
    rebuilt, complaint = _build(description, empty=True), "the model cannot be saved: timm builds another one"
    _check_same_weights(rebuilt, model.state_dict(), f"{complaint} by its name and size")
    differing = [pair for pair in zip_longest(_structure(model), _structure(rebuilt)) if pair[0] != pair[1]]
    if differing:
        raise ValueError(f"{complaint} by its name and size: {differing[0][1]!r} in place of {differing[0][0]!r}")
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with files.whole(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata={_KEY: text})


def load(path: str | Path) -> VisionTransformer:
    """The model that `save` has written, patched as it was, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file was not written by `save`, or is damaged; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {})[_KEY])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    except KeyError as error:
        raise ValueError(f"{path} was not written by tokenpool.save; load_weights reads weights alone") from error
    except Exception as error:
        raise ValueError(f"cannot read model {path}: {error}") from error
    try:
        _check_description(description)
        model = _build(description, empty=False)
        model = model.to(getattr(torch, description["dtype"]))
    except Exception as error:
        raise ValueError(f"cannot build the model that {path} describes: {error}") from error
    _check_same_weights(model, state, f"{path} does not fit its own description")
    model.load_state_dict(state)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path, other_classes: bool = False) -> None:
    """Load weights into a model: safetensors, or a `.pth` checkpoint of tensors only (`weights_only=True`).

    Position embeddings for images of another size are interpolated, as timm does for its own weights.
    Parameters of downsamplers and learned alphas may be missing: they start anew. Retention weights in the file are
    left out where the model has none.

    Args:
        model: that timm has made, patched or not.
        path: of the file.
        other_classes: leave out a classifier for another number of classes, which then starts anew.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read or is of another model; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if _is_safetensors(path):
            state = safetensors.torch.load_file(path)
        else:
            # timm's training script stores its arguments, too, which is harmless.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model", state.get("state_dict", state))
        state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    except pickle.UnpicklingError as error:
        raise ValueError(f"cannot read weights {path}: damaged, or more than tensors, which could run code") from error
    except Exception as error:
        raise ValueError(f"cannot read weights {path}: {error}") from error
    own = model.state_dict()
    state = _resampled(state, model)
    state = {key: value for key, value in state.items() if key in own or not key.endswith(".retention")}
    may_miss = [key for key in own if ".downsampler." in key or key.endswith("attn.alpha")]
    if other_classes:
        heads = {f"{name}.{part}" for name in ("head", "head_dist") for part in ("weight", "bias")}
        state = {key: value for key, value in state.items() if key not in heads or value.shape == own[key].shape}
        may_miss += heads - set(state)
    _check_same_weights(model, state, f"{path} holds the weights of another model", may_miss)
    model.load_state_dict(state, strict=False)


def _resampled(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Weights whose position embeddings fit the model's grid, by timm's interpolation; both grids square."""
    embeddings, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if embeddings is None or own is None or embeddings.dim() != 3 or embeddings.shape[1] == own.shape[1]:
        return state
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    if math.isqrt(embeddings.shape[1] - prefix) ** 2 != embeddings.shape[1] - prefix:
        return state  # of another model
    grid = list(model.patch_embed.grid_size)
    return state | {"pos_embed": resample_abs_pos_embed(embeddings, grid, num_prefix_tokens=prefix)}


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _architecture(model: VisionTransformer) -> str:
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    if not timm.is_model(name):
        raise ValueError(f"a {type(model).__name__} that timm.create_model has not made cannot be saved")
    tag = model.pretrained_cfg.get("tag")
    return f"{name}.{tag}" if tag and timm.is_model_pretrained(f"{name}.{tag}") else name


def _check_description(description: Any) -> None:
    """A file may say which model to build, and no more: timm would open any other file that an argument names."""
    keys = {"version", "model", "model_options", "setting", "dtype"}
    if not isinstance(description, dict) or set(description) != keys:
        raise ValueError(f"expected {', '.join(sorted(keys))} in its metadata")
    unknown = set(description["model_options"]) - set(_OPTIONS)
    unknown |= set(description["setting"] or ()) - set(Setting.__dataclass_fields__)
    if unknown or not timm.is_model(str(description["model"]).split(".")[0]) or ":" in description["model"]:
        raise ValueError(f"unknown model {description['model']!r} or options {', '.join(sorted(unknown))}")
    if description["dtype"] not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"unknown dtype {description['dtype']!r}")


def _structure(model: VisionTransformer) -> list[str]:
    """What decides the logits beside the weights, as text; dropout does not."""
    names = ("num_prefix_tokens", "pool_include_prefix", "no_embed_class", "has_class_token")
    attributes = [f"{name} = {getattr(model, name, None)}" for name in names]
    return attributes + [line.strip() for line in str(model).splitlines() if "drop" not in line.split(":")[0]]


def _setting(model: VisionTransformer) -> dict[str, Any] | None:
    if not is_patched(model):
        return None
    setting = model.blocks.setting
    if setting.downsampler not in METHODS:
        raise ValueError(
            f"downsampler {setting.downsampler} is none of {', '.join(METHODS)}: it cannot be saved by name"
        )
    keep = None if setting.keep is None else list(setting.keep)
    return vars(setting) | {"keep": keep}


def _build(description: dict[str, Any], empty: bool) -> VisionTransformer:
    """The model that a description is of; `empty`, without memory for its weights."""
    with torch.device("meta" if empty else "cpu"):
        model = timm.create_model(description["model"], pretrained=False, **description["model_options"])
        setting = dict(description["setting"] or {"downsampler": "none"})
        return patch(model, **setting.pop("options", {}), **setting)  # whose options reach the downsampler alone


def _check_same_weights(model: nn.Module, state: dict[str, Any], complaint: str, may_miss: list[str] = ()) -> None:
    own = model.state_dict()
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing = [key for key in own if key not in state and key not in may_miss]
    unexpected = [key for key in state if key not in own]
    if wrong or missing or unexpected:
        raise ValueError(
            f"{complaint}: {len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape, "
            f"for instance {(wrong + missing + unexpected)[0]!r}"
        )
