"""A pretrained DeiT-Ti without any training (appendix E), on photographs in ImageNet's layout.

    python -m experiments figure 9 --preset pretrained --run --data FOLDER [--weights FILE]
    python -m experiments table off_the_shelf --preset pretrained --run --data FOLDER [--weights FILE]

FOLDER holds val/<class>/<image>; without --weights, timm downloads them. 113 settings of Figure 9 take half an hour for
1000 images on two cores, the 52 of the table twenty minutes. The schedules of the figures are those of DeiT-e252, whose
width is next to DeiT-Ti's, which has none in print.

Expected, on 1000 photographs: 79.4 % plain; at level 3 PoWER-BERT 36.7 %, WK-Medoids 18.5 %, with carry 72.7 %.
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
