"""The protocol on scikit-learn's handwritten digits, with small DeiTs on a CPU. Nothing is downloaded.

    python -m experiments reproduce --preset digits          # 8 minutes on two cores
    python -m experiments reproduce --preset digits --full   # every run of every figure: about 2 hours

Expected top-1: 97.0 % for the base model, 97.4 % after fine-tuning, 96.1 % with PoWER-BERT or WK-Medoids and a fifth of
the FLOPs.
"""

from experiments.presets import Preset, Variant
from tokenpool.training.recipe import Recipe

PRESET = Preset(
    name="digits",
    title="Handwritten digits",
    data="digits",
    model="deit_digits_patch2_16",
    depth=6,
    grid=8,
    clustered_level=1,
    base_epochs=50,
    search_epochs=12,
    finetune_epochs=12,
    recipe=Recipe(
        batch_size=32,
        learning_rate=1e-3,
        warmup_epochs=3,
        label_smoothing=0.1,
        weight_decay=0.05,
    ),
    search_learning_rate=2e-4,
    retention_learning_rate=2e-2,
    penalties=(1e-4, 1e-3, 1e-2, 1e-1),
    full_penalties=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    methods=("random", "power_bert", "wkmedoids"),
    full_seeds=(0, 1, 2),
    extra_seeds=(0,),
    # Widths 24, 32, 40 and 48 have nearly the same ratios as the paper's 192, 252, 318 and 384.
    stands_for="deit_small",
    main=Variant("", "width 48 (DeiT-S)"),
    family={
        "deit_tiny": Variant("tiny", "width 24 (DeiT-Ti)", {"embed_dim": 24}),
        "deit_e252": Variant("e252", "width 32 (DeiT-e252)", {"embed_dim": 32}),
        "deit_e318": Variant("e318", "width 40 (DeiT-e318)", {"embed_dim": 40}),
    },
    normalised={
        "10a": Variant("alpha1", "normalised, alpha = 1", qk_norm="l2"),
        "10b": Variant("alpha", "normalised, alpha learned", qk_norm="l2", learn_alpha=True),
    },
    model_options={"weight_init": "jax"},  # timm's default weights are too small for this narrow model
    epoch_seconds=3.0,
    evaluation_seconds=3.0,
)
