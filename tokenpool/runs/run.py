"""One run: its setting, its identity, and the names of its files."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import nn

import tokenpool
from tokenpool import hosts
from tokenpool.analysis import results
from tokenpool.runs.data_sets import DATA, data_set
from tokenpool.training import fingerprint
from tokenpool.training.images import check_no_url, open_images
from tokenpool.training.recipe import Recipe

WEIGHTS = "TOKENPOOL_WEIGHTS"  # names the pretrained weights, so that results hold no path
_CONFIGURING = {"pretrained_cfg", "pretrained_cfg_overlay"}  # of timm.create_model, what changes the configuration
_TITLES = {  # what messages call the parts of an identity
    "test_images": "test images",
    "train_images": "training images",
    "preprocessing": "preprocessing",
    "pretrained_weights": "pretrained weights",
    "start_weights": "weights to start from",
}


@dataclass(frozen=True)
class Run:
    """Everything that the result of a run depends on.

    Attributes:
        stage: "base", "search", "finetune" (section 5, steps 1 to 4), "train", "evaluate" (without fine-tuning),
            "calibration", or one of `measure.MEASURES`.
        label: differs between runs of one stage and seed; part of the names of files.
        data: name of a data set, see `tokenpool.runs.data_sets`; or a folder in ImageNet's layout.
        model: name of the timm model.
        variant: name of the base model in its study, empty for the main one.
        downsampler: name of the method; "soft_selection" in a search.
        keep: retention schedule.
        budget: in 10^9 multiply-adds. Without `keep`, the schedule is the one of `tokenpool.schedule_for`.
        family: of the schedules that may meet it.
        level: number of the schedule, 0 the mildest; None where there is none.
        schedule: where a level's schedule comes from: "lambda0.001", the search with that penalty, or "deit_e252:3",
            the paper's. A level has another schedule in another study.
        start: weights to start from: the name of another run, or a path with a separator; None to start afresh.
        ema: whether a file of weights is asked for their moving average or the raw ones; see `tokenpool.load_weights`.
        recipe: hyper-parameters. In the stored setting its fields stand beside the others, not in a dictionary.
        seed: of everything that is random, except the split into train and test.
        split: of embedded images into train and test.
        limit: evaluate on so many images of a folder only; 0 for all.
        allow_empty_classes: see `tokenpool.training.images.open_images`.
        allow_truncated: see `tokenpool.training.images.load_image`.
        part: "1/2" for the first of two interleaved halves of the images of a folder, and so on; empty for all.
        options: of the downsampler.
        model_options: of the timm model.
        trainer_options: of Lightning's Trainer.
        (carry, qk_norm, alpha and learn_alpha: see `tokenpool.patch`)
    """

    stage: str
    label: str
    data: str
    model: str
    variant: str = ""
    downsampler: str = "none"
    keep: tuple[int, ...] | None = None
    budget: float | None = None
    family: str = "decay"
    level: int | None = None
    schedule: str = ""
    carry: bool = False
    qk_norm: str | None = None
    alpha: float = 1.0
    learn_alpha: bool = False
    pretrained: bool = False
    start: str | None = None
    ema: bool | None = None
    recipe: Recipe = Recipe()
    seed: int = 0
    split: int = 0
    limit: int = 0
    part: str = ""
    allow_empty_classes: bool = False
    allow_truncated: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    trainer_options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return "-".join([self.stage, *([self.label] if self.label else []), f"seed{self.seed}"])

    @property
    def setting(self) -> dict[str, Any]:
        """The run as JSON values. The fields of the recipe stand beside the others."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= value if name == "recipe" else {name: value}
        return flat | {"keep": None if self.keep is None else list(self.keep)}

    @classmethod
    def from_setting(cls, setting: Mapping[str, Any]) -> "Run":
        """The run that a stored setting describes. Keys that an older setting lacks have their defaults.

        Raises:
            TypeError: if the setting has a key that no run has.
            ValueError: if a value of the recipe is out of its range.
        """
        in_recipe = {each.name for each in fields(Recipe)}
        recipe = Recipe(**{name: value for name, value in setting.items() if name in in_recipe})
        others = {name: value for name, value in setting.items() if name not in in_recipe}
        keep = others.get("keep")
        return cls(**others | {"keep": None if keep is None else tuple(keep), "recipe": recipe})


DEFAULTS = Run("", "", "", "").setting


