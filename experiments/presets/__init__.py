"""Presets: what to train, on what, for how long. Each module states command, cost and expected result at its top."""

import runpy
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.presets.checks import OF_A_STAGE, check
from tokenpool.training.recipe import Recipe

NAMES = ("digits", "pretrained", "cifar10", "cifar10_128", "imagenet", "imagenet_printed")
DEFAULT = NAMES[0]  # of commands


@dataclass(frozen=True)
class Variant:
    """A base model of a study.

    Attributes:
        name: part of the names of its runs; empty for the study's main model.
        title: what figures call it.
        model_options: of the timm model, beside the preset's.
        model: name of the timm model, where it is not the preset's.
        schedules: name of the paper's schedules (see `tokenpool.schedules.paper`) to use instead of a search.
        effort: of an epoch, relative to the main model's, for estimates.
        qk_norm: see `tokenpool.patch`, as the others below.
    """

    name: str
    title: str
    model_options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    schedules: str | None = None
    effort: float = 1.0
    qk_norm: str | None = None
    alpha: float = 1.0
    learn_alpha: bool = False


@dataclass(frozen=True)
class Preset:
    """All choices of a study. What contradicts itself is refused, see `checks`.

    Attributes:
        name: of the preset.
        title: of its data, as figures state it.
        data: name of a data set, see `experiments.data_sets`; or a folder in ImageNet's layout.
        model: name of the timm model.
        pretrained: start from the weights that `--weights` names, or from timm's, instead of training afresh.
        recipe: hyper-parameters of stages 1, 3 and 4. The fields below set its epochs, and what is special in stage 2.
        base_epochs: of the base model's training (stage 1); 0 for a preset that trains nothing.
        search_epochs: of each search for a schedule (stage 2).
        finetune_epochs: of each method's fine-tuning (stage 3), and of the base model's (stage 4).
        search_learning_rate: of the network in stage 2.
        retention_learning_rate: of the retention weights in stage 2.
        penalties: the weights lambda of stage 2, ascending; one schedule each. Level i is the i-th.
        full_penalties: the same for the full study.
        methods: fine-tuned with every schedule in the quick study; in the full one all are.
        seeds: of the study; each has its own base model, and its own split of data that are split by seed.
        full_seeds: of the full study.
        extra_seeds: of the full study's runs with other base models, initial centres, several convolutions, or
            without fine-tuning.
        main: the model itself, as one of the paper's family.
        stands_for: the paper's name of the model that it is or stands for.
        family: the paper's other models or their stand-ins, by the paper's names ("deit_tiny", "deit_e252", ...).
        normalised: the model with normalised queries and keys (Figure 10), by the figure's number.
        grid: tokens along the image's shorter side, which limits convolutions.
        processes: that train one model on a cluster, each with a GPU of its own.
        clustered_level: number of the schedule that Figure 1c shows; one of the quick study, too.
        redundancy_images: so many images of a folder are enough to measure redundancy; 0 for all.
        budgets: in 10^9 multiply-adds, of the study of models that are not fine-tuned.
        placements: of convolutions in the full study, as blocks, on the extra seeds; None for all that appendix D
            allows, single ones on all seeds.
        depth: blocks.
        model_options: further arguments of the timm model.
        trainer_options: of Lightning's Trainer, such as the precision.
        epoch_seconds: that an epoch takes one process of the machine in the preset's docstring, for estimates.
        evaluation_seconds: the same for the test of a run, and all that it does beside training.
        pooled_effort: of a model with fewer tokens, relative to the plain one's, mean over methods and schedules.
        file: that it was read from, if it is none of this package.
    """

    name: str
    title: str
    data: str
    model: str
    main: Variant
    stands_for: str
    depth: int
    grid: int
    processes: int = 1
    pretrained: bool = False
    recipe: Recipe = Recipe(batch_size=64)
    base_epochs: int = 0
    search_epochs: int = 0
    finetune_epochs: int = 0
    search_learning_rate: float = 0.0
    retention_learning_rate: float = Recipe.retention_learning_rate
    penalties: tuple[float, ...] = ()
    full_penalties: tuple[float, ...] = ()
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    full_seeds: tuple[int, ...] = (0,)
    extra_seeds: tuple[int, ...] = (0,)
    family: dict[str, Variant] = field(default_factory=dict)
    normalised: dict[str, Variant] = field(default_factory=dict)
    clustered_level: int = 0
    redundancy_images: int = 0
    budgets: tuple[float, ...] = ()
    placements: tuple[tuple[int, ...], ...] | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    trainer_options: dict[str, Any] = field(default_factory=dict)
    epoch_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    pooled_effort: float = 1.0
    file: Path | None = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def argument(self) -> str:
        """What `--preset` takes for it."""
        return str(self.file or self.name)

    @property
    def base_recipe(self) -> Recipe:
        """Hyper-parameters of the base model's training."""
        return replace(self.recipe, epochs=self.base_epochs)

    @property
    def finetune_recipe(self) -> Recipe:
        """Hyper-parameters of fine-tuning."""
        return replace(self.recipe, epochs=self.finetune_epochs)

    def search_recipe(self, penalty: float) -> Recipe:
        """Hyper-parameters of the search for a schedule with the weight lambda of the retention loss."""
        return replace(
            self.recipe,
            epochs=self.search_epochs,
            learning_rate=self.search_learning_rate,
            retention_penalty=penalty,
            retention_learning_rate=self.retention_learning_rate,
        )

    @property
    def trains(self) -> bool:
        """Whether there are models to train; else all is measured on pretrained ones."""
        return self.base_epochs > 0


def get(name: str) -> Preset:
    """The preset of that name, or the one that a Python file defines as PRESET.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no such preset; the message lists those that there are.
    """
    if name.endswith(".py"):
        return _read(Path(name))
    if name not in NAMES:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(NAMES)}, and files like my_preset.py")
    return import_module(f"experiments.presets.{name}").PRESET


def _read(path: Path) -> Preset:
    if not path.is_file():
        raise FileNotFoundError(f"no preset {path}")
    try:
        preset = runpy.run_path(str(path)).get("PRESET")
    except (Exception, SystemExit) as error:  # whatever the code in it raises
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"cannot read preset {path}: {kind}{error}{_hint(error)}") from error
    if not isinstance(preset, Preset) or preset.name in NAMES:
        raise ValueError(f"{path} must define PRESET, a Preset with a name other than {', '.join(NAMES)}")
    return replace(preset, file=path.resolve())


def _hint(error: BaseException) -> str:
    """What to write instead, where a preset has a hyper-parameter beside its recipe, as presets had until 0.1."""
    for each in fields(Recipe):
        if isinstance(error, TypeError) and f"argument '{each.name}'" in str(error) and each.name not in OF_A_STAGE:
            return f"; write recipe=Recipe({each.name}=...)"
    return ""
