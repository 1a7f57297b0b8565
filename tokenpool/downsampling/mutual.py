"""Merge pairs of mutual nearest neighbours (MPM)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler


class MutualPairs(Downsampler):
    """Mutual pair merging (MPM; Ravé et al. 2026, arXiv:2604.05718), to compare with.

    Two tokens are a pair if each is the nearest neighbour of the other, by the cosine of their keys. The pairs of
    highest similarity are merged into their means, weighted by size.

    The paper merges all pairs of a block and has no schedule. Here exactly K tokens remain. If a block has too few
    pairs, the other tokens of highest similarity follow their nearest neighbour into its group. One round removes at
    most half of the tokens. Further rounds follow if fewer tokens have to remain.

    Args:
        keep: maximum number K of tokens that remain.
    """

    uses_scores = False
    uses_sizes = True
    uses_keys = True
    merges = True

    def reduce(self, tokens: Tensor, scores: Tensor | None, *, sizes: Tensor, keys: Tensor) -> Downsampled:
        batch, n, _ = tokens.shape
        assignment = torch.arange(n, device=tokens.device).expand(batch, n)
        while n > self.keep:
            step = _paired(keys, min(n - self.keep, n // 2))  # (B, N)
            n -= min(n - self.keep, n // 2)
            keys = clustering.means(keys, sizes, step, n)
            tokens, sizes = clustering.means(tokens, sizes, step, n), clustering.sums(sizes, step, n)
            assignment = step.gather(1, assignment)
        return Downsampled(tokens, assignment)

    def macs(self, n: int, width: int, key_width: int) -> int:
        macs = 0
        while n > self.keep:
            macs += n * n * key_width  # similarity of all tokens, in each round
            n -= min(n - self.keep, n // 2)
        return macs


def _paired(keys: Tensor, merges: int) -> Tensor:
    """Return the output token (B, N) of each token if `merges` tokens go to their nearest neighbour, pairs first.

    Args:
        keys: (B, N, d).
        merges: number of tokens to remove, at most N // 2.
    """
    batch, n, _ = keys.shape
    index = torch.arange(n, device=keys.device).expand(batch, n)
    similarity, nearest = _nearest_neighbours(keys)  # (B, N) each
    in_pair = nearest.gather(1, nearest) == index
    # The second token of a pair goes to the first. Other tokens come after all pairs. First tokens never go: they are
    # at most half of the tokens.
    rank = torch.where(in_pair, torch.where(nearest < index, 2, 0), 1)
    by_similarity = clustering.stable_topk(similarity, n)
    place = torch.zeros_like(index).scatter(1, by_similarity, index)  # (B, N), 0 for the highest similarity
    merged = clustering.stable_topk(rank * n - place, merges)  # by rank, then by similarity
    target = index.scatter(1, merged, nearest.gather(1, merged))
    for _ in range(
        (int(n) - 1).bit_length()
    ):  # follow chains of neighbours to their ends; each step doubles the length
        target = target.gather(1, target)
    remains = torch.ones_like(index).scatter(1, merged, 0)
    return (remains.cumsum(dim=1) - 1).gather(1, target)


def _nearest_neighbours(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest cosine similarity (B, N) of each token to another one, and the index (B, N) of that token."""
    with torch.autocast(keys.device.type, enabled=False):
        units = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
        similarity = torch.bmm(units, units.mT)  # (B, N, N)
    # With rounding that differs between (i, j) and (j, i), the neighbours of equal tokens could form a circle.
    similarity = torch.maximum(similarity, similarity.mT)
    similarity = similarity.masked_fill(torch.eye(keys.shape[1], device=keys.device) > 0, -torch.inf)
    nearest = similarity.argmax(dim=2)  # in a tie the first
    return similarity.gather(2, nearest[:, :, None]).squeeze(2), nearest
