"""Stochastic depth (Huang et al. 2016) whose result does not depend on the number of processes."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class SharedDropPath(DropPath):
    """timm's DropPath for several processes. Each process draws for the images of all processes, and uses its own.

    Args:
        drop_path: the module to replace.
        generator: generator with the same state in all processes.
        rank: index of this process. The process has every `ranks`-th image, starting at image `rank`.
        ranks: number of processes.
    """

    def __init__(self, drop_path: DropPath, generator: torch.Generator, rank: int, ranks: int) -> None:
        super().__init__(drop_path.drop_prob, drop_path.scale_by_keep)
        self.generator = generator
        self.rank = rank
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        kept = 1 - self.drop_prob
        mask = x.new_empty(len(x) * self.ranks, *[1] * (x.dim() - 1)).bernoulli_(kept, generator=self.generator)
        mask = mask[self.rank :: self.ranks]  # (B, 1, ..., 1)
        return x * (mask / kept if self.scale_by_keep and kept > 0 else mask)


def share(model: nn.Module, generator: torch.Generator, rank: int, ranks: int) -> None:
    """Replace each DropPath of a model by a `SharedDropPath`, in place. The names of weights do not change.

    Args:
        model: the model.
        generator: see `SharedDropPath`.
        rank: see `SharedDropPath`.
        ranks: see `SharedDropPath`.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                setattr(parent, name, SharedDropPath(child, generator, rank, ranks).train(child.training))
