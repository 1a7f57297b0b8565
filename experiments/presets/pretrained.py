"""A pretrained DeiT-Ti without any training (appendix E), on photographs in ImageNet's layout.

    python -m experiments figure 9 --preset pretrained --run --data FOLDER [--weights FILE]
    python -m experiments table off_the_shelf --preset pretrained --run --data FOLDER [--weights FILE]

FOLDER contains val/<class>/<image>. Without --weights, timm downloads the weights. For 1000 images on two cores, the
113 settings of Figure 9 take half an hour, and the 52 settings of the table twenty minutes. The paper prints no
schedules for DeiT-Ti. The figures use the schedules of DeiT-e252, whose width is the closest.

Expected on 1000 photographs: 79.4 % for the plain model; at level 3, 36.7 % with PoWER-BERT, 18.5 % with WK-Medoids,
and 72.7 % with WK-Medoids and carry.
"""

from experiments.presets import Preset, Variant

PRESET = Preset(
    name="pretrained",
    title="ImageNet photographs",
    data="imagenet",
    model="deit_tiny_patch16_224",
    pretrained=True,
    depth=12,
    grid=14,
    clustered_level=3,
    redundancy_images=200,
    budgets=(0.8, 0.65),
    stands_for="deit_tiny",
    main=Variant("", "DeiT-Ti", schedules="deit_e252"),
    evaluation_seconds=25.0,
)
