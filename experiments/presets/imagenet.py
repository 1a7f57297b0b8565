"""The full protocol of the paper on ImageNet-1k, with DeiT's recipe, on a Slurm cluster. A run uses a node of 4 GPUs.

    python -m experiments check-data --data FOLDER
    python -m experiments submit --preset imagenet --figure 3a --data FOLDER --template my-cluster.sh --dry-run
    python -m experiments status --preset imagenet

Cost: 300 epochs of DeiT-S take less than 3 days on 4 GPUs, according to its authors (Touvron et al. 2021, section 5.6).
The estimates of `--dry-run` are based on this: at most 0.96 GPU-hours for each epoch, proportional to the FLOPs for
other widths. Downsampled models are counted like plain models. We have not run this study, because we had no ImageNet
and no cluster of GPUs.

Expected results, as printed: DeiT-S has 79.9 % top-1 (base model; repository of Touvron et al.), and 81.2 % after
fine-tuning at 4.60 GFLOPs. WK-Medoids has 80.7 % at 3.0, 80.4 % at 2.3 and 78.1 % at 1.6 GFLOPs (Marin et al. 2021,
Tables 2 and 3; all values are in `experiments/paper/accuracy_tables.csv`). The paper does not print the weights lambda
of the searches. The weights below are the weights for the digits, scaled to 12 blocks of 196 tokens. They are not
tested. `imagenet_printed` needs no search.
"""

from experiments.presets import Preset, Variant
from tokenpool.training.recipe import Recipe

PRESET = Preset(
    name="imagenet",
    title="ImageNet",
    data="imagenet",
    model="deit_small_patch16_224",
    depth=12,
    grid=14,
    processes=4,
    clustered_level=3,
    redundancy_images=1000,
    base_epochs=300,
    search_epochs=30,
    finetune_epochs=300,
    recipe=Recipe(
        batch_size=1024,
        learning_rate=1e-3,  # 5e-4 x 1024 / 512
        warmup_epochs=5,
        final_learning_rate=1e-5,
        label_smoothing=0.1,
        weight_decay=0.05,
        mixup=0.8,
        cutmix=1.0,
        repeats=3,
        ema_decay=0.99996,
        crop_pct=0.875,
    ),
    search_learning_rate=1e-4,
    retention_learning_rate=1e-2,
    penalties=(1e-4, 3e-4, 1e-3, 3e-3),
    full_penalties=(1e-5, 3e-5, 1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 1e-2),
    methods=("random", "power_bert", "wkmedoids"),
    stands_for="deit_small",
    main=Variant("", "DeiT-S"),
    family={
        "deit_tiny": Variant("tiny", "DeiT-Ti", model="deit_tiny_patch16_224", effort=0.27),
        "deit_e252": Variant("e252", "DeiT-e252", model="deit_e252_patch16_224", effort=0.45),
        "deit_e318": Variant("e318", "DeiT-e318", model="deit_e318_patch16_224", effort=0.70),
    },
    normalised={
        "10a": Variant("alpha1", "normalised, alpha = 1", qk_norm="l2"),
        "10b": Variant("alpha", "normalised, alpha learned", qk_norm="l2", learn_alpha=True),
    },
    model_options={"drop_path_rate": 0.1},
    trainer_options={"precision": "bf16-mixed"},
    epoch_seconds=3456.0,
    evaluation_seconds=120.0,
)
