"""One run: setting in, weights and one JSON file out. Finished runs are skipped, interrupted ones go on."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from torch import Tensor, nn

import tokenpool
from tokenpool import files, flops
from tokenpool.analysis import bits, results
from tokenpool.runs import loggers, schedule_search, trainer
from tokenpool.runs.data_sets import AUGMENTATIONS, data_set
from tokenpool.runs.environment import environment
from tokenpool.runs.measure import MEASURES
from tokenpool.runs.record import Record
from tokenpool.runs.run import (
    WEIGHTS,
    Identities,
    Run,
    checkpoint_path,
    image_source,
    is_path,
    preprocessing,
    result_path,
    weights_path,
)
from tokenpool.training import fingerprint, soft_selection
from tokenpool.training.callbacks import ReconstructionErrorCallback
from tokenpool.training.interruption import InterruptibleCheckpoint, recorded_signals
from tokenpool.training.labels import outputs_of
from tokenpool.training.module import ClassificationModule

ENOUGH_IMAGES = 30  # to say that an accuracy is no better than a guess
WORKERS, MINUTES = "TOKENPOOL_WORKERS", "TOKENPOOL_MINUTES"  # results do not depend on them

# Warnings of Lightning and PyTorch that do not apply.
_IRRELEVANT = (
    "does not have many workers",  # the data lie in memory, or the user has chosen
    "number of training batches",
    "it is recommended to use `Trainer.devices=1",  # in evaluation; our samplers share out the images exactly
    "It is recommended to use `self.log.*sync_dist=True",  # they are, before they are logged
    "in eval mode at the start of training",  # the moving average of the weights
    "`srun` command is available",
    "Grad strides do not match bucket view strides",  # of one small parameter
    "`isinstance.treespec, LeafSpec.` is deprecated",
)


def execute(
    run: Run,
    folder: Path,
    on_epoch: Callable[[], None] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train (if it has epochs) and test one run; write its weights, then its result.

    Training goes on from the last checkpoint, where an interrupted run has left one.

    Args:
        run: the setting.
        folder: for results; weights, checkpoints and logs go into sub-folders.
        on_epoch: called after each epoch of training.
        progress: show Lightning's progress bar.

    Returns:
        What the JSON file holds.
    """
    path = result_path(run, folder)
    record = Record(run, prints=not progress and not parent_process())
    surroundings = environment()
    identity = Identities(folder).of(run)
    seed_everything(run.seed, verbose=False)
    data = data_module(run)
    model = build_model(run, folder)
    data.setup("test")
    outputs = outputs_of(data.classes, model.num_classes)
    module = training_module(run, model, outputs)
    device, is_first = "cuda" if torch.cuda.is_available() else "cpu", True
    if run.stage in MEASURES:
        metrics = MEASURES[run.stage](model.to(device).eval(), data)
    elif run.stage == schedule_search.STAGE:
        metrics = schedule_search.measure_calibration(model.to(device).eval(), data, run, folder)
    else:
        metrics, is_first = _train_and_test(run, module, data, folder, identity, record, on_epoch, progress)
    outcome = {
        "setting": run.setting,
        "identity": identity,
        "metrics": metrics,
        "cost": _cost(model),
        "seconds": record.seconds,
        **record.training(),
        **_restriction(outputs, model.num_classes),
        **_doubts(run, metrics, len(data.classes)),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": surroundings,
    }
    if is_first:
        if run.recipe.epochs:
            outcome["trained_weights"] = save_weights(model, weights_path(run.name, folder), _ended_before(path))
            if module.ema is not None:
                save_weights(module.ema.module, weights_path(f"{run.name}.ema", folder))
        results.save(outcome, path)  # last, because a run is finished when this file exists
        files.delete(checkpoint_path(run, folder))
    return outcome


def training_module(run: Run, model: nn.Module, outputs: list[int] | None = None) -> ClassificationModule:
    """The module that trains and tests the run's model.

    Args:
        run: the run.
        model: its model.
        outputs: of the model, one for each class of the data; None for all.
    """
    return ClassificationModule(
        model,
        num_classes=model.num_classes if outputs is None else len(outputs),
        recipe=run.recipe if run.recipe.epochs else replace(run.recipe, ema_decay=0.0, distillation=0.0),
        seed=run.seed,
        outputs=outputs,
    )


