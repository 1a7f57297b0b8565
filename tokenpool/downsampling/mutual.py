"""Merge pairs of mutual nearest neighbours (MPM)."""

import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.matching import Matching, rounds
from tokenpool.eager import without_autocast


class MutualPairs(Matching):
    """Mutual pair merging (MPM; Ravé et al. 2026, arXiv:2604.05718), to compare with.

    Two tokens are a pair if each is the nearest neighbour of the other, by the cosine of their keys. The pairs of
    highest similarity are merged into their means, weighted by size.

    The paper merges all pairs of a block and has no schedule. Here exactly K tokens remain. If a block has too few
    pairs, the other tokens of highest similarity follow their nearest neighbour into its group. One round removes at
    most half of the tokens. Further rounds follow if fewer tokens have to remain.

    Args:
        keep: maximum number K of tokens that remain.
    """

    def match(self, keys: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        batch, n, _ = keys.shape
        index = torch.arange(n, device=keys.device).expand(batch, n)
        similarity, nearest = _nearest_neighbours(keys)  # (B, N) each
        in_pair = nearest.gather(1, nearest) == index
        # The second token of a pair goes to the first. Other tokens come after all pairs. First tokens never go: they
        # are at most half of the tokens.
        rank = torch.where(in_pair, torch.where(nearest < index, 2, 0), 1)
        by_similarity = clustering.stable_topk(similarity, n)
        place = torch.zeros_like(index).scatter(1, by_similarity, index)  # (B, N), 0 for the highest similarity
        merged = clustering.stable_topk(rank * n - place, pairs)  # by rank, then by similarity
        target = index.scatter(1, merged, nearest.gather(1, merged))
        for _ in range((int(n) - 1).bit_length()):  # each step doubles the length of the followed chains of neighbours
            target = target.gather(1, target)
        return merged, target.gather(1, merged)

    def macs(self, n: int, width: int, key_width: int) -> int:
        macs = 0
        for pairs in rounds(n, self.keep):
            macs += n * n * key_width  # similarity of all tokens, in each round
            n -= pairs
        return macs


def _nearest_neighbours(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest cosine similarity (B, N) of each token to another one, and the index (B, N) of that token."""
    with without_autocast(keys.device):
        units = clustering.unit_vectors(keys)
        similarity = torch.bmm(units, units.mT)  # (B, N, N)
    # With rounding that differs between (i, j) and (j, i), the neighbours of equal tokens could form a circle.
    similarity = torch.maximum(similarity, similarity.mT)
    similarity = similarity.masked_fill(torch.eye(keys.shape[1], device=keys.device) > 0, -torch.inf)
    nearest = similarity.argmax(dim=2)  # in a tie the first
    return similarity.gather(2, nearest[:, :, None]).squeeze(2), nearest
