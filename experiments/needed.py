"""Lists of runs that tables and figures need of a study. `experiments.artifacts` says which of them needs which."""

from collections.abc import Callable, Sequence

from experiments.presets import Variant
from tokenpool.downsampling import studied
from tokenpool.runs.run import Run
from tokenpool.runs.stages import merging
from tokenpool.runs.study import Study


def trained(runs: Callable[[Study], list[Run]]) -> Callable[[Study], list[Run]]:
    """The runs of studies that train models, and none of others."""
    return lambda study: runs(study) if study.preset.trains else []


def bases(study: Study) -> list[Run]:
    """The base models of all seeds."""
    return [study.base(seed) for seed in study.seeds]


def main(study: Study, methods: Sequence[str], seeds: Sequence[int] | None = None) -> list[Run]:
    """Methods on the main model, beside the plain one."""
    seeds = study.seeds if seeds is None else seeds
    return [*study.plain(seeds), *study.finetunes(methods, seeds)]


def beside_others(study: Study, methods: Sequence[str]) -> list[Run]:
    """Methods on the main model, of the extra seeds: all points of a figure have the same seeds."""
    return main(study, methods, study.extra_seeds)


def family(
    study: Study, methods: Sequence[str], names: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> list[Run]:
    """Methods on the other models of the family that the paper downsamples, all but the smallest."""
    runs = []
    seeds = study.extra_seeds if seeds is None else seeds
    for name, variant in study.preset.family.items():
        if names is None or name in names:
            runs += study.plain(seeds, variant)
            runs += study.finetunes(methods, seeds, variant) if name != "deit_tiny" else []
    return runs


def whole_family(study: Study, methods: Sequence[str]) -> list[Run]:
    """Methods on the main model and on the other models of the family."""
    return [*beside_others(study, methods), *family(study, methods)]


def rivals(study: Study) -> list[Run]:
    """Methods of other papers, and the paper's methods with the same seeds; none where the preset has no rivals."""
    found = study.rivals()
    return [*main(study, studied(), study.added_seeds), *found] if found else []


def best_and_rivals(study: Study, methods: Sequence[str], others: Sequence[str]) -> list[Run]:
    """Methods on all models, and others if they are rivals in the study. All points of a figure have the same seeds."""
    found = study.rivals(others)
    if not found:
        return whole_family(study, methods)
    seeds = study.added_seeds
    return [*main(study, methods, seeds), *family(study, methods, seeds=seeds), *found]


def convolutions(study: Study) -> list[Run]:
    """Convolution at all placements of the study."""
    return study.convolutions(study.extra_seeds, study.placements)


def twice_trained(study: Study) -> list[Run]:
    """Plain models of the family, trained once and twice."""
    variants = [study.preset.main, *study.preset.family.values()]
    return [run for variant in variants for run in _once_and_twice(study, variant)]


def _once_and_twice(study: Study, variant: Variant) -> list[Run]:
    return [*(study.base(seed, variant) for seed in study.extra_seeds), *study.plain(study.extra_seeds, variant)]


def normalised(study: Study, figure: str) -> list[Run]:
    """Methods with normalised queries and keys, as in Figure 10a or 10b, and without."""
    if figure not in study.preset.normalised:
        return []
    variant = study.preset.normalised[figure]
    tuned = study.finetunes(("power_bert", "wkmedoids"), study.extra_seeds, variant)
    return [*beside_others(study, ("power_bert", "wkmedoids")), *study.plain(study.extra_seeds, variant), *tuned]


def timed(study: Study) -> list[Run]:
    """Times and accuracies for Figure 12: fine-tuned, or of the pretrained model with carried sizes."""
    clusterings = ("wkmeans", "wkmedoids")
    if not study.preset.trains:
        accurate = [
            *study.evaluations(("none", "power_bert"), carry=False),
            *study.evaluations(clusterings, carry=True),
        ]
    else:
        accurate = main(study, ("power_bert", *clusterings))
    return [*accurate, *study.timings(("none", "power_bert", *clusterings))]


def not_fine_tuned(study: Study) -> list[Run]:
    """All methods in the base model without fine-tuning, with sizes carried and not carried."""
    return [
        *study.evaluations(("none", "convolution", *studied()), carry=False),
        *study.evaluations(("convolution", *merging()), carry=True),
    ]


def protocol_runs(study: Study) -> list[Run]:
    """The protocol of section 5 on the main model: base models, and all methods fine-tuned.

    Raises:
        ValueError: for a preset that trains nothing.
    """
    if not study.preset.trains:
        raise ValueError(f"preset {study.preset.name} trains nothing; {study.command('figure 9', '--run')}")
    if not study.full:
        return [*bases(study), *main(study, study.preset.methods)]
    seeds = study.seeds if study.preset.placements is None else study.extra_seeds
    single = [at for at in study.placements if len(at) == 1]
    return [*bases(study), *main(study, studied()), *study.convolutions(seeds, single)]
