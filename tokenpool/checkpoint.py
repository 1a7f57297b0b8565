"""Save and load patched models as safetensors files, with a description of the model as metadata. No pickle."""

import json
import re
import warnings
from collections.abc import Collection, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

from tokenpool import card, files, hosts, weight_files
from tokenpool.adoption import reference
from tokenpool.blocks import Setting
from tokenpool.downsampling import METHODS
from tokenpool.patching import Model, patch
from tokenpool.version import __version__

MODEL_FILE, CARD_FILE = "model.safetensors", "README.md"  # in a folder, as the Hugging Face Hub expects them

_KEY = "tokenpool"


def save(
    model: nn.Module,
    path: str | Path,
    run: str | Path | None = None,
    command: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, patched or plain, for `load`: to one file, or with a model card to a folder.

    A path that ends in `.safetensors` is one file. Any other path is a folder. The folder gets `model.safetensors` and
    the card, `README.md`: method, schedule, cost, preprocessing, how the model was made, and its numbers. The numbers
    come from a run. A model without a run is "not measured". Each file is written atomically.

    All tools that read safetensors can read the weights. With a parameter-free method, the weights have timm's names.
    The metadata contains timm's arguments (`model_options`), but no dropout rates and no hooks. The model must be equal
    to the model that timm builds by its name. So a model with adapters or quantised modules is an error.

    Args:
        model: result of `tokenpool.create_model` or `timm.create_model`.
        path: path of the file or folder.
        run: path of the JSON file of the run that measured this model, for the card. If it lies beside the run that it
            started from, the card also tells of that run.
        command: shell command that made the model, for the card.
        metadata: further entries of the YAML part of the card, such as `license`, `datasets` and `base_model`.

    Raises:
        TypeError: if the model belongs to no supported family.
        FileNotFoundError: if there is no such run.
        ValueError: if `load` could not build the model again: timm does not know the model, the downsampler is not
            registered, or an option is not a JSON value. If the run has another setting or other weights than the
            model. If one file should hold a card.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        folder = path.resolve()
        save_folder(model, folder, f"tokenpool.load({folder.name!r})", run=run, command=command, metadata=metadata)
        return
    if run is not None or command or metadata:
        raise ValueError(f"{path} is one file, without a model card: give the path of a folder, such as {path.stem}")
    _write(model, _describe(model), path)


def save_folder(model: nn.Module, folder: Path, load: str, **about: Any) -> None:
    """Write a model and its card to a folder.

    Args:
        model: see `save`.
        folder: path of the folder.
        load: Python expression in the card that loads the model.
        **about: `run`, `command` and `metadata` of `save`.

    Raises:
        TypeError, FileNotFoundError, ValueError: see `save`. Nothing is written then.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a path that ends in .safetensors, or another folder")
    description = _describe(model)  # first, because a card is for models that can be saved
    text = card.write(model, folder, load, **about)
    _write(model, description, folder / MODEL_FILE)
    with files.atomic_write(folder / CARD_FILE) as temporary:
        temporary.write_text(text)


def _write(model: nn.Module, description: str, path: Path) -> None:
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with files.atomic_write(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata={_KEY: description})


def _describe(model: nn.Module) -> str:
    """Return the description of a model as JSON, and check that `load` can build the model again."""
    if inner := hosts.wrapped_name(model):
        raise ValueError(f"a {type(model).__name__} wraps the model: save its `{inner}`")
    adapter = hosts.of(model)
    if adapter.SAVED_BY:
        raise ValueError(
            f"a {type(model).__name__} is not saved by tokenpool.save: call its {adapter.SAVED_BY}, and restore the "
            "patch by tokenpool.patch_from_config"
        )
    description = {
        "version": __version__,
        "model": _architecture(model),
        "model_options": {name: read(model) for name, read in adapter.OPTIONS.items()},
        "setting": _setting(adapter),
        "dtype": str(reference(model).dtype).removeprefix("torch."),
    }
    try:
        text = json.dumps(description)
    except TypeError as error:
        raise ValueError(f"the model's setting cannot be saved: {error}") from error
    rebuilt = _build(description, empty=True)
    summary = "the model cannot be saved: timm builds a different model for its name and size"
    _check_same_modules(model, rebuilt, summary)
    _check_same_weights(rebuilt, model.state_dict(), summary)
    differing = [pair for pair in zip_longest(_structure(adapter), _structure(hosts.of(rebuilt))) if pair[0] != pair[1]]
    if differing:
        raise ValueError(f"{summary}: {differing[0][1]!r} instead of {differing[0][0]!r}")
    dtypes = sorted({str(value.dtype) for value in model.state_dict().values() if value.is_floating_point()})
    if len(dtypes) > 1:
        raise ValueError(f"the model cannot be saved: its weights are of {' and '.join(dtypes)}; convert all to one")
    return text


def load(path: str | Path) -> nn.Module:
    """Read a model from a file or folder of `save`, patched or plain as it was saved.

    Args:
        path: path of the file or folder.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file was not written by `save`, or is damaged. The message names the file.
    """
    path = Path(path)
    files.check_local(path)
    if path.is_dir():
        path = path / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}: give a file or a folder of tokenpool.save")
    try:
        with safetensors.safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {})[_KEY])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is not iterable
    except KeyError as error:
        raise ValueError(f"{path} was not written by tokenpool.save: use load_weights to read weights only") from error
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


def load_weights(model: nn.Module, path: str | Path, other_classes: bool = False, ema: bool | None = None) -> None:
    """Load weights into a model from a safetensors file, or from a `.pth` or `.ckpt` file of `torch.save`.

    No code in the file is executed. A common prefix of the names, such as `module.`, `_orig_mod.`, `model.` or
    `backbone.`, is removed if the names then match the model. Names of formats that timm converts (DINOv2, CLIP,
    DeiT-3, ...) are converted. Position and patch embeddings of another size are resampled, as in timm. A warning
    describes each change.

    Parameters of downsamplers and learned alphas may be missing in the file. The model then keeps its initial values.
    Retention weights in the file are ignored if the model has no such weights.

    Args:
        model: a timm model, patched or plain.
        path: path of the file.
        other_classes: ignore a classifier for another number of classes. The model keeps its own classifier.
        ema: which weights to load from a file with both the moving average of the weights and the raw weights
            (`state_dict_ema` and `state_dict`, `model_ema` and `model`, `ema.` and `model.` in this project's `.ckpt`).
            True loads the moving average, False the raw weights. None loads the moving average, as timm does, and a
            warning says so.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, or has the weights of another model. The message names the file and a
            key, and gives the reason.
    """
    path = Path(path)
    files.check_local(path)
    if inner := hosts.wrapped_name(model):
        raise ValueError(f"a {type(model).__name__} wraps the model: load the weights into its `{inner}`")
    if (adapter := hosts.find(model)) and adapter.SAVED_BY:
        raise ValueError(f"load the weights of a {type(model).__name__} by its from_pretrained, not by load_weights")
    content = weight_files.read(path)
    own, classifiers = model.state_dict(), _classifiers(model)
    optional = {key for key in own if ".downsampler." in key or key.endswith("attn.alpha")}
    optional |= {key for key in own if other_classes and key in classifiers}
    fitting, nearest = weight_files.find(content, model, [key for key in own if key not in optional])
    if nearest is None:
        raise ValueError(f"cannot read weights {path}: it holds no named tensors")
    found, notes = weight_files.choose(fitting, ema, path) if fitting else (nearest, [])
    state = {key: value for key, value in found.weights.items() if key in own or not key.endswith(".retention")}
    if other_classes:
        state = {
            key: value
            for key, value in state.items()
            if key not in classifiers or (key in own and value.shape == own[key].shape)
        }
    _check_same_weights(model, state, f"{path} holds the weights of another model", optional, with_hint=True)
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be loaded into this model: {reason}") from error
    if notes:
        warnings.warn(f"{path}: {'; '.join(notes)}", stacklevel=2)


def patch_from_config(model: Model) -> Model:
    """Patch a model of transformers as it was patched when `save_pretrained` saved it, in place.

    `patch` writes its setting to `model.config.tokenpool`, `save_pretrained` writes the configuration to a file, and
    `from_pretrained` reads it. But `from_pretrained` returns the plain model: it is not patched until this function is
    called. `unpatch` removes the setting. Models that share one configuration object share the setting.

    Args:
        model: result of `from_pretrained`.

    Returns:
        The same model.

    Raises:
        TypeError: if the model belongs to no supported family.
        ValueError: if the configuration has no usable setting.
    """
    hosts.of(model)
    stored = getattr(getattr(model, "config", None), _KEY, None)
    if stored is None:
        raise ValueError(
            "the configuration of the model has no setting of tokenpool. The model was saved plain, or its patch had "
            "parameters, a method or options that a configuration cannot hold: call tokenpool.patch"
        )
    if (
        not isinstance(stored, dict)
        or not set(stored) <= set(Setting.__dataclass_fields__)
        or "downsampler" not in stored
    ):
        raise ValueError(
            f"config.{_KEY} = {stored!r} is not a setting of tokenpool {__version__}: call tokenpool.patch"
        )
    return _patched(model, stored)


def _patched(model: Model, setting: dict[str, Any]) -> Model:
    arguments = {name: value for name, value in setting.items() if name != "options"}
    return patch(model, **setting.get("options", {}), **arguments)  # all options go to the downsampler


def _classifiers(model: nn.Module) -> frozenset[str]:
    return (hosts.find(model) or hosts.Adapter).CLASSIFIERS


def _architecture(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture", "")
    if not timm.is_model(name):
        raise ValueError(f"a {type(model).__name__} cannot be saved: create the model by timm.create_model")
    tag = config.get("tag")
    return f"{name}.{tag}" if tag and timm.is_model_pretrained(f"{name}.{tag}") else name


def _check_description(description: Any) -> None:
    """Check the metadata of a file. Only known keys are allowed, because some timm arguments open other files."""
    keys = {"version", "model", "model_options", "setting", "dtype"}
    if not isinstance(description, dict) or set(description) != keys:
        raise ValueError(f"expected {', '.join(sorted(keys))} in its metadata")
    unknown = set(description["model_options"]).difference(*(adapter.OPTIONS for adapter in hosts.ADAPTERS))
    unknown |= set(description["setting"] or ()) - set(Setting.__dataclass_fields__)
    if unknown or not timm.is_model(str(description["model"]).split(".")[0]) or ":" in description["model"]:
        raise ValueError(f"unknown model {description['model']!r} or options {', '.join(sorted(unknown))}")
    if description["dtype"] not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"unknown dtype {description['dtype']!r}")


def _structure(adapter: hosts.Adapter) -> list[str]:
    """Return as text all properties that determine the logits, besides the weights. Dropout is not included."""
    lines = str(adapter.model).splitlines()
    return adapter.identity() + [line.strip() for line in lines if "drop" not in line.split(":")[0]]


def _setting(adapter: hosts.Adapter) -> dict[str, Any] | None:
    setting = adapter.setting
    if setting is None:
        return None
    if setting.downsampler not in METHODS:
        raise ValueError(
            f"downsampler {setting.downsampler} is not one of {', '.join(METHODS)} and cannot be saved: add it by "
            "tokenpool.downsampling.register first"
        )
    return setting.arguments()


def _build(description: dict[str, Any], empty: bool) -> nn.Module:
    """Build the described model. With `empty`, no memory is allocated for its weights."""
    with torch.device("meta" if empty else "cpu"):
        model = timm.create_model(description["model"], pretrained=False, **description["model_options"])
        return _patched(model, description["setting"] or {"downsampler": "none"})


def _check_same_modules(model: nn.Module, rebuilt: nn.Module, summary: str) -> None:
    own = dict(model.named_modules())
    for name, module in rebuilt.named_modules():
        if "drop" not in name and type(own.get(name)) is not type(module):
            kind = f"{type(own[name]).__module__}.{type(own[name]).__qualname__}" if name in own else "nothing"
            raise ValueError(
                f"{summary}: {name} is {kind}, not {type(module).__qualname__}. Merge adapters first (peft: "
                "merge_and_unload); save models with quantised or other modules by torch.save"
            )
    for key, value in model.state_dict().items():
        if type(value) is not torch.Tensor:
            raise ValueError(f"{summary}: {key} is a {type(value).__qualname__}. Save quantised models by torch.save")


def _check_same_weights(
    model: nn.Module, state: dict[str, Any], summary: str, optional: Collection[str] = (), with_hint: bool = False
) -> None:
    own = model.state_dict()
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing = [key for key in own if key not in state and key not in optional]
    unexpected = [key for key in state if key not in own]
    if wrong or missing or unexpected:
        key = (wrong + missing + unexpected)[0]
        shapes = f", {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" if wrong else ""
        advice = _hint(model, missing, unexpected, wrong) if with_hint else ""
        raise ValueError(
            f"{summary}: {len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape, "
            f"for example {key!r}{shapes}{advice}"
        )


# Advice for keys that do not match: a pattern of keys, where these keys are ("file" or "model" only), and the advice.
_HINTS = (
    ("dist_token|head_dist", "file", "the weights are of a distilled model: create a model deit_..._distilled_..."),
    ("dist_token|head_dist", "model", "the model is distilled, but the weights are not: create the plain model"),
    (r"encoder\.layer\.\d|patch_embeddings\.", "file", "the names are of Hugging Face's transformers: get timm's"
     " weights by timm.create_model(..., pretrained=True), or from the hub under timm/"),
    ("lora_|base_layer|hada_|ia3_", "file", "the file has adapters: merge them first (peft: merge_and_unload)"),
    (r"lora_|base_layer|_packed_params|parametrizations\.|weight_[gv]$", "model", "load weights before you add"
     " adapters, quantisation or parametrizations"),
)  # fmt: skip


def _hint(model: nn.Module, missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    for pattern, where, advice in _HINTS:
        keys = unexpected if where == "file" else missing
        if found := next((key for key in keys if re.search(pattern, key)), None):
            return f" ({found!r}: {advice})"
    is_classifier = _classifiers(model).issuperset([*missing, *unexpected, *wrong])
    return " (other_classes=True ignores the classifier)" if is_classifier else ""