def result_path(run: Run, folder: Path) -> Path:
    """File of the run's result."""
    return folder / f"{run.name}.json"


def weights_path(name: str, folder: Path) -> Path:
    """File of the weights that the run of that name ends with; their moving average is in `name.ema.safetensors`."""
    return folder / "weights" / f"{name}.safetensors"


def checkpoint_path(run: Run, folder: Path) -> Path:
    """File of the state of the run's training, until it is finished."""
    return folder / "checkpoints" / f"{run.name}.ckpt"


def is_finished(run: Run, folder: Path) -> bool:
    """Whether the run's result is there.

    Raises:
        ValueError: if the file is broken, or holds the result of another setting, other images or other weights.
    """
    path = result_path(run, folder)
    if not path.exists():
        return False
    check_stored(run, results.read(path), Identities(folder).of(run), path)
    return True


def check_stored(run: Run, stored: Mapping[str, Any], now: dict[str, str], path: Path) -> None:
    """Compare a run with a stored result or checkpoint.

    Args:
        run: the run.
        stored: what the file holds: "setting" and "identity".
        now: what the run would be made from now, see `Identities.of`.
        path: of the file.

    Raises:
        ValueError: as `check_same` and `check_identity`.
    """
    check_same(run, stored["setting"], path)
    check_identity(run, now, stored.get("identity"), path)


