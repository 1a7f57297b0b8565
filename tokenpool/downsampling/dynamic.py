"""Selection by a learned predictor (DynamicViT)."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpool import schedules
from tokenpool.downsampling.contract import Downsampled, Downsampler, Host, Masked
from tokenpool.downsampling.selection import Selection

LEAST_WEIGHT = 1e-6  # weight of a masked token in attention; with zero, its logarithm would have no gradient


class DynamicSelection(Selection):
    """DynamicViT (Rao et al. 2021), to compare with: a predictor learns which tokens to keep.

    The predictor maps each token to LayerNorm, a linear layer and GELU. Half of the result stays local. The other half
    becomes its mean over the tokens that remain. An MLP maps both to the log-probabilities of keeping and dropping the
    token. In evaluation, the K tokens most likely to be kept remain. A model must be trained: at first the weights of
    the predictor are random.

    In training, no token is dropped. Each token draws its decision (Gumbel-softmax, straight-through), and a token once
    dropped stays dropped. Attention then gives a dropped token almost no weight (see `Masked`). The ratio loss
    (`tokenpool.training.dynamic_selection`) lets the share of kept tokens approach K / N. In the paper, a dropped token
    still attends to itself; here it attends only to the kept tokens, which has no effect on them.

    Args:
        keep: maximum number K of tokens that remain.
        width: width D of the tokens.
    """

    uses_scores = False
    uses_sizes = True
    masks = True

    def __init__(self, keep: int, width: int) -> None:
        super().__init__(keep)
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    @classmethod
    def for_blocks(  # type: ignore[override]  # no options
        cls, host: Host, keep: Sequence[int] | None
    ) -> list[Downsampler | None]:
        """Create a predictor for each block that removes tokens.

        Args:
            host: properties of the model.
            keep: retention schedule.

        Raises:
            ValueError: for an unusable `keep`.
        """
        layers = super().for_blocks(host, keep, width=host.width)
        if host.is_dynamic:  # whether a block removes tokens depends on the image
            return layers
        limits = [layer.keep for layer in layers if layer is not None]
        entering = [prod(host.grid), *schedules.tokens_kept(limits, prod(host.grid))]
        return [layer if limit < n else None for layer, limit, n in zip(layers, limits, entering, strict=False)]

    def forward(self, tokens: Tensor, scores: Tensor | None = None, **hints: Tensor) -> Downsampled | Masked:
        batch, n, _ = tokens.shape
        if not self.training or not self.acts_on(n):
            return super().forward(tokens, scores)  # all sizes are 1, because nothing is merged
        logits = self._log_probabilities(tokens, hints["sizes"])  # sizes: the decisions of earlier blocks
        keeps = F.gumbel_softmax(logits.float(), hard=True)[:, :, 0]  # (B, N), 0 or 1, with the gradient of the softmax
        identity = torch.arange(n, device=tokens.device).expand(batch, n)
        # A token that several blocks drop has the least weight, not its power: that would be zero after some blocks.
        kept_before = (hints["sizes"] - LEAST_WEIGHT) / (1 - LEAST_WEIGHT)  # 0 or 1
        sizes = LEAST_WEIGHT + (1 - LEAST_WEIGHT) * kept_before * keeps
        return Masked(tokens, identity, sizes / hints["sizes"])

    def priority(self, tokens: Tensor, scores: Any) -> Tensor:
        return self._log_probabilities(tokens, torch.ones_like(tokens[:, :, 0]))[:, :, 0]

    def _log_probabilities(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Return the log-probabilities (B, N, 2) of keeping and of dropping each token.

        Args:
            tokens: (B, N, D).
            weights: (B, N), weight of each token in the mean.
        """
        embedded, half = self.embed(tokens), (tokens.shape[2] + 1) // 2
        local, shared = embedded[:, :, :half], embedded[:, :, half:]
        share = (weights / weights.sum(dim=1, keepdim=True)).to(shared.dtype)
        mean = (shared * share[:, :, None]).sum(dim=1, keepdim=True).expand_as(shared)
        return self.decide(torch.cat([local, mean], dim=2)).log_softmax(dim=2)

    def macs(self, n: int, width: int, key_width: int) -> int:
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        return n * (width * width + width * half + half * quarter + quarter * 2)