def _train_and_test(
    run: Run,
    module: ClassificationModule,
    data: LightningDataModule,
    folder: Path,
    identity: dict[str, str],
    record: Record,
    on_epoch: Callable[[], None] | None,
    progress: bool,
) -> tuple[dict[str, Any], bool]:
    """Metrics, and whether this is the first of the processes that train together."""
    errors, checkpoint = ReconstructionErrorCallback(), checkpoint_path(run, folder)
    record.identity = identity
    with warnings.catch_warnings(), recorded_signals() as signals:
        for message in _IRRELEVANT:
            warnings.filterwarnings("ignore", message=f".*{message}")
        callbacks = [record, InterruptibleCheckpoint(checkpoint, signals, minutes=_minutes())]
        callbacks += [errors] if run.stage == "evaluate" else []
        lightning = trainer.create(run, folder, callbacks, on_epoch, progress)
        if lightning.world_size > 1:
            signals.use_default_handlers()  # until all processes have met
        try:
            if run.recipe.epochs:
                trainer.fit(lightning, module, data, run, checkpoint, identity)
            tested = lightning.test(module, datamodule=data, verbose=progress)
        finally:
            loggers.close(lightning.logger)
        if not tested:
            raise ValueError(f"no image was tested with the Trainer's options {run.trainer_options}")
        metrics = tested[0]

    measured = _accuracy(metrics, module.correct)
    if module.ema is not None:
        averaged = _accuracy(metrics, module.ema_correct, prefix="test_ema_")
        measured |= {f"ema_{name}": value for name, value in averaged.items() if name != "images"}
    if tokenpool.is_patched(module.model) and run.stage == "evaluate":
        measured["relative_error"] = errors.relative
    if run.downsampler == "soft_selection":
        measured["learned_keep"] = soft_selection.learned_schedule(module.model)
    return measured, lightning.is_global_zero


def _accuracy(metrics: dict[str, float], correct: Tensor, prefix: str = "test_") -> dict[str, Any]:
    """Accuracies in percent, with the standard error of the finite number of images.

    `correct` stores which images were right, see `tokenpool.analysis.bits`. It serves to pair runs by image.
    """
    images = len(correct)
    top1, loss = correct.sum().item() / images, metrics[f"{prefix}loss"]
    return {
        "top1": 100 * top1,
        "top1_error": 100 * (top1 * (1 - top1) / images) ** 0.5,
        "top5": 100 * metrics[f"{prefix}top5"],
        "loss": loss if math.isfinite(loss) else None,
        "images": images,
        "correct": bits.encode(correct.numpy()),
    }


def _restriction(outputs: list[int] | None, num_classes: int) -> dict[str, Any]:
    """Entry of the result that lists the classes that took part, if they are not all classes of the model."""
    return {} if outputs is None or len(outputs) == num_classes else {"among_classes": outputs}


def _doubts(run: Run, metrics: dict[str, Any], classes: int) -> dict[str, str]:
    """Entry of the result with likely reasons, if a model with weights from elsewhere is no better than a guess."""
    from_elsewhere = run.pretrained or is_path(run.start)
    images, guess = metrics.get("images", 0), 1 / classes
    if run.recipe.epochs or not from_elsewhere or "top1" not in metrics or images < ENOUGH_IMAGES or classes < 2:
        return {}
    top1, loss, by_guess = metrics["top1"], metrics.get("loss"), math.log(classes)
    if top1 <= 100 * (guess + 3 * (guess * (1 - guess) / images) ** 0.5):
        found = f"top-1 {top1:.2f} % of {images} images is what a guess among {classes} classes has"
    elif loss is not None and loss > by_guess:
        found = f"the loss {loss:.2f} is above that of a guess among {classes} classes, {by_guess:.2f}"
    else:
        return {}
    reasons = (
        "the classes of the data stand in another order than the model's (their folders are numbered in natural order, "
        "but for WordNet ids with ImageNet's classes); the images are not preprocessed as the model expects "
        "(`tokenpool.runs.run.preprocessing`); or the weights have no head for these classes"
    )
    pooled = "; or too few tokens are kept" if run.downsampler != "none" else ""
    return {"warning": f"{found}. Likely reasons: {reasons}{pooled}"}


def _cost(model: nn.Module) -> dict[str, Any]:
    count = flops.count(model)
    return {
        "gmacs": count.gmacs,
        "backbone_gmacs": count.backbone_gmacs,
        "clustering_gmacs": count.clustering_gmacs,
        "parts": count.parts,
    }


