"""ATC: agglomerative clustering of keys."""

import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.clustering.agglomeration import Linkage
from tokenpool.downsampling.contract import Downsampled, Downsampler
from tokenpool.eager import without_autocast

LINKAGES: tuple[Linkage, ...] = ("average", "complete", "single")  # of the paper


class ATC(Downsampler):
    """Agglomerative Token Clustering (Haurum et al. 2024): merge the two nearest clusters until K remain.

    The distance of two tokens is 1 - cos(k_i, k_j), where k is the attention's key, the mean over heads. The distance
    of two clusters I and J, which have |I| and |J| tokens, is

        average:  sum over i in I and j in J of (1 - cos(k_i, k_j)) / (|I| |J|)
        complete: max over i in I and j in J of (1 - cos(k_i, k_j))
        single:   min over i in I and j in J of (1 - cos(k_i, k_j))

    A cluster becomes the mean of its tokens, weighted by size. The sizes do not change the distances: a token of an
    earlier merge counts as one token, as in the published code, which calls scikit-learn. Ties are broken as in
    `clustering.agglomeration`. Proportional attention (`carry`) is an option of the published code, and part of
    its command for training. The loop over merges has N - K steps. A compiled or exported model contains each step, so
    it is large if many tokens are merged.

    Args:
        keep: maximum number of clusters.
        linkage: "average", "complete" or "single".

    Raises:
        ValueError: for an unknown `linkage`.
    """

    uses_scores = False
    uses_sizes = True
    uses_keys = True
    merges = True

    def __init__(self, keep: int, linkage: str = "average") -> None:
        super().__init__(keep)
        if linkage not in LINKAGES:
            raise ValueError(f"linkage = {linkage!r} must be one of {', '.join(map(repr, LINKAGES))}")
        self.linkage = linkage

    def reduce(self, tokens: Tensor, scores: Tensor | None, *, sizes: Tensor, keys: Tensor) -> Downsampled:
        with without_autocast(keys.device):
            units = clustering.unit_vectors(keys)
            assignment = clustering.agglomerate(1 - torch.bmm(units, units.mT), self.keep, self.linkage)
        return Downsampled(clustering.means(tokens, sizes, assignment, self.keep), assignment)

    def macs(self, n: int, width: int, key_width: int) -> int:
        return n * n * key_width  # all similarities, once; updates of distances are no matrix products
