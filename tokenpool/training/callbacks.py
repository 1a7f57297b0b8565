"""Lightning callbacks that measure cost and reconstruction error."""

import math

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool import flops, hosts, tracing
from tokenpool.downsampling import Downsampled
from tokenpool.patching import is_patched


class FlopsCallback(Callback):
    """Log the cost of the model at the start of a fit: `gmacs`, `backbone_gmacs`, `clustering_gmacs`, `gmacs/PART`.

    The network must be the attribute `model` of the LightningModule.

    Attributes:
        count: the count. None before the fit starts.
    """

    count: flops.Count | None = None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.count = flops.count(_network(module))
        figures = {
            "gmacs": self.count.gmacs,
            "backbone_gmacs": self.count.backbone_gmacs,
            "clustering_gmacs": self.count.clustering_gmacs,
        } | {f"gmacs/{part}": value for part, value in self.count.parts.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=0)


class ReconstructionErrorCallback(Callback):
    """Measure the reconstruction error of the downsampler in each block during a test.

    The network must be the attribute `model` of the LightningModule. For a plain network nothing is measured.
    """

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}
        self._handles: list[RemovableHandle] = []
        self._depth = 0

    @property
    def relative(self) -> list[float | None]:
        """For each block, the error of equation (8) divided by the squared distance of input tokens to their mean.

        Both sums are over tokens and images. 0 for a block that does not downsample, None if no token remains.
        """
        shares: list[float | None] = [0.0] * self._depth
        for block, (error, spread) in self._sums.items():
            shares[block] = error / spread if math.isfinite(error) and spread > 0 else None
        return shares

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        if is_patched(_network(module)):
            self._depth = hosts.of(_network(module)).depth
            self._sums.clear()
            self._handles = tracing.watch(_network(module), self._add)

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        if trainer.world_size > 1 and self._depth:
            shared = torch.zeros(self._depth, 2, device=module.device)
            for block, sums in self._sums.items():
                shared[block] = torch.tensor(sums)
            shared = trainer.strategy.reduce(shared, reduce_op="sum")  # each process has different images
            self._sums = {block: sums for block, sums in enumerate(shared.tolist()) if any(sums)}

    def _add(self, block: int, before: Tensor, after: Downsampled) -> None:
        centred = before.float() - before.float().mean(1, keepdim=True)  # (B, N, D)
        sums = self._sums.setdefault(block, [0.0, 0.0])
        sums[0] += tracing.reconstruction_error(before, after).sum().item()
        sums[1] += centred.square().sum().item()


def _network(module: LightningModule) -> nn.Module:
    return module.get_submodule("model")
