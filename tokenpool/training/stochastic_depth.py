"""Stochastic depth (Huang et al. 2016) that the number of processes does not change."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class SharedDropPath(DropPath):
    """timm's DropPath for one of several processes, which draws for the images of all of them and takes its own.

    Args:
        drop_path: the one in whose place it stands.
        generator: of the draws, with the same state in all processes.
        rank: number of this process, which has every `ranks`-th image from the `rank`-th on.
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
    """Put a `SharedDropPath` in the place of each of the model's DropPaths. Weights keep their names."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                setattr(parent, name, SharedDropPath(child, generator, rank, ranks).train(child.training))
