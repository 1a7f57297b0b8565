"""The protocol on scikit-learn's handwritten digits: a small DeiT, minutes on a CPU, no download."""

from experiments.presets import Preset

PRESET = Preset(
    name="digits",
    data="digits",
    model="deit_digits_patch2_16",
    base_epochs=50,
    search_epochs=12,
    finetune_epochs=12,
    batch_size=32,
    learning_rate=1e-3,
    warmup_epochs=3,
    label_smoothing=0.1,
    weight_decay=0.05,
    search_learning_rate=2e-4,
    retention_learning_rate=2e-2,
    penalties=(1e-4, 1e-3, 1e-2, 1e-1),
    full_penalties=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    methods=("random", "power_bert", "wkmedoids"),
    full_methods=("random", "importance", "power_bert", "kmeans", "kmedoids", "wkmeans", "wkmedoids"),
    convolutions=((0,), (1,), (2,), (3,), (4,), (5,)),
    model_options={"weight_init": "jax"},  # timm's default starts too small for so narrow a model
)
