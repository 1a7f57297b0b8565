"""The model card of a saved model: its method, schedule, cost and preprocessing, how it was made, and its numbers.

The card is the README.md of a repository on the Hugging Face Hub: YAML for the Hub, then Markdown. All numbers are
counted on the model, or come from the JSON file of one run. Numbers of another setting or of other weights are refused.
"""

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import EvalResult, ModelCardData
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tokenpool import budget, flops, hosts
from tokenpool.adoption import reference
from tokenpool.downsampling import METHODS, REGISTRY
from tokenpool.patching import unpatch
from tokenpool.version import __version__

_PAGE = """---
{metadata}
---

# {title}

{summary}

## Use

{snippet}

## Model

| | |
|---|---|
{model}

A cost is the multiply-adds of one image (1 GMAC = 10^9, 1 MMAC = 10^6), counted on this model, clustering included.

## Preprocessing

{preprocessing}

## How it was made

{made}

## Results

{results}

## Limits

{limits}

## Citation

```bibtex
@article{{marin2021token,
  title   = {{Token Pooling in Vision Transformers}},
  author  = {{Marin, Dmitrii and Chang, Jen-Hao Rick and Ranjan, Anurag and Prabhu, Anish and Rastegari, Mohammad and Tuzel, Oncel}},
  journal = {{arXiv preprint arXiv:2110.03860}},
  year    = {{2021}}
}}
```
"""  # noqa: E501 - the list of authors

# Entries of a run's setting that are not hyper-parameters of its training.
_NO_RECIPE = {
    *("stage", "label", "data", "model", "variant", "downsampler", "keep", "budget", "family", "level", "schedule"),
    *("carry", "qk_norm", "alpha", "learn_alpha", "pretrained", "start", "ema", "limit", "part", "options"),
    *("allow_empty_classes", "allow_truncated", "model_options"),
}
_COMPARED = ("downsampler", "keep", "carry", "qk_norm", "alpha", "learn_alpha", "options", "dense", "positions")
_OF_ALL_RUNS = {"dense": False, "positions": "mean"}  # settings that no run has otherwise


