"""The settings of a study: its model, data, recipe and methods."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenpool.runs.preset_checks import check
from tokenpool.training.recipe import Recipe


@dataclass(frozen=True)
class Variant:
    """A base model of a study.

    Attributes:
        name: part of the names of its runs. Empty for the main model of the study.
        title: name in figures.
        model_options: arguments of the timm model, in addition to the preset's.
        model: name of the timm model, if it differs from the preset's.
        schedules: name of the paper's schedules (see `tokenpool.schedules.paper`), to use instead of a search.
        effort: time of an epoch relative to the main model, for estimates.
        qk_norm: see `tokenpool.patch`.
        alpha: see `tokenpool.patch`.
        learn_alpha: see `tokenpool.patch`.
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
    """All settings of a study. Contradictory settings are errors, see `preset_checks`.

    Attributes:
        name: name of the preset.
        title: name of the data in figures.
        data: name of a data set, see `tokenpool.runs.data_sets`; or a folder in ImageNet's layout.
        model: name of the timm model.
        pretrained: start from the weights of `--weights`, or else from timm's weights, instead of random weights.
        recipe: hyper-parameters of stages 1, 3 and 4. The fields below set the epochs and the settings of stage 2.
        base_epochs: epochs of the base model (stage 1). 0 for a preset without training.
        search_epochs: epochs of each search for a schedule (stage 2).
        finetune_epochs: epochs of fine-tuning of each method (stage 3) and of the base model (stage 4).
        search_learning_rate: learning rate of the network in stage 2.
        retention_learning_rate: learning rate of the retention weights in stage 2.
        penalties: weights lambda of stage 2, ascending, one for each schedule. Level i is entry i.
        full_penalties: the same for the full study.
        methods: methods of the quick study, fine-tuned with every schedule. The full study has all methods.
        seeds: seeds of the quick study. Each seed has its own base model and its own split of the data.
        full_seeds: seeds of the full study.
        extra_seeds: seeds of the full study for other base models, other initial centres, several convolutions, and
            models without fine-tuning.
        main: the main model.
        stands_for: the paper's name of the main model, or of the model that it represents. Empty for other models,
            which have no place in the paper's tables.
        family: the other models of the paper, or models that represent them, by the paper's names ("deit_tiny",
            "deit_e252", ...).
        normalised: the main model with normalised queries and keys (Figure 10), by number of the figure.
        grid: number of tokens along the shorter side of the image. It limits convolutions.
        processes: number of processes that train one model on a cluster, each with one GPU.
        clustered_level: level of the schedule in Figure 1c. The quick study must have it, too.
        redundancy_images: number of images for the measurement of redundancy. 0 for all.
        budgets: budgets of the study of models that are not fine-tuned, in 10^9 multiply-adds.
        placements: blocks of convolutions in the full study, with the extra seeds. None for all placements of appendix
            D, where single convolutions have all seeds.
        rivals: methods of other papers that the full study fine-tunes to compare with: with every schedule, and methods
            without a schedule at `rival_placements`.
        rival_placements: blocks of each model of a rival without a schedule.
        added_seeds: seeds of the full study for rivals and the methods beside them, for WK-Medoids with carried sizes,
            and for measurements of convergence and time.
        depth: number of blocks.
        model_options: further arguments of the timm model.
        trainer_options: arguments of Lightning's Trainer, such as the precision.
        epoch_seconds: time of an epoch for one process on the machine in the preset's docstring, for estimates.
        evaluation_seconds: time of a run without its training, mainly the test.
        pooled_effort: training time of a pooled model relative to the plain model, mean over methods and schedules.
        file: path of the preset's file, if it is not part of this package.
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
    rivals: tuple[str, ...] = ()
    rival_placements: tuple[tuple[int, ...], ...] = ()
    added_seeds: tuple[int, ...] = (0,)
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
        """Value of `--preset` for this preset."""
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
        """Whether the study trains models. Otherwise it measures pretrained models only."""
        return self.base_epochs > 0