def build_model(run: Run, folder: Path) -> nn.Module:
    """The run's model with the weights that it starts from."""
    downsampler = soft_selection.SoftSelection if run.downsampler == "soft_selection" else run.downsampler
    weights = os.environ.get(WEIGHTS) if run.pretrained else None
    keep = run.keep
    if run.budget is not None and keep is None:
        plain = tokenpool.create_model(run.model, **run.model_options)
        keep = tokenpool.schedule_for(run.budget, plain, run.downsampler, run.family, **run.options)
    model = tokenpool.create_model(
        run.model,
        downsampler,
        keep,
        carry=run.carry,
        pretrained=run.pretrained and weights is None,
        qk_norm=run.qk_norm,
        alpha=run.alpha,
        learn_alpha=run.learn_alpha,
        **run.options,
        **run.model_options,
    )
    if weights is not None:
        tokenpool.load_weights(model, Path(weights), other_classes="num_classes" in run.model_options, ema=run.ema)
    if run.start is not None:
        start = Path(run.start) if is_path(run.start) else weights_path(run.start, folder)
        tokenpool.load_weights(model, start, ema=run.ema)
    return model


def data_module(run: Run) -> LightningDataModule:
    """The run's data."""
    recipe, found = run.recipe, data_set(run.data)
    if found.module is not None:
        if run.limit or run.part or recipe.train_per_class or recipe.test_per_class:
            raise ValueError(f"{found.title} are few; only image folders can be limited or parted")
        return found.module(recipe, split=run.split, seed=run.seed)
    source, prepared = image_source(run), preprocessing(run)
    return AUGMENTATIONS[recipe.augmentation](
        source,
        image_size=tuple(prepared.pop("input_size")[1:]),
        recipe=recipe,
        workers=_workers(),
        seed=run.seed,
        limit=run.limit,
        part=run.part,
        allow_empty=run.allow_empty_classes,
        allow_truncated=run.allow_truncated,
        **prepared,
    )


def prepare_data(runs: Sequence[Run]) -> None:
    """Open the images of all runs, and store the images that are trained on from the store, before any training.

    Raises:
        ValueError, OSError: as of `data_module` and its `setup`.
    """
    names = ("augmentation", "train_per_class", "test_per_class", "crop_pct")
    users: dict[tuple, Run] = {}
    for run in sorted(runs, key=lambda run: -run.recipe.epochs):
        key = (
            run.data,
            run.model,
            *(getattr(run.recipe, name) for name in names),
            str(run.model_options.get("img_size")),
        )
        if not data_set(run.data).embedded:
            users.setdefault(key, run)
    for run in users.values():
        data_module(run).setup("fit" if run.recipe.epochs else "test")


def _workers() -> int:
    """Processes that load data for one that trains: $TOKENPOOL_WORKERS; one for each other core from Slurm; or 2."""
    if parent_process():
        return 0  # a study has processes enough, and starting more costs it seconds a run
    return _number(WORKERS, max(int(os.environ.get("SLURM_CPUS_PER_TASK", 3)) - 1, 0))


def _minutes() -> float:
    """Between checkpoints in the middle of an epoch: $TOKENPOOL_MINUTES, or 10."""
    return _number(MINUTES, 10.0)


def _number(variable: str, default: float) -> Any:
    text = os.environ.get(variable)
    try:
        number = type(default)(text or default)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"${variable} = {text!r} must be a number, 0 or more")
    return number


def save_weights(model: nn.Module, path: Path, expected: str = "") -> str:
    """Write a model's state, atomically.

    Args:
        model: the model.
        path: of the file.
        expected: fingerprint that the file must have; empty for any.

    Returns:
        The file's fingerprint.

    Raises:
        ValueError: if it is not the expected one; nothing is written then.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with files.atomic_write(path) as temporary:
        safetensors.torch.save_file(state, temporary)
        found = fingerprint.of_weights(temporary)
        if expected not in ("", found):
            raise ValueError(
                f"trained again, {path.stem} ends with other weights ({found}) than its result tells of ({expected}), "
                "as on another machine or version; other runs may have started from the latter: choose another folder"
            )
    return found


def _ended_before(path: Path) -> str:
    """Fingerprint of the weights of an earlier result of the run, whose file is lost; else empty."""
    return (results.read_or_none(path) or {}).get("trained_weights", "")
