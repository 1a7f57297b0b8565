"""The LightningModule: trains and tests any image classifier, and learns a retention schedule where there is one."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tokenpool import soft_selection
from tokenpool.seeding import step_seed


class ClassificationModule(LightningModule):
    """Train with cross-entropy, AdamW and a cosine schedule; test top-1 and top-5 accuracy.

    With soft selection in the model (PoWER-BERT's second stage) the loss gains `retention_penalty` times
    `soft_selection.retention_loss`, and the retention weights have their own learning rate.

    Every step is seeded by its number, so that a run resumed at an epoch's end repeats what an uninterrupted one does.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes).
        num_classes: number of classes.
        learning_rate: of AdamW, at its peak.
        weight_decay: of AdamW; biases, norms and embeddings are spared.
        warmup_epochs: over which the learning rate rises linearly.
        label_smoothing: of the cross-entropy.
        retention_penalty: the weight lambda of the retention loss.
        retention_learning_rate: of the retention weights, at its peak.
        seed: of stochastic layers, such as stochastic depth and random selection.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.05,
        warmup_epochs: float = 5,
        label_smoothing: float = 0.1,
        retention_penalty: float = 0.0,
        retention_learning_rate: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.label_smoothing = label_smoothing
        self.retention_penalty = retention_penalty
        self.retention_learning_rate = retention_learning_rate
        self.seed = seed
        accuracy = {
            name: MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro")
            for name, k in (("top1", 1), ("top5", 5))
        }
        self.val_metrics = MetricCollection(accuracy, prefix="val_")
        self.test_metrics = MetricCollection(accuracy, prefix="test_").clone()
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.searches = bool(soft_selection.layers(model))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        accumulated = self.trainer.accumulate_grad_batches
        step = self.global_step * accumulated + batch_idx % accumulated
        torch.manual_seed(step_seed(self.seed, step, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.searches:
            loss = loss + self.retention_penalty * soft_selection.retention_loss(self.model)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.global_step}; lower the learning rate")
        self.train_top1(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train_top1", self.train_top1, on_step=False, on_epoch=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.searches:
            soft_selection.clamp_retention(self.model)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, stage: str) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> dict:
        retention = {id(layer.retention): layer.retention for layer in soft_selection.layers(self.model)}
        spared = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        groups = param_groups_weight_decay(self.model, self.weight_decay, no_weight_decay_list=spared)
        if retention:
            for group in groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in retention]
            retention_group = {"params": list(retention.values()), "lr": self.retention_learning_rate}
            groups.append(retention_group | {"weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)

        total = self._total_steps()
        warmup = self.warmup_epochs * total / max(self.trainer.max_epochs or 1, 1)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def _total_steps(self) -> int:
        """Steps of the optimiser in the whole fit.

        Lightning's own estimate would start the loader's workers before a resumed run knows its epoch.
        """
        trainer = self.trainer
        if trainer.datamodule is None or trainer.max_epochs in (None, -1) or trainer.max_steps != -1:
            return trainer.estimated_stepping_batches
        batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches)
