"""Token fusion: bipartite matching by several criteria (MCTF), and merging that keeps the norm (ToFu)."""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler, Host
from tokenpool.downsampling.matching import BipartiteMatching, rounds
from tokenpool.eager import at_least_float32, without_autocast


class MultiCriteriaFusion(Downsampler):
    """Multi-criteria token fusion (MCTF; Lee et al. 2024, section 3.2), to compare with.

    The attraction of tokens i and j is the product of three criteria, each with a temperature as its exponent:
    similarity (cos(x_i, x_j) + 1) / 2 of the tokens, information 1 / (a_i a_j) of the attention a that they receive,
    and size 1 / (s_i s_j). Half of the tokens to remove have an even index (A): the ones of strongest attraction to a
    token of odd index (B), which they join. The other half are tokens of B. They join a token that is left in A. Each
    group becomes its mean with the weights a_i s_i. One round removes at most half of the tokens.

    The paper measures a by the attention of the next block, computed before the tokens are fused ("one-step-ahead
    attention"). A downsampler knows only its own block, so here a is the significance score of the current block. The
    paper has one round. If fewer tokens have to remain, further rounds follow with the summed attention of each group.

    Args:
        keep: maximum number K of tokens that remain.
        similarity: temperature of the similarity. The defaults are the authors' values for DeiT.
        information: temperature of the information.
        size: temperature of the size.

    Raises:
        ValueError: if a temperature is negative or not a number.
    """

    uses_sizes = True
    merges = True

    def __init__(self, keep: int, similarity: float = 1.0, information: float = 1 / 20, size: float = 1 / 40) -> None:
        super().__init__(keep)
        for name, value in (("similarity", similarity), ("information", information), ("size", size)):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} = {value!r} must be a number that is not negative")
        self.similarity = similarity
        self.information = information
        self.size = size

    def reduce(self, tokens: Tensor, scores: Tensor, *, sizes: Tensor) -> Downsampled:
        batch, n, _ = tokens.shape
        assignment = torch.arange(n, device=tokens.device).expand(batch, n)
        scores = clustering.positive(scores)  # without attention from any query, all are equal
        for pairs in rounds(n, self.keep):
            step = _matched_both_ways(self._attraction(tokens, scores, sizes), pairs)  # (B, N)
            n = n - pairs
            tokens = clustering.means(tokens, scores * sizes, step, n)
            scores, sizes = clustering.sums(scores, step, n), clustering.sums(sizes, step, n)
            assignment = step.gather(1, assignment)
        return Downsampled(tokens, assignment)

    def _attraction(self, tokens: Tensor, scores: Tensor, sizes: Tensor) -> Tensor:
        """Return the log of the attraction (B, A, B) of tokens of even and of odd index."""
        with torch.no_grad(), without_autocast(tokens.device):
            units = clustering.unit_vectors(tokens)
            cosine = torch.bmm(units[:, ::2], units[:, 1::2].mT)  # (B, A, B)
            similar = ((cosine + 1) / 2).clamp(min=torch.finfo(cosine.dtype).tiny).log()
            own = -self.information * scores.log() - self.size * sizes.log()  # (B, N)
            return self.similarity * similar + own[:, ::2, None] + own[:, None, 1::2]

    def macs(self, n: int, width: int, key_width: int) -> int:
        macs = 0
        for pairs in rounds(n, self.keep):
            macs += (n + 1) // 2 * (n // 2) * width  # similarity of each pair, in each round
            n -= pairs
        return macs


