"""Lightning callbacks, held against `flops.count` and against traces."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import tokenpool
from tokenpool import flops
from tokenpool.training.callbacks import FlopsCallback, ReconstructionErrorCallback

KEEP = [36, 17, 5, 0]
QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}


class Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(batch).sum()

    def test_step(self, batch, index):
        self.model(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_the_count_is_logged(small, photos, tmp_path: Path) -> None:
    callback, logger = FlopsCallback(), CSVLogger(tmp_path)
    tokenpool.patch(small, "wkmedoids", [9, 9, 9, 9])
    Trainer(max_steps=1, callbacks=[callback], logger=logger, **QUIET).fit(Module(small), DataLoader(photos))
    assert callback.count == flops.count(small)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        logged = next(csv.DictReader(file))
    assert float(logged["clustering_gmacs"]) == pytest.approx(callback.count.clustering_gmacs, rel=1e-6)
    assert float(logged["gmacs/mlp"]) == pytest.approx(callback.count.parts["mlp"], rel=1e-6)


def test_the_error_of_a_test_is_that_of_its_traces(small, photos) -> None:
    callback = ReconstructionErrorCallback()
    trainer = Trainer(callbacks=[callback], logger=False, **QUIET)
    trainer.test(Module(small), DataLoader(photos, batch_size=2), verbose=False)
    assert callback.relative == []  # a plain network

    tokenpool.patch(small, "power_bert", KEEP)
    inputs = []
    handle = small.blocks[1].downsampler.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    blocks = tokenpool.trace(small, photos).blocks
    handle.remove()
    trainer.test(Module(small), DataLoader(photos, batch_size=2), verbose=False)
    spread = (inputs[0] - inputs[0].mean(1, keepdim=True)).square().sum()
    relative = callback.relative
    assert relative[0] == 0 and relative[3] is None and relative[2] > 0
    assert relative[1] == pytest.approx((blocks[1].error.sum() / spread).item(), rel=1e-4)
    assert not small.blocks[1].downsampler._forward_hooks
