"""Training: the recipe, the LightningModule, the data modules, and tools for repeatable training."""

from tokenpool.extras import require

require(__name__, "train", "lightning", "torchmetrics", "torchvision", "sklearn", "PIL", "tqdm")
