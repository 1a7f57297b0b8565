"""Prune tokens, then merge tokens, by separate counts (DiffRate)."""

from collections.abc import Sequence
from math import prod
from numbers import Integral

import torch
from torch import Tensor

from tokenpool import clustering, schedules
from tokenpool.downsampling.contract import Downsampled, Downsampler, Host
from tokenpool.eager import without_autocast


class DiffRate(Downsampler):
    """Prune and merge by the counts of DiffRate (Chen et al. 2023, section 3), to compare with.

    Tokens are sorted by the attention of the class token. The last ones are pruned. Of the rest, the first K tokens
    stay, and each of the others is merged into the most similar of them (cosine of the tokens). Means are weighted by
    size.

    DiffRate learns the counts of each block. `schedules.diffrate` has the published ones:
    `patch(model, "diffrate", "diffrate_deit_small:2.9", prune="diffrate_deit_small:2.9")`.

    Args:
        keep: maximum number K of tokens that remain.
        prune: number of tokens that remain after pruning. K or less means that nothing is merged. Default: half of the
            tokens that the block removes are pruned, and half are merged.

    Raises:
        ValueError: if `prune` is negative or not a whole number.
    """

    uses_scores = False
    uses_sizes = True
    uses_class_attention = True

    def __init__(self, keep: int, prune: int | None = None) -> None:
        super().__init__(keep)
        if prune is not None and (isinstance(prune, bool) or not isinstance(prune, Integral) or prune < 0):
            raise ValueError(f"prune = {prune!r} must be a whole number that is not negative, or None")
        self.prune = prune

    @classmethod
    def for_blocks(  # type: ignore[override]  # `prune` replaces the base class's **options
        cls, host: Host, keep: Sequence[int] | None, prune: Sequence[int] | str | None = None
    ) -> list[Downsampler | None]:
        """Create one downsampler for each block.

        Args:
            host: properties of the model.
            keep: retention schedule.
            prune: the number of patch tokens that remain in each block after pruning and before merging, as a list or
                as the name of a published schedule, such as "diffrate_deit_small:2.9". Default: see the class.

        Raises:
            ValueError: for an unusable `keep` or `prune`.
        """
        layers = super().for_blocks(host, keep)
        if prune is None:
            return layers
        if isinstance(prune, str):
            model, _, gflops = prune.partition(":")
            prune = schedules.diffrate(model, gflops, prod(host.grid), host.depth).pruned
        limits = schedules.checked(prune, host.depth, name="prune")
        return [cls(layer.keep, limit) for layer, limit in zip(layers, limits, strict=True)]  # type: ignore[union-attr]

    def reduce(self, tokens: Tensor, scores: Tensor | None, *, sizes: Tensor, class_attention: Tensor) -> Downsampled:
        batch, n, width = tokens.shape
        order = clustering.stable_topk(class_attention, self._after_pruning(n))  # (B, M), most attended first
        stay, go = order[:, : self.keep].sort(dim=1).values, order[:, self.keep :]  # (B, K), (B, M - K)
        assignment = torch.full((batch, n), -1, device=tokens.device)
        assignment = assignment.scatter(1, stay, torch.arange(self.keep, device=tokens.device).expand(batch, -1))
        with torch.no_grad(), without_autocast(tokens.device):
            units = clustering.unit_vectors(tokens)
            sources, targets = (units.gather(1, rows[:, :, None].expand(-1, -1, width)) for rows in (go, stay))
            partner = torch.bmm(sources, targets.mT).argmax(dim=2)  # (B, M - K), an index into `stay`
        assignment = assignment.scatter(1, go, partner)
        weights = sizes * (assignment >= 0)
        return Downsampled(clustering.means(tokens, weights, assignment.clamp(min=0), self.keep), assignment)

    def _after_pruning(self, n: int) -> int:
        """Return the number of tokens that pruning leaves, K to n."""
        limit = n - (n - self.keep) // 2 if self.prune is None else self.prune
        return min(max(limit, self.keep), n)

    def macs(self, n: int, width: int, key_width: int) -> int:
        return (self._after_pruning(n) - self.keep) * self.keep * width

    def extra_repr(self) -> str:
        return f"keep={self.keep}, prune={self.prune}"
