"""The protocol on CIFAR-10 at 224 pixels, on one GPU: a pretrained DeiT-Ti, fine-tuned, with schedules of its own.

    python -m experiments figure 5a --preset cifar10 --run --data FOLDER [--weights FILE] --jobs 1
    python -m experiments submit --preset cifar10 --all --data FOLDER --template my-cluster.sh

FOLDER contains train/<class>/* and test/<class>/*, or is hf:uoft-cs/cifar10. Without --weights, timm downloads the
weights. The study is close to the paper's fine-tuning, and is small enough for one GPU and one day.

Cost and expected result: not measured, because we had no GPU. Estimates assume one minute for each epoch. The preset
was tested with 40 training and 20 test images: `figure 5a --quick` then takes 6 minutes on a CPU. The accuracies of
this test are meaningless.
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
