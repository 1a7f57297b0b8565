"""PoWER-BERT's soft selection, which learns a retention schedule (Goyal et al. 2020, section 3.3, second stage)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenpool.downsampling import Downsampled, Downsampler, Host


class SoftSelection(Downsampler):
    """Multiply each token by the retention weight of its rank. Tokens are ranked by significance score.

    No token is removed. Training with the penalty `retention_loss` reduces the weights of low ranks to zero. The sum of
    the weights is then the number of tokens to keep.

    Args:
        tokens: number N of patch tokens.

    Attributes:
        retention: (N,) parameter, one weight in [0, 1] for each rank, initially 1.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(keep=tokens)
        self.retention = nn.Parameter(torch.ones(tokens))

    @classmethod
    def for_blocks(cls, host: Host, keep: Sequence[int] | None = None, **options: Any) -> list["Downsampler | None"]:
        if keep is not None:
            raise ValueError("soft selection learns a schedule: leave out keep")
        return [cls(host.grid[0] * host.grid[1], **options) for _ in range(host.depth)]

    def acts_on(self, n: int) -> bool:
        return True

    def forward(self, tokens: Tensor, scores: Tensor | None = None, **hints: Tensor | None) -> Downsampled:
        if scores is None:
            raise ValueError("soft selection needs the scores of the tokens, got None")
        batch, n, _ = tokens.shape
        if n != len(self.retention):
            raise ValueError(f"soft selection expects {len(self.retention)} tokens, got {n}")
        order = scores.argsort(dim=-1, descending=True, stable=True)  # (B, N), token of each rank
        identity = torch.arange(n, device=order.device).expand(batch, n)
        return Downsampled(tokens * self.retention[order.argsort()][:, :, None], identity)


def layers(model: nn.Module) -> list[SoftSelection]:
    """Return the soft selections of a model in the order of its blocks."""
    return [module for module in model.modules() if isinstance(module, SoftSelection)]


def retention_loss(model: nn.Module) -> Tensor:
    """Compute the retention loss: the sum over blocks l = 1..L of l times the sum of the block's retention weights.

    Later blocks have a higher factor, because a token that they keep must be kept by all earlier blocks, too.

    Args:
        model: a model with soft selection.

    Returns:
        A scalar, without the factor lambda.
    """
    return torch.stack([block * layer.retention.sum() for block, layer in enumerate(layers(model), start=1)]).sum()


@torch.no_grad()
def clamp_retention(model: nn.Module) -> None:
    """Clamp the retention weights to [0, 1]. Call this after each optimiser step."""
    for layer in layers(model):
        layer.retention.clamp_(0, 1)


def learned_schedule(model: nn.Module) -> list[int]:
    """Return the learned retention schedule: the rounded sum of the retention weights of each block."""
    return [round(layer.retention.sum().item()) for layer in layers(model)]
