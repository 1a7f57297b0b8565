"""Which runs a study needs: the paper's protocol (section 5, appendix C) as lists of runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.presets import Preset
from experiments.protocol import Run, is_finished, result_path, weights_path
from experiments.runner import Runner
from tokenpool import results


def base_runs(preset: Preset, seeds: Sequence[int]) -> list[Run]:
    """Stage 1: the base model, for each seed."""
    return [Run("base", "", **_common(preset, seed), epochs=preset.base_epochs) for seed in seeds]


def search_runs(preset: Preset, penalties: Sequence[float], seed: int) -> list[Run]:
    """Stage 2: soft selection for each penalty, from the first seed's base model. All seeds share the schedules."""
    common = _common(preset, seed) | {"learning_rate": preset.search_learning_rate}
    return [
        Run(
            "search",
            f"lambda{penalty:g}",
            **common,
            downsampler="soft_selection",
            level=level,
            start=f"base-seed{seed}",
            epochs=preset.search_epochs,
            retention_penalty=penalty,
            retention_learning_rate=preset.retention_learning_rate,
        )
        for level, penalty in enumerate(penalties)
    ]


def finetune_runs(
    preset: Preset,
    methods: Sequence[str],
    schedules: Sequence[list[int]],
    placements: Sequence[Sequence[int]],
    seed: int,
) -> list[Run]:
    """Stages 3 and 4: every method with every schedule, convolution at its placements, and the plain model."""
    common = _common(preset, seed) | {"start": f"base-seed{seed}", "epochs": preset.finetune_epochs}
    runs = [Run("finetune", "none", **common)]
    for method in methods:
        for level, keep in enumerate(schedules):
            label = f"{method}-level{level}"
            runs.append(Run("finetune", label, **common, downsampler=method, keep=tuple(keep), level=level))
    for at in placements:
        label = f"convolution-at{'-'.join(map(str, at))}"
        runs.append(Run("finetune", label, **common, downsampler="convolution", options={"at": list(at)}))
    return runs


def reproduce(preset: Preset, full: bool, folder: Path, jobs: int) -> None:
    """Run the whole protocol; whatever is finished already is skipped."""
    penalties = preset.full_penalties if full else preset.penalties
    methods = preset.full_methods if full else preset.methods
    placements = preset.convolutions if full else ()
    seeds = preset.full_seeds if full else preset.seeds
    bases, searches = base_runs(preset, seeds), search_runs(preset, penalties, seeds[0])

    def finetunes(schedules: Sequence[list[int]]) -> list[Run]:
        return [run for seed in seeds for run in finetune_runs(preset, methods, schedules, placements, seed)]

    searching = pending(searches, folder)
    if searching:  # the schedules are not known yet, but how many runs they will need is
        expected = [run for run in finetunes([[0]] * len(penalties)) if not result_path(run, folder).exists()]
    else:
        expected = pending(finetunes(learned_schedules(searches, folder)), folder)
    needed = {run.start for run in [*searching, *expected]}
    first = [
        run
        for run in bases
        if not is_finished(run, folder) or (run.name in needed and not weights_path(run.name, folder).exists())
    ]
    epochs = sum(run.epochs for run in [*first, *searching, *expected])
    print(
        f"{preset.name} in {folder}: {len(first)} base models, {len(searching)} searches for a schedule and "
        f"{len(expected)} fine-tunings to go, {epochs} epochs in {jobs} processes",
        flush=True,
    )
    if epochs == 0:
        return
    with Runner(folder, jobs, epochs) as runner:
        runner.run_all(first)
        runner.run_all(searching)
        runner.run_all(pending(finetunes(learned_schedules(searches, folder)), folder))


def pending(runs: Sequence[Run], folder: Path) -> list[Run]:
    """Those runs that are not finished."""
    return [run for run in runs if not is_finished(run, folder)]


def learned_schedules(searches: Sequence[Run], folder: Path) -> list[list[int]]:
    """The schedule that each finished search has learned."""
    return [results.read(result_path(run, folder))["metrics"]["learned_keep"] for run in searches]


def _common(preset: Preset, seed: int) -> dict[str, Any]:
    return {
        "data": preset.data,
        "model": preset.model,
        "model_options": preset.model_options,
        "batch_size": preset.batch_size,
        "learning_rate": preset.learning_rate,
        "warmup_epochs": preset.warmup_epochs,
        "weight_decay": preset.weight_decay,
        "label_smoothing": preset.label_smoothing,
        "seed": seed,
        "split": seed,
    }
