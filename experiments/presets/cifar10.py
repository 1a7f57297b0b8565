"""The protocol on CIFAR-10 at 224 pixels, on one GPU: a pretrained DeiT-Ti, fine-tuned, with schedules of its own.

    python -m experiments figure 5a --preset cifar10 --run --data FOLDER [--weights FILE] --jobs 1
    python -m experiments submit --preset cifar10 --all --data FOLDER --template my-cluster.sh

FOLDER holds train/<class>/* and test/<class>/*, or is hf:uoft-cs/cifar10; without --weights, timm downloads them. The
nearest thing to the paper's own fine-tuning that one GPU can do in a day.

Cost and expected result: no GPU was at hand to measure them; estimates take a minute an epoch for granted. The preset
was proven on 40 training and 20 test images: `figure 5a --quick` takes 6 minutes on a CPU with them, and its accuracies
mean nothing.
"""

from experiments.presets import Preset, Variant
from tokenpool.training.recipe import Recipe

PRESET = Preset(
    name="cifar10",
    title="CIFAR-10 at 224 pixels",
    data="cifar10",
    model="deit_tiny_patch16_224",
    pretrained=True,
    depth=12,
    grid=14,
    clustered_level=2,
    redundancy_images=200,
    base_epochs=10,
    search_epochs=3,
    finetune_epochs=5,
    recipe=Recipe(
        batch_size=256,
        learning_rate=1e-4,
        warmup_epochs=1,
        final_learning_rate=1e-6,
        label_smoothing=0.1,
        weight_decay=0.05,
        mixup=0.8,
        cutmix=1.0,
        ema_decay=0.0,
    ),
    search_learning_rate=2e-5,
    retention_learning_rate=2e-2,
    penalties=(1e-4, 1e-3, 1e-2),
    full_penalties=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    methods=("random", "power_bert", "wkmedoids"),
    stands_for="deit_tiny",
    main=Variant("", "DeiT-Ti"),
    model_options={"num_classes": 10, "drop_path_rate": 0.1},
    trainer_options={"precision": "bf16-mixed"},
    epoch_seconds=60.0,
    evaluation_seconds=30.0,
)
