"""Training: the recipe, the LightningModule, the data modules, and what makes a training repeatable."""

from tokenpool.extras import require

require(__name__, "train", "lightning", "torchmetrics", "torchvision", "sklearn", "PIL", "tqdm")
