"""Methods that merge pairs of similar tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler


class BipartiteMatching(Downsampler):
    """Bipartite soft matching (ToMe; Bolya et al. 2023, section 3). The method is a baseline that is not in the paper.

    Each token of even index is matched with the token of odd index whose key is most similar (cosine similarity). The
    pairs of highest similarity are merged into their mean, weighted by size. One round merges at most half of the
    tokens. If fewer tokens have to remain, further rounds follow. (The original method has one round.)
    """

    uses_scores = False
    uses_sizes = True
    uses_keys = True
    merges = True

    def reduce(self, tokens: Tensor, scores: Tensor | None, *, sizes: Tensor, keys: Tensor) -> Downsampled:
        batch, n, _ = tokens.shape
        assignment = torch.arange(n, device=tokens.device).expand(batch, n)
        while n > self.keep:
            step = _matched(keys, min(n - self.keep, n // 2))  # (B, N)
            n -= min(n - self.keep, n // 2)
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

    def macs(self, n: int, width: int, key_width: int) -> int:
        macs = 0
        while n > self.keep:
            macs += (n + 1) // 2 * (n // 2) * key_width  # similarity of each pair, in each round
            n -= min(n - self.keep, n // 2)
        return macs


def _matched(keys: Tensor, pairs: int) -> Tensor:
    """Return the output token (B, N) of each token if `pairs` pairs are merged. The remaining tokens keep their order.

    Args:
        keys: (B, N, d).
        pairs: number of pairs to merge, at most N // 2.
    """
    batch, n, _ = keys.shape
    with torch.autocast(keys.device.type, enabled=False):
        units = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
        similarity = torch.bmm(units[:, ::2], units[:, 1::2].mT)  # (B, N/2, N/2)
        similarity, partner = similarity.max(dim=-1)  # (B, N/2), an index into the odd tokens
    merged = 2 * clustering.stable_topk(similarity, pairs)  # (B, pairs), even tokens
    remains = torch.ones(batch, n, dtype=torch.int64, device=keys.device).scatter(1, merged, 0)
    target = torch.arange(n, device=keys.device).expand(batch, n)
    target = target.scatter(1, merged, 1 + 2 * partner.gather(1, merged // 2))
    return (remains.cumsum(dim=1) - 1).gather(1, target)
