"""The protocol of the paper on ImageNet, with the printed retention schedules (Tables 3 to 5) instead of searches.

    python -m experiments submit --preset imagenet_printed --table 3 --data FOLDER --template my-cluster.sh --dry-run

Recipe, cost and expected results are the same as in `imagenet`. DeiT-S with normalised queries and keys uses the
schedules of DeiT-S.
"""

from dataclasses import replace

from experiments.presets import imagenet

_PRESET = imagenet.PRESET

PRESET = replace(
    _PRESET,
    name="imagenet_printed",
    title="ImageNet, printed schedules",
    main=replace(_PRESET.main, schedules="deit_small"),
    family={
        name: replace(variant, schedules=None if name == "deit_tiny" else name)
        for name, variant in _PRESET.family.items()
    },
)
