"""PoWER-BERT's soft selection: a retention schedule is learned (Goyal et al. 2020, section 3.3, second stage)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenpool.downsampling import Downsampled, Downsampler, Host


class SoftSelection(Downsampler):
    """Multiply each token by the retention weight of its rank by significance score.

    No token is removed. Training with the penalty `retention_loss` drives the weights of low ranks to zero; the sum of
    the weights then says how many tokens are worth keeping.

    Attributes:
        retention: (N,) parameter, one weight for each rank, kept in [0, 1], initially 1.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(keep=tokens)
        self.retention = nn.Parameter(torch.ones(tokens))

    @classmethod
    def for_blocks(cls, host: Host, keep: Sequence[int] | None = None, **options: Any) -> list["Downsampler | None"]:
        if keep is not None:
            raise ValueError("soft selection takes no keep: it learns one")
        return [cls(host.grid[0] * host.grid[1], **options) for _ in range(host.depth)]

    def acts_on(self, n: int) -> bool:
        return True

    def forward(self, tokens: Tensor, scores: Tensor | None = None, **hints: Tensor | None) -> Downsampled:
        if scores is None:
            raise ValueError("soft selection ranks tokens by their scores, got none")
        batch, n, _ = tokens.shape
        if n != len(self.retention):
            raise ValueError(f"soft selection was built for {len(self.retention)} tokens, got {n}")
        order = scores.argsort(dim=-1, descending=True, stable=True)  # (B, N), token of each rank
        everyone = torch.arange(n, device=order.device).expand(batch, n)
        return Downsampled(tokens * self.retention[order.argsort()][:, :, None], everyone)


def layers(model: nn.Module) -> list[SoftSelection]:
    """The soft selections of a model, first block first; an empty list where it has none."""
    return [module for module in model.modules() if isinstance(module, SoftSelection)]


def retention_loss(model: nn.Module) -> Tensor:
    """Sum over blocks l = 1..L of l times the sum of the block's retention weights: a scalar, to be scaled by lambda.

    Later blocks cost more, since whatever they keep the blocks before them had to keep as well.
    """
    return torch.stack([block * layer.retention.sum() for block, layer in enumerate(layers(model), start=1)]).sum()


@torch.no_grad()
def clamp_retention(model: nn.Module) -> None:
    """Put the retention weights back into [0, 1], to be called after each step of the optimiser."""
    for layer in layers(model):
        layer.retention.clamp_(0, 1)


def learned_schedule(model: nn.Module) -> list[int]:
    """The retention schedule that was learned: the rounded sum of the retention weights of each block."""
    return [round(layer.retention.sum().item()) for layer in layers(model)]
