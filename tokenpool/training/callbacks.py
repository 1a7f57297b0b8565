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


class ReconstructionErrors:
    """The reconstruction error of the downsampler in each block, over all forward passes between `start` and `stop`.

    Attributes:
        sums: for each block that downsamples, the error of equation (8), and the squared distance of its input tokens
            to their mean. Both are sums over tokens and images.
    """

    def __init__(self) -> None:
        self.sums: dict[int, list[float]] = {}
        self.depth = 0
        self._handles: list[RemovableHandle] = []

    @property
    def relative(self) -> list[float | None]:
        """For each block, the error divided by the squared distance of input tokens to their mean.

        0 for a block that does not downsample, None if no token remains. Empty for a plain model.
        """
        shares: list[float | None] = [0.0] * self.depth
        for block, (error, spread) in self.sums.items():
            shares[block] = error / spread if math.isfinite(error) and spread > 0 else None
        return shares

    def start(self, model: nn.Module) -> None:
        """Begin anew with a model. Of a plain model nothing is measured."""
        self.sums.clear()
        if is_patched(model):
            self.depth = hosts.of(model).depth
            self._handles = tracing.watch(model, self._add)

    def stop(self) -> None:
        """Measure no more forward passes."""
        for handle in self._handles:
            handle.remove()

    def _add(self, block: int, before: Tensor, after: Downsampled) -> None:
        centred = before.float() - before.float().mean(1, keepdim=True)  # (B, N, D)
        sums = self.sums.setdefault(block, [0.0, 0.0])
        sums[0] += tracing.reconstruction_error(before, after).sum().item()
        sums[1] += centred.square().sum().item()


class ReconstructionErrorCallback(Callback):
    """Measure the reconstruction error of the downsampler in each block during a test.

    The network must be the attribute `model` of the LightningModule. For a plain network nothing is measured.
    """

    def __init__(self) -> None:
        self._errors = ReconstructionErrors()

    @property
    def relative(self) -> list[float | None]:
        """See `ReconstructionErrors.relative`."""
        return self._errors.relative

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._errors.start(_network(module))

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        errors = self._errors
        errors.stop()
        if trainer.world_size > 1 and errors.depth:
            shared = torch.zeros(errors.depth, 2, device=module.device)
            for block, sums in errors.sums.items():
                shared[block] = torch.tensor(sums)
            shared = trainer.strategy.reduce(shared, reduce_op="sum")  # each process has different images
            errors.sums = {block: sums for block, sums in enumerate(shared.tolist()) if any(sums)}


def _network(module: LightningModule) -> nn.Module:
    return module.get_submodule("model")
