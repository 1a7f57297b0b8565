"""PiToMe: a matching that protects tokens of low energy."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampler, Host
from tokenpool.downsampling.matching import Matching, rounds
from tokenpool.eager import without_autocast


class PiToMe(Matching):
    """PiToMe (Tran et al. 2024, section 3): merge tokens of high energy, protect tokens of low energy.

    The energy of token i is high if many keys are similar to its key:

        E_i = mean over j of f(cos(k_i, k_j)),  f(x) = x if x >= m, else exp(x - m) - 1

    To remove r tokens, the 2r tokens of highest energy are sorted by energy and alternately assigned to the sets A and
    B. Each token of A is merged into the token of B whose key is most similar. The other tokens are protected. Block
    l = 0..L-1 has the margin m = 0.75 (1 - l / L). The method has proportional attention (`carry=True`).

    Paper and published code differ. The margin is 0.9 - 0.9 l / L in the paper, and 0.75 - 0.75 l / L in the code
    (other numbers in some versions); here 0.75. The code computes f(x) = x - m for x >= m, so that f has no jump; here
    as in the paper, whose factor alpha before exp(x - m) - 1 is 1. In half of the blocks, the code takes A and B from
    all tokens and merges the r most similar pairs; here all blocks protect tokens, as in the paper. Whether j includes
    i does not matter, because it adds the same number to all energies; here it does. The paper has one round, which
    removes at most half of the tokens; for more rounds see `Matching`.

    Args:
        keep: maximum number of tokens that remain.
        margin: the margin m of this block.

    Raises:
        ValueError: if `margin` is not a finite number.
    """

    def __init__(self, keep: int, margin: float = 0.75) -> None:
        super().__init__(keep)
        if not isinstance(margin, Real) or isinstance(margin, bool) or not math.isfinite(margin):
            raise ValueError(f"margin = {margin!r} must be a finite number")
        self.margin: float = margin

    @classmethod
    def for_blocks(  # type: ignore[override]  # the base class passes **options to all blocks
        cls, host: Host, keep: Sequence[int] | None, margin: float = 0.75
    ) -> list[Downsampler | None]:
        """Create a downsampler for each block.

        Args:
            host: see `Downsampler.for_blocks`.
            keep: see `Downsampler.for_blocks`.
            margin: margin of the first block. Block l = 0..L-1 has the margin (1 - l / L) times as high.

        Raises:
            ValueError: see `Downsampler.for_blocks` and the class.
        """
        layers = super().for_blocks(host, keep, margin=margin)
        for block, layer in enumerate(layers):
            layer.margin = margin * (1 - block / host.depth)  # type: ignore[union-attr]
        return layers

    def match(self, keys: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        with without_autocast(keys.device):
            units = clustering.unit_vectors(keys)
            similarity = torch.bmm(units, units.mT)  # (B, N, N)
            far = (similarity - self.margin).exp() - 1
            energy = torch.where(similarity >= self.margin, similarity, far).mean(dim=2)  # (B, N)
        mergeable = clustering.stable_topk(energy, 2 * pairs)  # (B, 2r)
        merged, others = mergeable[:, ::2], mergeable[:, 1::2]  # (B, r) each, A and B
        rows = similarity.gather(1, merged[:, :, None].expand(-1, -1, similarity.shape[2]))  # (B, r, N)
        partner = rows.gather(2, others[:, None, :].expand(-1, pairs, -1)).max(dim=2).indices  # (B, r), an index into B
        return merged, others.gather(1, partner)

    def macs(self, n: int, width: int, key_width: int) -> int:
        macs = 0
        for pairs in rounds(n, self.keep):
            macs += n * n * key_width  # similarity of all pairs, in each round
            n -= pairs
        return macs

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin:g}"
