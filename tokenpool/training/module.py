"""The LightningModule that trains and tests image classifiers, and learns retention schedules."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.utilities.distributed import gather_all_tensors

from tokenpool.training import dynamic_selection, soft_selection, stochastic_depth
from tokenpool.training.recipe import Recipe
from tokenpool.training.seeding import step_seed


class ClassificationModule(LightningModule):
    """Train with cross-entropy, AdamW and a cosine schedule, and test top-1 and top-5 accuracy.

    Labels are classes (B,), or targets (B, classes) from mixup. If the model has soft selection (PoWER-BERT's second
    stage), the loss includes `retention_penalty` of the recipe times `soft_selection.retention_loss`, and the retention
    weights have a separate learning rate. If the model has predictors of DynamicViT, the loss includes
    `dynamic_selection.losses`. Their teacher is the model without predictors, with the weights that it has now.

    The seed of each step depends on the number of the step, and checkpoints contain the sums for the epoch's training
    loss. So a run that is resumed within an epoch has the same result as an uninterrupted run.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes).
        num_classes: number of classes of the data.
        recipe: hyper-parameters. `epochs` is not used here but by the Trainer, and the data module uses the fields for
            images.
        seed: seed of stochastic layers, such as stochastic depth and random selection.
        outputs: the model's output for each class of the data, see `tokenpool.training.labels.outputs_of`. Loss and
            accuracy ignore other logits. None means all outputs in their order.

    Attributes:
        recipe: hyper-parameters.
        ema: timm's `ModelEmaV3`, whose `module` has the averaged weights, or None without `ema_decay`.
        correct: (images,) booleans after a test, whether each image is classified correctly, in the order of the data
            set. Each process has all values if an `EvaluationSampler` distributes the images. None before a test.
        ema_correct: the same for the averaged weights.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        recipe: Recipe = Recipe(),
        seed: int = 0,
        outputs: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.outputs: Tensor | None
        self.register_buffer("outputs", None if outputs is None else torch.tensor(outputs), persistent=False)
        self.recipe = recipe
        self.seed = seed
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay).requires_grad_(False) if recipe.ema_decay else None
        accuracy: dict[str, Metric | MetricCollection] = {
            name: MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro")
            for name, k in (("top1", 1), ("top5", 5))
        }
        measures = MetricCollection(accuracy | {"loss": MeanMetric(nan_strategy="disable")}, compute_groups=False)
        self.train_metrics = MetricCollection(
            {"top1": accuracy["top1"], "loss": MeanMetric(nan_strategy="disable")}, compute_groups=False
        ).clone(prefix="train_")
        self.val_metrics, self.test_metrics = measures.clone(prefix="val_"), measures.clone(prefix="test_")
        self.val_ema_metrics, self.test_ema_metrics = (
            measures.clone(prefix="val_ema_"),
            measures.clone(prefix="test_ema_"),
        )
        self.correct: Tensor | None = None
        self.ema_correct: Tensor | None = None
        self._tested: list[list[Tensor]] = [[], []]  # correctness for each batch: of the model, of its moving average
        self._shared_generator: torch.Generator | None = None
        self.searches = bool(soft_selection.layers(model))
        self.predicts = bool(dynamic_selection.layers(model))
        self.teacher = dynamic_selection.teacher_of(model) if self.predicts and recipe.distillation else None

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def setup(self, stage: str) -> None:
        ranks = self.trainer.world_size
        if stage == "fit" and ranks > 1:
            self._shared_generator = torch.Generator(self.device)
            stochastic_depth.share(self.model, self._shared_generator, self.global_rank, ranks)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        accumulated = self.trainer.accumulate_grad_batches
        step = self.global_step * accumulated + batch_idx % accumulated
        torch.manual_seed(step_seed(self.seed, step, self.global_rank))
        if self._shared_generator is not None:
            self._shared_generator.manual_seed(step_seed(self.seed, step))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        penalty: Tensor | None = None
        if self.predicts:
            weights = self.recipe.ratio_penalty, self.recipe.distillation
            logits, penalty = dynamic_selection.losses(self.model, self.teacher, images, *weights)
        else:
            logits = self(images)
        logits = self._of_the_data(logits)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        loss = loss if penalty is None else loss + penalty
        if self.searches:
            loss = loss + self.recipe.retention_penalty * soft_selection.retention_loss(self.model)
        self._check_finite(loss.detach())
        classes = labels.argmax(-1) if labels.dim() == 2 else labels  # mixed image: its larger class
        self.train_metrics["top1"].update(logits.detach(), classes)
        self.train_metrics["loss"].update(loss.detach(), weight=len(images))
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics.compute())
        self.train_metrics.reset()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.searches:
            soft_selection.clamp_retention(self.model)
        if self.ema is not None:
            self.ema.update(self.model)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, self.val_ema_metrics)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation(self.val_metrics, self.val_ema_metrics)

    def on_test_epoch_start(self) -> None:
        self._tested = [[], []]

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        found = self._evaluate(batch, self.test_metrics, self.test_ema_metrics)
        for correct, logits in zip(self._tested, found, strict=True):
            if logits is not None:
                correct.append(logits.argmax(-1) == batch[1])

    def on_test_epoch_end(self) -> None:
        self._log_evaluation(self.test_metrics, self.test_ema_metrics)
        self.correct, self.ema_correct = (_of_all_processes(correct) for correct in self._tested)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the sums of the current epoch over all processes."""
        sums = {}
        for name, metric in self.train_metrics.items(keep_base=True):
            with metric.sync_context():
                state = metric.metric_state
                sums[name] = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
        checkpoint["train_sums"] = sums

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_rank == 0:  # only one process gets the sums of all processes
            for name, sums in checkpoint.get("train_sums", {}).items():
                for key, value in sums.items():
                    setattr(self.train_metrics[name], key, value.to(self.device))

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, ema: MetricCollection
    ) -> list[Tensor | None]:
        """Update metrics. Return the logits of the model, and of its moving average or None."""
        images, labels = batch
        found: list[Tensor | None] = []
        for model, measures in ((self.model, metrics), (self.ema, ema)):
            logits = None if model is None else self._of_the_data(model(images))
            if logits is not None:
                measures["top1"].update(logits, labels)
                measures["top5"].update(logits, labels)
                measures["loss"].update(F.cross_entropy(logits, labels, reduction="none"))
            found.append(logits)
        return found

    def _of_the_data(self, logits: Tensor) -> Tensor:
        return logits if self.outputs is None else logits[:, self.outputs]

    def _log_evaluation(self, metrics: MetricCollection, ema: MetricCollection) -> None:
        for measures in (metrics, ema) if self.ema is not None else (metrics,):
            self.log_dict(measures.compute(), prog_bar=True)
            measures.reset()

    def _check_finite(self, loss: Tensor) -> None:
        """Stop all processes before the optimiser step if the loss of any process is not finite."""
        finite = loss.isfinite().float()
        if self.trainer.world_size > 1:
            finite = self.trainer.strategy.reduce(finite, reduce_op="min")
        if not finite:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            value = "not finite in another process" if loss.isfinite() else loss.item()
            raise FloatingPointError(
                f"the loss is {value} at step {self.global_step}: lower the learning rate, now {rate:.3g}"
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        retention = {id(layer.retention): layer.retention for layer in soft_selection.layers(self.model)}
        spared: Collection[str] = getattr(self.model, "no_weight_decay", tuple)()
        groups = param_groups_weight_decay(self.model, self.recipe.weight_decay, no_weight_decay_list=spared)
        if retention:
            for group in groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in retention]
            retention_group = {"params": list(retention.values()), "lr": self.recipe.retention_learning_rate}
            groups.append(retention_group | {"weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=self.recipe.learning_rate)

        total = self._total_steps()
        warmup = self.recipe.warmup_epochs * total / max(self.trainer.max_epochs or 1, 1)

        end = self.recipe.final_learning_rate / self.recipe.learning_rate if self.recipe.learning_rate else 0.0

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
            return end + (1 - end) * cosine

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def _total_steps(self) -> int:
        """Return the number of optimiser steps of the whole fit.

        Lightning's own estimate starts the workers of the loader, before a resumed run knows its epoch.
        """
        trainer = self.trainer
        data = trainer.datamodule  # type: ignore[attr-defined]  # a property that Lightning adds later
        if data is None or trainer.max_epochs in (None, -1) or trainer.max_steps != -1:
            return int(trainer.estimated_stepping_batches)
        batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches)


def _of_all_processes(parts: list[Tensor]) -> Tensor | None:
    """Gather values of all images in the order of the data set. Process r of R has images r, r + R, ..."""
    if not parts:
        return None
    mine = torch.cat(parts)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mine.cpu()
    shares = gather_all_tensors(mine)  # the lengths can differ
    found = torch.empty(sum(map(len, shares)), dtype=mine.dtype)
    for rank, share in enumerate(shares):
        found[rank :: len(shares)] = share.cpu()
    return found
