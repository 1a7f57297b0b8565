"""Token Pooling by agglomerative clustering with Ward's criterion, for models that are not fine-tuned."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler, Host
from tokenpool.eager import at_least_float32, without_autocast


class WardPooling(Downsampler):
    """Merge the two clusters that raise the weighted objective (13) least, until K remain. An extension of the paper.

    WK-Means reduces objective (13) from initial centres. Ward's method (Ward 1963) starts with all tokens as clusters
    and merges the pair of clusters I and J with the lowest increase of the objective,

        w_I w_J / (w_I + w_J) |m_I - m_J|^2,

    where w_I is the sum of the weights of the tokens in I, and m_I is their weighted mean, of tokens of unit length.
    The weight of a token is the mean of two shares of attention: the token's share of the significance scores, which
    all queries give, and its share of the attention of the class token, which the head reads. Without a class token,
    the weight is the score.

    A cluster is replaced by the weighted mean of its tokens, stretched to the weighted mean of their lengths. A mean is
    shorter than its members, and a shorter token changes more in the next MLP. (ToFu, Kim et al. 2024, stretches to the
    largest length.)

    The loop over merges has N - K steps, as in ATC. Ties are broken as in `clustering.agglomeration`.

    Args:
        keep: maximum number of clusters.
        class_share: share of the attention of the class token in the weights, 0..1. A model without a class token
            has 0.

    Raises:
        ValueError: if `class_share` is not a number in 0..1.
    """

    merges = True
    class_share: float

    def __init__(self, keep: int, class_share: float = 0.5) -> None:
        super().__init__(keep)
        if isinstance(class_share, bool) or not isinstance(class_share, Real) or not 0 <= class_share <= 1:
            raise ValueError(f"class_share = {class_share!r} must be a number in 0..1")
        self.class_share = class_share
        self.uses_class_attention = class_share > 0

    @classmethod
    def for_blocks(  # type: ignore[override]  # `class_share` replaces the base class's **options
        cls, host: Host, keep: Sequence[int] | None, class_share: float = 0.5
    ) -> list[Downsampler | None]:
        """Create one downsampler for each block.

        Args:
            host: properties of the model.
            keep: retention schedule.
            class_share: see the class.

        Raises:
            ValueError: for an unusable `keep` or `class_share`.
        """
        return super().for_blocks(host, keep, class_share=class_share if host.has_class_token else 0.0)

    def reduce(self, tokens: Tensor, scores: Tensor, *, class_attention: Tensor | None = None) -> Downsampled:
        weights = self._weights(scores, class_attention)
        with without_autocast(tokens.device), torch.no_grad():
            distance = clustering.squared_distances(clustering.unit_vectors(tokens))
            assignment = clustering.agglomerate(distance, self.keep, "ward", weights)
        return Downsampled(_stretched_means(tokens, weights, assignment, self.keep), assignment)

    def _weights(self, scores: Tensor, class_attention: Tensor | None) -> Tensor:
        """Return the weights (B, N), whose sum is 1 for each image."""
        weights = _shares(scores)
        if class_attention is None:
            return weights
        return (1 - self.class_share) * weights + self.class_share * _shares(class_attention)

    def macs(self, n: int, width: int, key_width: int) -> int:
        return n * n * width  # all distances, once; updates of distances are no matrix products

    def extra_repr(self) -> str:
        return f"keep={self.keep}, class_share={self.class_share}"


def _shares(attention: Tensor) -> Tensor:
    """Return positive shares (B, N) of the sum. If no token gets attention, all shares are equal."""
    attention = clustering.positive(attention)
    return attention / attention.sum(dim=1, keepdim=True)


def _stretched_means(tokens: Tensor, weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Return the weighted mean of each cluster, stretched to the weighted mean length of its tokens: (B, k, D)."""
    means = clustering.means(tokens, weights, assignment, k)
    wide = at_least_float32(tokens.dtype)
    lengths = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=wide)  # (B, N, 1)
    return clustering.stretched(means, clustering.means(lengths, weights, assignment, k).squeeze(2))
