"""Methods that merge pairs of similar tokens."""

import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler
from tokenpool.eager import without_autocast


class Matching(Downsampler):
    """Base class: merge r tokens into r tokens that remain, each into a similar one.

    One round merges at most half of the tokens. If fewer tokens have to remain, further rounds follow, and the keys of
    merged tokens are averaged, too. A merged token is the mean of its tokens, weighted by size.
    """

    uses_scores = False
    uses_sizes = True
    uses_keys = True
    merges = True

    def match(self, keys: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        """Choose the tokens to merge.

        Args:
            keys: (B, N, d).
            pairs: number r of tokens to merge, at most N // 2.

        Returns:
            Indices (B, r) of the tokens to merge, and indices (B, r) of the tokens that they are merged into. No token
            is in both.
        """
        raise NotImplementedError

    def reduce(self, tokens: Tensor, scores: Tensor | None, *, sizes: Tensor, keys: Tensor) -> Downsampled:
        batch, n, _ = tokens.shape
        assignment = torch.arange(n, device=tokens.device).expand(batch, n)
        for pairs in rounds(n, self.keep):
            step = _merge(*self.match(keys, pairs), n)  # (B, N)
            n = n - pairs
            keys = clustering.means(keys, sizes, step, n)
            tokens, sizes = self.combine(tokens, sizes, step, n), clustering.sums(sizes, step, n)
            assignment = step.gather(1, assignment)
        return Downsampled(tokens, assignment)

    def combine(self, tokens: Tensor, sizes: Tensor, assignment: Tensor, k: int) -> Tensor:
        """Combine the tokens of each group.

        Args:
            tokens: (B, N, D).
            sizes: (B, N).
            assignment: (B, N), the group of each token, in 0..k-1.
            k: number of groups.

        Returns:
            (B, k, D), here the mean weighted by size.
        """
        return clustering.means(tokens, sizes, assignment, k)


def rounds(n: int, keep: int) -> list[int]:
    """Return how many of n tokens each round merges until `keep` remain. A round merges at most half of the tokens."""
    found = []
    while n > keep:
        found.append(min(n - keep, n // 2))
        n = n - found[-1]  # not in place: in a traced graph, n is a tensor of the caller
    return found


class BipartiteMatching(Matching):
    """Bipartite soft matching (ToMe; Bolya et al. 2023, section 3). The method is a baseline that is not in the paper.

    Each token of even index is matched with the token of odd index whose key is most similar (cosine similarity). The
    pairs of highest similarity are merged into their mean, weighted by size. One round merges at most half of the
    tokens. If fewer tokens have to remain, further rounds follow. (The original method has one round.)
    """

    def match(self, keys: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        with without_autocast(keys.device):
            units = clustering.unit_vectors(keys)
            similarity = torch.bmm(units[:, ::2], units[:, 1::2].mT)  # (B, N/2, N/2)
            similarity, partner = similarity.max(dim=-1)  # (B, N/2), an index into the odd tokens
        merged = clustering.stable_topk(similarity, pairs)  # (B, r), an index into the even tokens
        return 2 * merged, 1 + 2 * partner.gather(1, merged)

    def macs(self, n: int, width: int, key_width: int) -> int:
        macs = 0
        for pairs in rounds(n, self.keep):
            macs += (n + 1) // 2 * (n // 2) * key_width  # similarity of each pair, in each round
            n -= pairs
        return macs


def _merge(merged: Tensor, into: Tensor, n: int) -> Tensor:
    """Return the output token (B, N) of each of N tokens. The tokens that remain keep their order.

    Args:
        merged: (B, r), tokens to merge.
        into: (B, r), tokens that they are merged into.
        n: number of tokens N.
    """
    remains = torch.ones(merged.shape[0], n, dtype=torch.int64, device=merged.device).scatter(1, merged, 0)
    target = torch.arange(n, device=merged.device).expand_as(remains).scatter(1, merged, into)
    return (remains.cumsum(dim=1) - 1).gather(1, target)