def write(
    model: nn.Module,
    folder: Path,
    load: str,
    run: str | Path | None = None,
    command: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Write the text of a model card.

    Args:
        model: model of timm, patched or plain.
        folder: folder of the model. Its name is the title.
        load: Python expression that loads the model.
        run: path of the JSON file of the run that measured this model.
        command: shell command that made the model.
        metadata: further entries of the YAML part, such as license, datasets and base_model.

    Returns:
        Markdown with YAML front matter, as the Hub reads it.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if the file is not a run, or the run has another setting or other weights than the model.
    """
    history = _history(Path(run)) if run is not None else []
    if history:
        _check_same(model, history[0][1], history[0][0])
    given = dict(metadata or {})
    prepared, source = _preprocessing(model, history)
    return _PAGE.format(
        metadata=_metadata(model, folder.name, history, given),
        title=folder.name,
        summary=_summary(model),
        snippet=_fenced("python", _snippet(model, load, prepared)),
        model=_rows(_model_rows(model)),
        preprocessing=f"| | |\n|---|---|\n{_rows(prepared)}\n\nFrom {source}.",
        made=_made(history, command),
        results=_results(history, getattr(model, "num_classes", 0)),
        limits=_limits(history),
    )


def _history(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read a run, and the runs beside it that it started from, the last run first."""
    found: list[tuple[Path, dict[str, Any]]] = []
    while path.is_file() or not found:
        found.append((path, _read(path)))
        start = found[-1][1]["setting"].get("start")
        path = path.parent / f"{start}.json"
        if not start or "/" in start or any(path == one for one, _ in found):
            break
    return found


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no run at {path}: give the JSON file of the run that measured the model")
    try:
        run = json.loads(path.read_text())
        complete = all(isinstance(run[key], dict) for key in ("setting", "metrics", "cost"))
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is not the result of a run: give the JSON file of the run that measured the model")
    lacking = [f"setting.{key}" for key in ("stage", "data", "model") if not isinstance(run["setting"].get(key), str)]
    if run["metrics"].get("top1") is not None and "images" not in run["metrics"]:
        lacking.append("metrics.images")
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: give the JSON file of a run of `train` or `evaluate`")
    return run


def _check_same(model: nn.Module, run: Mapping[str, Any], path: Path) -> None:
    """Check that a run has the setting and the weights of a model."""
    setting = hosts.of(model).setting
    own = {"downsampler": "none"} if setting is None else {name: getattr(setting, name) for name in _COMPARED}
    told = _OF_ALL_RUNS | run["setting"]
    if "keep" in own and told.get("keep") is None and told.get("budget") is not None:
        told["keep"] = _keep_of(told, model)
    for name, value in own.items():
        if name == "carry" and not getattr(METHODS[own["downsampler"]], "merges", True):
            continue  # it has no effect where tokens are dropped
        if json.dumps(value) != json.dumps(told.get(name)):
            raise ValueError(f"{path} is a run of another model: {name} was {told.get(name)!r}, now {value!r}")
    if ":" not in told["model"] and told["model"].partition(".")[0] != _architecture(model):
        raise ValueError(f"{path} is a run of another model: {told['model']}, not {_architecture(model)}")
    before, counted = run["cost"].get("gmacs"), flops.count(model).gmacs
    if before and not math.isclose(before, counted, rel_tol=0.01):
        raise ValueError(f"{path} is a run of another model or image size: {before:.3f} GMACs, now {counted:.3f}")
    _check_weights(model, run, path)


def _keep_of(told: Mapping[str, Any], model: nn.Module) -> list[int]:
    """Schedule of a run that stores a budget only, as the run itself has found it."""
    family, options = told.get("family") or "decay", told.get("options") or {}
    return budget.schedule_for(told["budget"], model, told["downsampler"], family, **options)


def _check_weights(model: nn.Module, run: Mapping[str, Any], path: Path) -> None:
    """Check that the weights of a model are the weights that a run has measured."""
    now, measured = fingerprint(model.state_dict()), _measured_weights(run)
    if measured in (now, _pretrained(model)):
        return
    if not measured:
        raise ValueError(f"{path} does not tell which weights it measured: make the run again, or save without a run")
    raise ValueError(f"{path} is a run of other weights ({measured}, now {now}): load its weights, without conversion")


def _measured_weights(run: Mapping[str, Any]) -> str:
    """Fingerprint or timm's name of the weights that a run has measured; empty if the run does not tell."""
    setting, identity = run["setting"], run.get("identity", {})
    if run.get("trained_weights") or setting.get("epochs"):
        return run.get("trained_weights") or ""
    return identity.get("start_weights" if setting.get("start") else "pretrained_weights") or ""


def _pretrained(model: nn.Module) -> str:
    """Name of timm's pretrained weights for a model, as runs tell it. The content of the weights is not compared."""
    return f"timm {_architecture(model)}.{model.pretrained_cfg.get('tag')}"  # type: ignore[operator, union-attr]


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Fingerprint of weights, as runs tell it: of the content of their safetensors file without metadata."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return hashlib.sha256(safetensors.torch.save(plain)).hexdigest()[:16]


def _architecture(model: nn.Module) -> str:
    return str(model.pretrained_cfg["architecture"])  # type: ignore[index]  # `save` has checked it


def _metadata(model: nn.Module, name: str, history: list[tuple[Path, dict[str, Any]]], given: dict[str, Any]) -> str:
    """The YAML part. The base model and its licence are known only if timm has fetched the weights of a run."""
    classes = getattr(model, "num_classes", 0)
    known: dict[str, Any] = {
        "library_name": "tokenpool",
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
        "tags": ["tokenpool", "token-pooling", "vision-transformer", "timm", "arxiv:2110.03860"],
    }
    config = getattr(model, "pretrained_cfg", None) or {}
    fetched = [str(run.get("identity", {}).get("pretrained_weights", "")) for _, run in history]
    if _pretrained(model) in fetched and config.get("hf_hub_id"):
        known |= {"base_model": config["hf_hub_id"]} | ({"license": config["license"]} if config.get("license") else {})
    if history:
        run = history[0][1]
        data = str(run["setting"]["data"])
        known |= {"datasets": [data.removeprefix("hf:")]} if data.startswith("hf:") else {}
        if (top1 := run["metrics"].get("top1")) is not None:
            known |= {"model_name": name, "metrics": ["accuracy"], "eval_results": [_evaluation(run, top1, classes)]}
    return ModelCardData(**known | given).to_yaml()


def _evaluation(run: Mapping[str, Any], top1: float, classes: int) -> EvalResult:
    name, among = _data_name(run), _among(run, classes)
    return EvalResult(
        task_type="image-classification",
        dataset_type=name,
        dataset_name=name,
        dataset_args={"images": run["metrics"]["images"]} | ({"classes": among} if among else {}),
        metric_type="accuracy",
        metric_name="top-1 (%)",
        metric_value=round(top1, 2),
    )


def _among(run: Mapping[str, Any], classes: int) -> str:
    """Which classes took part in a measurement; empty for all classes of the model."""
    among = run.get("among_classes")
    return f"among {len(among)} of the model's {classes} classes" if among else ""


def _data_name(run: Mapping[str, Any]) -> str:
    """Name of the data set of a run. Of a path, only the last part is told."""
    data = str(run["setting"]["data"])
    return data.removeprefix("hf:") if data.startswith("hf:") else Path(data).name


def _summary(model: nn.Module) -> str:
    setting = hosts.of(model).setting
    base = f"A `{_architecture(model)}` of [timm](https://github.com/huggingface/pytorch-image-models)"
    if setting is None:
        return f"{base}, without token reduction, saved by tokenpool {__version__}."
    method = REGISTRY[setting.downsampler]
    return f"{base} with fewer tokens: {method.description}. Saved by tokenpool {__version__}."


def _model_rows(model: nn.Module) -> dict[str, str]:
    adapter = hosts.of(model)
    setting, shape = adapter.setting, adapter.image_shape
    now, before = flops.count(model), flops.count(unpatch(copy.deepcopy(model)))
    weights = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(reference(model).dtype).removeprefix("torch.")
    rows = {
        "timm model": f"`{_architecture(model)}`",
        "images": f"{shape[0]} x {shape[1]} x {shape[2]}, {math.prod(adapter.grid(shape[1:]))} patches",
        "parameters": f"{weights:,}, {dtype}",
    }
    if setting is None:
        return rows | {"method": "`none`", "cost": _cost(now.gmacs)}
    shown = {key: value for key, value in setting.options.items() if value is not None}
    rows["method"] = f"`{setting.downsampler}`"
    if setting.keep is not None:
        rows["schedule"] = f"`keep={list(setting.keep)}`: patch tokens that remain after the attention of each block"
    rows["carry"] = f"`{setting.carry}`: whether merged tokens have the weight of their patches in later attentions"
    rows["options"] = ", ".join(f"`{key}={value!r}`" for key, value in shown.items()) or "defaults"
    changed = {"qk_norm": None, "alpha": 1.0, "learn_alpha": False, "dense": False, "positions": "mean"}
    for name, default in changed.items():
        if (value := getattr(setting, name)) != default:
            rows[name] = f"`{value!r}`"
    rows["cost"] = f"{_cost(now.gmacs)}, of which clustering {now.clustering_gmacs / now.gmacs:.1%}"
    rows["cost of the plain model"] = f"{_cost(before.gmacs)}; this model: {now.gmacs / before.gmacs:.0%}"
    return rows


def _cost(gmacs: float) -> str:
    return f"{gmacs:.3f} GMACs" if gmacs >= 0.1 else f"{1000 * gmacs:.3f} MMACs"


def _preprocessing(model: nn.Module, history: list[tuple[Path, dict[str, Any]]]) -> tuple[dict[str, Any], str]:
    """What the images of the run became, or else timm's configuration of the model; and which of both it is."""
    if history and (told := json.loads(history[0][1].get("identity", {}).get("preprocessing") or "{}")):
        return told, f"the run `{history[0][0].name}`"
    found = resolve_model_data_config(model) | {"input_size": hosts.of(model).image_shape}
    return json.loads(json.dumps(found)), "timm's configuration of the model"


def _snippet(model: nn.Module, load: str, prepared: dict[str, Any]) -> str:
    arguments = ", ".join(f"{key}={tuple(v) if isinstance(v, list) else v!r}" for key, v in prepared.items())
    mode, width = "RGB" if prepared["input_size"][0] == 3 else "L", getattr(model, "num_classes", 0) or "D"
    dtype = reference(model).dtype
    converted = "" if dtype == torch.float32 else f".to({dtype})"
    return (
        "import tokenpool, torch\nfrom PIL import Image\nfrom timm.data import create_transform\n\n"
        f"model = {load}  # in evaluation mode, with its method\n"
        f"transform = create_transform({arguments})\n"
        f'image = transform(Image.open("photograph.jpg").convert("{mode}")){converted}\n'
        "with torch.inference_mode():\n"
        f"    output = model(image[None])  # (1, {width})"
    )


def _made(history: list[tuple[Path, dict[str, Any]]], command: str) -> str:
    if not history:
        text = "Not recorded: the model was saved without a run. Its weights may be pretrained, trained or random."
    else:
        text = "\n".join(_step(number, *one) for number, one in enumerate(reversed(history), start=1))
    return text + (f"\n\nCommand:\n\n{_fenced('bash', command)}" if command else "")


def _step(number: int, path: Path, run: Mapping[str, Any]) -> str:
    """One run in words: weights to start from, data, hyper-parameters, seed, commit."""
    setting, identity, surroundings = run["setting"], run.get("identity", {}), run.get("environment", {})
    if setting.get("start"):
        start = f"`{Path(setting['start']).name}` ({identity.get('start_weights', 'not identified')})"
    elif setting.get("pretrained"):
        start = f"pretrained weights ({identity.get('pretrained_weights', 'not identified')})"
    else:
        start = "random weights"
    trained = setting.get("epochs")
    recipe = {key: value for key, value in setting.items() if key not in _NO_RECIPE and value not in (None, "", {})}
    parts = [f"{number}. Run `{path.name}` ({setting['stage']}), from {start}"]
    images = identity.get("test_images", "images not identified")
    if trained:
        images = identity.get("train_images", images)  # embedded data have one fingerprint for both parts
    parts.append(f"{'trained' if trained else 'not trained, measured'} on {_data_name(run)} ({images})")
    if trained:
        parts.append("with " + ", ".join(f"{key} {value}" for key, value in recipe.items()))
        parts.append(f"to the weights {run.get('trained_weights', 'not identified')}")
    versions = surroundings.get("versions", {})
    machine = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions)
    parts.append(f"at commit {surroundings.get('commit') or 'not recorded'}" + (f" with {machine}" if machine else ""))
    return "; ".join(parts) + "."


