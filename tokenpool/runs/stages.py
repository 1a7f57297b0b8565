"""The runs of a study by the stages of the protocol (section 5, appendices B to F)."""

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

from tokenpool import schedules
from tokenpool.downsampling import REGISTRY, studied
from tokenpool.runs.data_sets import data_set
from tokenpool.runs.preset import Preset, Variant
from tokenpool.runs.run import Run


def dropping() -> tuple[str, ...]:
    """Names of the studied methods that drop tokens, as they are registered now."""
    return studied("selection")


def merging() -> tuple[str, ...]:
    """Names of the studied methods that merge tokens, as they are registered now."""
    return studied("clustering", "matching")


def placements(depth: int, grid: int) -> list[tuple[int, ...]]:
    """All placements of convolutions that appendix D allows: one to three blocks, three of them evenly spaced.

    Args:
        depth: blocks of the model.
        grid: tokens along the shorter side. Each convolution halves it, and at least one token must remain.
    """
    most = min(3, grid.bit_length() - 1)
    chosen = [at for count in range(1, most + 1) for at in combinations(range(depth), count)]
    return [at for at in chosen if len(at) < 3 or at[1] - at[0] == at[2] - at[1]]


class Stages:
    """The runs of a preset, whether finished or not.

    Attributes:
        preset: what is run.
        full: whether it is the full study, not the quick one of `make reproduce`.
    """

    preset: Preset
    full: bool

    def schedule(self, variant: Variant, level: int) -> tuple[int, ...] | None:
        """The schedule of that level: the paper's, or as learned; None if its search is not finished."""
        raise NotImplementedError

    @property
    def penalties(self) -> tuple[float, ...]:
        """Weights lambda of the searches; one schedule each."""
        return self.preset.full_penalties if self.full else self.preset.penalties

    @property
    def levels(self) -> range:
        """Numbers of the schedules, 0 the mildest."""
        return range(schedules.LEVELS if self.preset.main.schedules else len(self.penalties))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the main runs."""
        return self.preset.full_seeds if self.full else self.preset.seeds

    @property
    def extra_seeds(self) -> tuple[int, ...]:
        """Seeds of the ablations and of the other base models."""
        return self.preset.extra_seeds if self.full else self.preset.seeds

    @property
    def added_seeds(self) -> tuple[int, ...]:
        """Seeds of rivals, carried sizes, convergence and time."""
        return self.preset.added_seeds if self.full else self.preset.seeds

    @property
    def placements(self) -> Sequence[tuple[int, ...]]:
        """Blocks at which convolutions are put, one to three at a time."""
        chosen = self.preset.placements
        return placements(self.preset.depth, self.preset.grid) if chosen is None else chosen

    def base(self, seed: int, variant: Variant | None = None) -> Run:
        """Stage 1: a base model."""
        variant = variant or self.preset.main
        common = self._common(seed, variant) | {"pretrained": self.preset.pretrained}
        return Run("base", variant.name, **common | {"recipe": self.preset.base_recipe})

    def searches(self, variant: Variant) -> list[Run]:
        """Stage 2: soft selection for each penalty, from the first seed's base model. All seeds share the schedules."""
        seed = self.seeds[0]
        common = self._common(seed, variant)
        return [
            Run(
                "search",
                run_label(variant, f"lambda{penalty:g}"),
                **common | {"recipe": self.preset.search_recipe(penalty)},
                downsampler="soft_selection",
                level=level,
                schedule=self.schedule_name(variant, level),
                start=self.base(seed, variant).name,
            )
            for level, penalty in enumerate(self.penalties)
        ]

    def finetunes(
        self, methods: Sequence[str], seeds: Sequence[int], variant: Variant | None = None, **options: Any
    ) -> list[Run]:
        """Stage 3: each method with every schedule. `keep` is None where the search is not finished.

        Models with normalised queries and keys use the main model's schedules. Sizes are carried for the methods whose
        own papers train with carried sizes, see `tokenpool.downsampling.Method`.
        """
        variant = variant or self.preset.main
        chosen = "".join(f"-{value}_{name}" for name, value in options.items())
        return [
            Run(
                "finetune",
                run_label(variant, f"{method}{chosen}-level{level}"),
                **self._tuned(seed, variant),
                downsampler=method,
                carry=REGISTRY[method].carry,
                **self._at_level(variant, level),
                options=options,
            )
            for seed in seeds
            for method in methods
            for level in self.levels
        ]

    def plain(self, seeds: Sequence[int], variant: Variant | None = None) -> list[Run]:
        """Stage 4: the base model, fine-tuned as long as the others."""
        variant = variant or self.preset.main
        return [Run("finetune", run_label(variant, "none"), **self._tuned(seed, variant)) for seed in seeds]

    def convolutions(self, seeds: Sequence[int], placements: Sequence[tuple[int, ...]]) -> list[Run]:
        """Stage 3 for convolution: at chosen blocks (appendix D)."""
        return self._placed("convolution", seeds, placements)

    def rivals(self, methods: Sequence[str] | None = None) -> list[Run]:
        """Stage 3 for methods of other papers: with every schedule, or at the preset's placements.

        Args:
            methods: only these of the preset's rivals. None for all.
        """
        chosen = [name for name in self.preset.rivals if methods is None or name in methods] if self.full else []
        seeds = self.added_seeds
        runs = self.finetunes([name for name in chosen if REGISTRY[name].has_schedule], seeds)
        for name in chosen:
            if not REGISTRY[name].has_schedule:
                runs += self._placed(name, seeds, self.preset.rival_placements)
        return runs

    def _placed(self, method: str, seeds: Sequence[int], placements: Sequence[tuple[int, ...]]) -> list[Run]:
        """Stage 3 for a method without a schedule: at chosen blocks."""
        return [
            Run(
                "finetune",
                f"{method}-at{'-'.join(map(str, at))}",
                **self._tuned(seed, self.preset.main),
                downsampler=method,
                options={"at": list(at)},
            )
            for seed in seeds
            for at in placements
        ]

    def evaluations(self, methods: Sequence[str], carry: bool) -> list[Run]:
        """The base model with each method and schedule, not fine-tuned (appendix E)."""
        suffix = "-carry" if carry else ""
        runs = []
        for seed in self.extra_seeds:
            common = self.on_base(seed)
            for method in methods:
                common |= {"downsampler": method, "carry": carry}
                if method == "none":
                    runs.append(Run("evaluate", "none", **common))
                elif method == "convolution":
                    runs += [
                        Run("evaluate", f"convolution{suffix}-at{at[0]}", **common, options={"at": list(at)})
                        for at in self.placements
                        if len(at) == 1
                    ]
                else:
                    runs += [
                        Run(
                            "evaluate",
                            f"{method}{suffix}-level{level}",
                            **common,
                            **self._at_level(self.preset.main, level),
                        )
                        for level in self.levels
                    ]
        return runs

    def timings(self, methods: Sequence[str]) -> list[Run]:
        """Throughput of each method with every schedule."""
        main, common = self.preset.main, self.on_base(self.added_seeds[0])
        runs = []
        for method in methods:
            for level in self.levels if method != "none" else [None]:
                label = method if level is None else f"{method}-level{level}"
                chosen = {} if level is None else self._at_level(main, level)
                carry = not self.preset.trains and method in merging()  # as in the accuracies
                runs.append(Run("throughput", label, **common, **chosen, downsampler=method, carry=carry))
        return runs

    def redundancies(self) -> list[Run]:
        """Redundancy of tokens in the plain base model (section 3.3)."""
        limit = {"limit": self.preset.redundancy_images}
        return [Run("redundancy", "", **self.on_base(seed) | limit) for seed in self.extra_seeds]

    def convergences(self) -> list[Run]:
        """Iterations that K-Medoids needs in the base model, with every schedule (section 4)."""
        limit = {"limit": self.preset.redundancy_images}
        carry = not self.preset.trains  # as in the accuracies
        return [
            Run(
                "convergence",
                f"{method}-level{level}",
                **self.on_base(seed) | limit,
                **self._at_level(self.preset.main, level),
                downsampler=method,
                carry=carry,
            )
            for seed in self.added_seeds
            for method in ("kmedoids", "wkmedoids")
            for level in self.levels
        ]

    def carried(self) -> list[Run]:
        """Stage 3 for WK-Medoids with carried sizes (appendix E)."""
        return [
            Run(
                "finetune",
                f"wkmedoids-carry-level{level}",
                **self._tuned(seed, self.preset.main),
                **self._at_level(self.preset.main, level),
                downsampler="wkmedoids",
                carry=True,
            )
            for seed in self.added_seeds
            for level in self.levels
        ]

    def clusters(self) -> list[Run]:
        """Clusters of patches in some images, by WK-Medoids in the base model (Figure 1c)."""
        chosen = self._at_level(self.preset.main, self.preset.clustered_level)
        return [Run("clusters", "", **self.on_base(self.seeds[0]), **chosen, downsampler="wkmedoids", carry=True)]

    def on_base(self, seed: int) -> dict[str, Any]:
        """Arguments of a run on the base model as it is."""
        return self._common(seed, self.preset.main) | self._start(seed, self.preset.main)

    def _at_level(self, variant: Variant, level: int) -> dict[str, Any]:
        """Arguments of a run with the schedule of that level."""
        return {
            "level": level,
            "keep": self.schedule(variant, level),
            "schedule": self.schedule_name(self.searched_variant(variant), level),
        }

    def schedule_name(self, variant: Variant, level: int) -> str:
        """Name of the schedule of a level, which differs between studies."""
        return f"{variant.schedules}:{level}" if variant.schedules else f"lambda{self.penalties[level]:g}"

    @cached_property
    def variants(self) -> list[Variant]:
        """All base models of the study, the main one first."""
        return [self.preset.main, *self.preset.family.values(), *self.preset.normalised.values()]

    def variant_of(self, run: Run) -> Variant:
        """The base model of a run."""
        return next(variant for variant in self.variants if variant.name == run.variant)

    def searched_variant(self, variant: Variant) -> Variant:
        """The variant whose schedules this one uses."""
        return self.preset.main if variant.qk_norm else variant

    def _common(self, seed: int, variant: Variant) -> dict[str, Any]:
        preset = self.preset
        return {
            "variant": variant.name,
            "data": preset.data,
            "model": variant.model or preset.model,
            "model_options": preset.model_options | variant.model_options,
            "qk_norm": variant.qk_norm,
            "alpha": variant.alpha,
            "learn_alpha": variant.learn_alpha,
            "recipe": preset.recipe,
            "trainer_options": preset.trainer_options,
            "seed": seed,
            "split": seed if data_set(preset.data).split_by_seed else 0,
        }

    def _start(self, seed: int, variant: Variant) -> dict[str, Any]:
        return {"start": self.base(seed, variant).name} if self.preset.trains else {"pretrained": True}

    def _tuned(self, seed: int, variant: Variant) -> dict[str, Any]:
        return self._common(seed, variant) | self._start(seed, variant) | {"recipe": self.preset.finetune_recipe}


def run_label(variant: Variant, label: str) -> str:
    """Label of a run on a base model."""
    return "-".join(filter(None, [variant.name, label]))