class TokenFusion(BipartiteMatching):
    """Token Fusion (ToFu; Kim et al. 2024), to compare with: prune the pairs of ToMe in early blocks, then merge them.

    Early blocks respond to an interpolated token far from linearly, so they replace a pair by one of its tokens: the
    token of odd index, to which the other token would be merged. Late blocks merge by MLERP: the result has the
    direction of the mean and the largest norm of the merged tokens, because a mean is shorter than its members.

    A pruned token counts as merged: its size goes to the token that replaces it, and `tokenpool.unpool` puts that token
    in its place. The mean is weighted by size, as in ToMe.

    Args:
        keep: maximum number K of tokens that remain.
        prunes: whether a pair is pruned. `tokenpool.patch` takes `prune_blocks` instead, see `for_blocks`.
    """

    macs = BipartiteMatching.macs

    def __init__(self, keep: int, prunes: bool = False) -> None:
        super().__init__(keep)
        self.prunes = prunes

    @classmethod
    def for_blocks(  # type: ignore[override]  # `prune_blocks` replaces the base class's **options
        cls, host: Host, keep: Sequence[int] | None, prune_blocks: int | None = None
    ) -> list[Downsampler | None]:
        """Create one downsampler for each block.

        Args:
            host: properties of the model.
            keep: retention schedule.
            prune_blocks: number of first blocks that prune. Default: half of the blocks.

        Raises:
            ValueError: for an unusable `keep`, or if `prune_blocks` is not a whole number in 0..depth.
        """
        first = host.depth // 2 if prune_blocks is None else prune_blocks
        if isinstance(first, bool) or not isinstance(first, Integral) or not 0 <= first <= host.depth:
            raise ValueError(f"prune_blocks = {prune_blocks!r} must be a whole number in 0..{host.depth}")
        layers = super().for_blocks(host, keep)
        for layer in layers[:first]:
            layer.prunes = True
        return layers

    def combine(self, tokens: Tensor, sizes: Tensor, assignment: Tensor, k: int) -> Tensor:
        return _targets(tokens, assignment, k) if self.prunes else _mlerp(tokens, sizes, assignment, k)

    def extra_repr(self) -> str:
        return f"keep={self.keep}, prunes={self.prunes}"


def _matched_both_ways(attraction: Tensor, pairs: int) -> Tensor:
    """Match A with B, then B with the rest of A. Return the output token (B, N) of each token.

    Args:
        attraction: (B, A, B) of tokens of even index and of odd index, N = A + B.
        pairs: number of tokens to remove, at most N // 2.
    """
    batch, even, odd = attraction.shape
    index = torch.arange(even + odd, device=attraction.device).expand(batch, -1)
    there, back = pairs // 2, pairs - pairs // 2
    strongest, partner = attraction.max(dim=2)  # (B, A), an index into B
    left = clustering.stable_topk(strongest, there)  # (B, there), tokens of A that move to B
    gone = torch.zeros_like(strongest).scatter(1, left, 1)
    strongest, home = attraction.masked_fill(gone[:, :, None] > 0, -torch.inf).max(dim=1)  # (B, B), an index into A
    returned = clustering.stable_topk(strongest, back)  # (B, back), tokens of B that move to the rest of A

    target = index.scatter(1, 2 * left, 1 + 2 * partner.gather(1, left))
    target = target.scatter(1, 1 + 2 * returned, 2 * home.gather(1, returned))
    target = target.gather(1, target)  # a token of A can go to B and with it to another token of A
    remains = torch.ones_like(index).scatter(1, 2 * left, 0).scatter(1, 1 + 2 * returned, 0)
    return (remains.cumsum(dim=1) - 1).gather(1, target)


def _targets(tokens: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Return the token of odd index of each group, or the only token of the group: (B, k, D)."""
    members = clustering.sums(torch.ones_like(assignment, dtype=torch.float32), assignment, k)  # (B, k)
    odd = torch.arange(assignment.shape[1], device=tokens.device) % 2
    weights = torch.where(members.gather(1, assignment) > 1, odd, 1)  # (B, N)
    return clustering.means(tokens, weights.to(members.dtype), assignment, k)


def _mlerp(tokens: Tensor, sizes: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Return the mean of each group, stretched to the largest norm of its members: (B, k, D)."""
    mean = clustering.means(tokens, sizes, assignment, k)
    wide = at_least_float32(tokens.dtype)
    norms = torch.linalg.vector_norm(tokens, dim=-1, dtype=wide)  # (B, N)
    longest = clustering.largest(norms, assignment, k)  # (B, k)
    return clustering.stretched(mean, longest)