def _results(history: list[tuple[Path, dict[str, Any]]], classes: int) -> str:
    if not history or history[0][1]["metrics"].get("top1") is None:
        return "Not measured."
    path, run = history[0]
    metrics, images = run["metrics"], run.get("identity", {}).get("test_images", "images not identified")
    rows = {"top-1": f"{metrics['top1']:.2f} %"}
    if metrics.get("top1_error") is not None:
        rows["top-1"] += f", standard error {metrics['top1_error']:.2f} (of the finite number of images)"
    if metrics.get("top5") is not None:
        rows["top-5"] = f"{metrics['top5']:.2f} %"
    rows |= {"images": f"{metrics['images']} of {_data_name(run)} ({images})"}
    rows |= {"classes": among} if (among := _among(run, classes)) else {}
    rows |= {"warning": run["warning"]} if run.get("warning") else {}
    rows |= {"run": f"`{path.name}`, seed {run['setting'].get('seed')}, finished {run.get('finished', 'not recorded')}"}
    checked = "The run has the setting and the weights of this model; tokenpool has compared them."
    if _measured_weights(run).startswith("timm "):
        checked = "The run has this model's setting and the name of its weights. Their content was not compared."
    return f"| | |\n|---|---|\n{_rows(rows)}\n\n{checked}"


def _limits(history: list[tuple[Path, dict[str, Any]]]) -> str:
    lines = [
        "- The cost is counted, not timed. The measured speed depends on the machine and the batch size.",
        "- The model reads images of the size above. The limits and biases of its weights and training data remain.",
    ]
    if history and history[0][1]["metrics"].get("top1") is not None:
        lines.insert(0, "- The accuracy holds for one run, one seed and the images above. Other images may differ.")
    return "\n".join(lines)


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in values.items())


def _fenced(language: str, text: str) -> str:
    """A block of code. Its fence is longer than any run of backticks in the code."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"