def check_same(run: Run, before: dict[str, Any], path: Path) -> None:
    """Compare a run with the setting that a file holds.

    Raises:
        ValueError: if they differ; the message names the file and the differences.
    """
    # An older file lacks newer keys, which then had their defaults, and the name of the schedule.
    before = DEFAULTS | {"schedule": run.schedule} | before
    differing = [key for key, value in run.setting.items() if plain(before.get(key)) != plain(value)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {run.setting[key]!r}" for key in differing)
        raise ValueError(f"{path} holds another setting ({changes}): choose another name or folder, or delete the file")


def check_identity(run: Run, now: dict[str, str], before: dict[str, str] | None, path: Path) -> None:
    """Compare the images and weights that a run would be made from now with the identity that a file holds.

    Older files without identity pass if nothing came from outside of the package, or if it is not known now.

    Args:
        run: the run.
        now: from `Identities.of`.
        before: the file's "identity"; None for an older file.
        path: of the file.

    Raises:
        ValueError: if they differ, or if the file has no identity and the run uses images or weights from outside.
    """
    before = before or {}
    for key, value in now.items():
        if key not in before and key in _required(run):
            raise ValueError(
                f"{path} does not tell its {_TITLES[key]}, now {value}: it is older than fingerprints. Choose another "
                "folder (--results or --output), or delete the file"
            )
        if before.get(key, value) != value:
            raise ValueError(
                f"{path} was made with other {_TITLES[key]} ({before[key]}, now {value}): choose another folder "
                "(--results or --output) or name, or delete the file"
            )


def _required(run: Run) -> set[str]:
    """Fingerprints that a result needs: without them other images or weights would not be noticed."""
    from_outside = set() if data_set(run.data).embedded else {"test_images", "train_images"}
    from_outside |= {"start_weights"} if is_path(run.start) else set()
    return from_outside | {"pretrained_weights"}


class Identities:
    """Fingerprints of the images and weights that runs are made from. Each is taken once.

    Args:
        folder: of the runs' results.
        named: whether to take the fingerprints of images and weights that variables name now.
    """

    def __init__(self, folder: Path, named: bool = True) -> None:
        self.folder = folder
        self.named = named
        self._taken: dict[Any, str] = {}

    def of(self, run: Run) -> dict[str, str]:
        """The run's identity, as far as it is known now.

        Returns:
            Some of the keys `test_images`, `train_images`, `preprocessing`, `pretrained_weights` and `start_weights`.
            Images and pretrained weights that nothing names now are left out. So are the weights of another run, if
            that run is not finished.

        Raises:
            FileNotFoundError: if images or weights that are named are missing.
            ValueError: if a run's weights are not those that its result tells of.
        """
        options = (run.model, run.recipe.crop_pct, str(run.model_options), run.data)
        prepared = self._once(options, lambda: json.dumps(plain(preprocessing(run)), sort_keys=True))
        return self._images(run) | self._weights(run) | {"preprocessing": prepared}

    def _images(self, run: Run) -> dict[str, str]:
        found = data_set(run.data)
        if not found.is_known or (found.must_be_named and not self.named):
            return {}
        if found.fingerprint is not None:
            return {"test_images": self._once((run.data, run.split), partial(found.fingerprint, run.split))}
        root = image_source(run)
        parts = {"test_images": "val"} | ({"train_images": "train"} if run.recipe.epochs else {})
        allowed = {"allow_empty": run.allow_empty_classes, "allow_truncated": run.allow_truncated}

        def take(part: str) -> str:
            return fingerprint.of_images(open_images(root, part, **allowed))

        return {key: self._once((root, part, *allowed.values()), partial(take, part)) for key, part in parts.items()}

    def _weights(self, run: Run) -> dict[str, str]:
        found = {}
        file = os.environ.get(WEIGHTS) if self.named else None
        if run.pretrained and file:
            found["pretrained_weights"] = self._once(file, lambda: fingerprint.of_weights(file))
        elif run.pretrained and self.named and data_set(run.data).is_known:
            found["pretrained_weights"] = self._once(run.model, lambda: _of_timm(run.model))
        if is_path(run.start):
            found["start_weights"] = self._once(run.start, lambda: fingerprint.of_weights(run.start))
        elif run.start is not None and (ended := self._once(run.start, lambda: self._ended_with(run.start))):
            found["start_weights"] = ended
        return found

    def _ended_with(self, name: str) -> str:
        """Fingerprint of the weights that the run of that name ended with; empty if that is not known."""
        result, weights = self.folder / f"{name}.json", weights_path(name, self.folder)
        told = (results.read_or_none(result) or {}).get("trained_weights", "")
        found = fingerprint.of_weights(weights) if weights.exists() else ""
        if told and found and told != found:
            raise ValueError(
                f"{weights} holds other weights ({found}) than {result} tells of ({told}): delete it, and the run is "
                "made again"
            )
        return told or found

    def _once(self, key: Any, take: Callable[[], str]) -> str:
        if key not in self._taken:
            self._taken[key] = take()
        return self._taken[key]


def is_path(start: str | None) -> bool:
    """Whether the weights to start from are a file, not those of another run."""
    return start is not None and os.sep in start


def _of_timm(model: str) -> str:
    """Identity of the weights that timm fetches for a model: their name, or the content of a local folder."""
    source, colon, rest = model.partition(":")
    if colon and source == "local-dir":
        return fingerprint.of_weights(rest)
    config = timm.get_pretrained_cfg(model)
    return model if config is None else f"timm {config.architecture}.{config.tag}"


def preprocessing(run: Run) -> dict[str, Any]:
    """How the run's images become what its model takes, as JSON values; nothing for embedded images.

    What timm's `resolve_model_data_config` says of the model: `input_size` (C, H, W), `interpolation`, `mean`, `std`,
    `crop_pct` and `crop_mode`. The run's `crop_pct` goes before the model's, and its `img_size` before `input_size`.

    Raises:
        ValueError: if timm knows no such model.
    """
    if data_set(run.data).embedded:
        return {}
    config = timm.get_pretrained_cfg(run.model)
    size = run.model_options.get("img_size")
    if config is None or _CONFIGURING & run.model_options.keys():
        model = empty_model(run)
        found = resolve_model_data_config(model)
        adapter = hosts.of(model)
        if not adapter.is_dynamic:  # the only size that it takes, whatever its configuration says
            size = adapter.image_shape[1:]
    else:
        found = resolve_model_data_config(None, pretrained_cfg=config.to_dict())
    if size:
        found["input_size"] = (found["input_size"][0], *to_2tuple(size))
    if run.recipe.crop_pct:
        found["crop_pct"] = run.recipe.crop_pct
    return plain(found)


def empty_model(run: Run) -> nn.Module:
    """The run's plain model without weights, and without memory for them: for what its size and configuration are."""
    options = {name: value for name, value in run.model_options.items() if name != "checkpoint_path"}
    with torch.device("meta"):
        return tokenpool.create_model(run.model, carry=False, **options)


def image_source(run: Run) -> str:
    """Where the run's images are: a folder, or what `tokenpool.training.images.open_images` takes.

    Raises:
        ValueError: if nothing names them, or a URL does.
    """
    found = data_set(run.data)
    root = os.environ.get(DATA) if found.must_be_named else run.data
    if not root:
        raise ValueError(f"no images: --data or the variable {DATA} must name {found.title}")
    check_no_url(root)  # here, before weights are fetched
    return root


def plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
