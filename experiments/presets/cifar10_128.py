"""The paper's protocol on natural images, on two CPU cores: a pretrained DeiT-Ti, fine-tuned on CIFAR-10 at 128 pixels.

    python -m experiments reproduce --preset cifar10_128 --full --data cifar10     # a night on two cores
    python -m experiments reproduce --preset cifar10_128 --full --data FOLDER --weights FILE

The data are cifar10 (downloaded by torchvision), a FOLDER with train/<class>/* and test/<class>/*, or
hf:uoft-cs/cifar10. Without --weights, timm downloads the weights. The training set is the first 1,000 images of each
class, 10,000 in total. The test set is all 10,000 test images. All images are decoded and enlarged once, and take 1 GB
in $TOKENPOOL_CACHE (~/.cache/tokenpool).

As in the paper, fine-tuning has as many epochs as the base model. All runs have three seeds, except evaluations without
fine-tuning, random initial centres, convolutions and methods of other papers. The study runs one seed after another and
can be stopped at any time.

The study fine-tunes other methods, too: EViT, ATC, ToMe, MCTF, DynamicViT, KeyMedoids and Ward pooling with the same
schedules, and HVT at three placements. They have seed 2 only, because only its base model's weights are kept; with the
weights of seed 0, `added_seeds=(0, 2)` adds that seed. All have the recipe of the paper's methods. Sizes are carried as
in their own papers: for ATC, ToMe and MCTF. DynamicViT has its published weights of the ratio loss (2) and of each
distillation loss (0.5), but other settings than published: a predictor in each block that removes tokens instead of
three, 2 epochs instead of 30, one learning rate for predictors and backbone, and no epochs with a frozen backbone. HVT
starts from the base model and keeps its class token; its authors train from the start.

Cost: about eleven hours on two cores, and 3 GB of memory for each process. An epoch of the plain model takes 300 s with
two threads, and its test 95 s. On one H100 (--jobs 14, with NVIDIA's multi-process service and 16 cores), 187 runs took
12 minutes. results/cifar10_128 has 260 of the 276 runs. The other 16 runs measure time and do not exist yet.

Expected: 87.6 % for the plain model after fine-tuning. At 0.135 of 0.374 GMACs, PoWER-BERT has 71.2 %, K-Medoids
77.6 %, WK-Medoids 75.6 %.
"""

from experiments.presets import Preset, Variant
from tokenpool.training.recipe import Recipe

PRESET = Preset(
    name="cifar10_128",
    title="CIFAR-10 at 128 pixels",
    data="cifar10",
    model="deit_tiny_patch16_224",
    pretrained=True,
    depth=12,
    grid=8,
    clustered_level=1,
    redundancy_images=200,
    base_epochs=2,
    search_epochs=1,
    finetune_epochs=2,
    recipe=Recipe(
        batch_size=64,
        learning_rate=1e-4,
        warmup_epochs=0.2,
        final_learning_rate=1e-6,
        label_smoothing=0.1,
        weight_decay=0.05,
        crop_pct=1.0,
        augmentation="light",
        train_per_class=1000,
        test_per_class=1000,
    ),
    search_learning_rate=2e-5,
    retention_learning_rate=2e-2,
    # Found by short trials. The schedules cost about 0.27 to 0.09 GMACs; the plain model costs 0.37.
    penalties=(2e-4, 1.5e-3, 8e-3),
    full_penalties=(2e-4, 6e-4, 1.5e-3, 4e-3, 8e-3),
    methods=("random", "power_bert", "wkmedoids"),
    full_seeds=(0, 1, 2),
    # Single convolutions over the whole depth, and a few of the 96 pairs and triples that appendix D allows.
    placements=((1,), (3,), (5,), (7,), (9,), (11,), (1, 5), (3, 7), (5, 9), (1, 4, 7), (3, 6, 9)),
    rivals=("evit", "atc", "tome", "mctf", "dynamicvit", "key_medoids", "ward", "hvt"),
    # Of HVT. These cost 0.27, 0.17 and 0.09 GMACs, as much as the schedules do.
    rival_placements=((5,), (2, 5), (0, 2, 4)),
    added_seeds=(2,),
    stands_for="deit_tiny",
    main=Variant("", "DeiT-Ti"),
    model_options={"num_classes": 10, "img_size": 128},
    trainer_options={"limit_val_batches": 0},  # validation would take a third of the time of an epoch
    epoch_seconds=300.0,
    evaluation_seconds=95.0,
    pooled_effort=0.6,
)
