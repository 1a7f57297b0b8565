"""Token Pooling: methods that cluster the tokens and replace each cluster by its mean (Algorithm 1)."""

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler
from tokenpool.downsampling.selection import Noise


class TokenPooling(Downsampler):
    """Token Pooling: cluster the tokens and replace each cluster by its weighted mean (Algorithm 1).

    Args:
        keep: maximum number of clusters.
        init: initial centres: "scores", the tokens of highest significance score, or "random" (Figure 6).
        iterations: maximum number of iterations.
        seed: for `init="random"`, see `Noise`.
        generator: for `init="random"`, see `Noise`.

    Raises:
        ValueError: for an unknown `init`, or if `iterations` is not a whole number of at least 1.
    """

    merges = True
    weighted = False
    algorithm: Callable[..., clustering.Clusters] = staticmethod(clustering.kmedoids)

    def __init__(
        self,
        keep: int,
        init: str = "scores",
        iterations: int = 5,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(keep)
        if init not in ("scores", "random"):
            raise ValueError(f'init = {init!r} must be "scores" or "random"')
        self.init = init
        self.iterations = _checked_iterations(iterations)
        self.noise = Noise(seed, generator)

    def reduce(self, tokens: Tensor, scores: Tensor) -> Downsampled:
        priority = self.noise.draw(tokens, self.training) if self.init == "random" else scores
        clusters = self.algorithm(
            tokens,
            self.keep,
            weights=clustering.positive(scores) if self.weighted else None,
            init=clustering.stable_topk(priority, self.keep),
            iterations=self.iterations,
            check_values=not tokens.is_cuda,  # avoids a synchronisation in each block
        )
        return Downsampled(clusters.centers, clusters.assignment)


class KMedoids(TokenPooling):
    """Token Pooling with K-Medoids, equations (10) and (12)."""

    def macs(self, n: int, width: int, key_width: int) -> int:
        return n * n * width  # all distances, once


class KMeans(TokenPooling):
    """Token Pooling with K-Means, equations (10) and (11)."""

    algorithm = staticmethod(clustering.kmeans)

    def macs(self, n: int, width: int, key_width: int) -> int:
        return self.iterations * self.keep * n * width  # distances to the centres, in each iteration


class WKMedoids(KMedoids):
    """Token Pooling with K-Medoids weighted by the significance scores, objective (13)."""

    weighted = True
    macs = KMedoids.macs


class WKMeans(KMeans):
    """Token Pooling with K-Means weighted by the significance scores, objective (13)."""

    weighted = True
    macs = KMeans.macs


class KeyMedoids(Downsampler):
    """WK-Medoids on attention keys, for models that are not fine-tuned. The method is an extension of the paper.

    It is WK-Medoids (objective (13), Algorithm 1) with two changes. First, distances are computed between attention
    keys of unit length (mean over heads, as in Bolya et al. 2023). A key has fewer numbers than a token: 64 instead of
    384 in DeiT-S. Second, the initial centres are the tokens with the highest cost of merging
    (`clustering.ward_init`). They are far from each other, but the tokens of highest score are often close together.
    The other values of the options are alternatives that the table `off_the_shelf` compares.

    Args:
        keep: maximum number of clusters.
        iterations: maximum number of iterations.
        by: vectors whose distances are used, "keys" or "tokens", normalised to unit length.
        weights: "scores", "sizes", or "both" for their product.
        init: "ward" for the tokens with the highest cost of merging, or "scores" for the tokens of highest score.

    Raises:
        ValueError: for an unknown `by`, `weights` or `init`, or if `iterations` is not a whole number of at least 1.
    """

    uses_sizes = True
    uses_keys = True
    merges = True

    def __init__(
        self, keep: int, iterations: int = 5, by: str = "keys", weights: str = "scores", init: str = "ward"
    ) -> None:
        super().__init__(keep)
        for name, value, known in (
            ("by", by, ("keys", "tokens")),
            ("weights", weights, ("scores", "sizes", "both")),
            ("init", init, ("ward", "scores")),
        ):
            if value not in known:
                raise ValueError(f"{name} = {value!r} must be one of {', '.join(map(repr, known))}")
        self.iterations = _checked_iterations(iterations)
        self.by = by
        self.weights = weights
        self.init = init

    def reduce(self, tokens: Tensor, scores: Tensor, *, sizes: Tensor, keys: Tensor) -> Downsampled:
        vectors = keys if self.by == "keys" else tokens
        clusters = clustering.kmedoids(
            tokens,
            self.keep,
            weights=clustering.positive({"scores": scores, "sizes": sizes, "both": sizes * scores}[self.weights]),
            init="ward" if self.init == "ward" else clustering.stable_topk(scores, self.keep),
            iterations=self.iterations,
            check_values=not tokens.is_cuda,  # avoids a synchronisation in each block
            by=clustering.unit_vectors(vectors),
        )
        return Downsampled(clusters.centers, clusters.assignment)

    def macs(self, n: int, width: int, key_width: int) -> int:
        return n * n * (key_width if self.by == "keys" else width)


def _checked_iterations(iterations: int) -> int:
    if not isinstance(iterations, Integral) or iterations < 1:
        raise ValueError(f"iterations = {iterations!r} must be a whole number, at least 1")
    return iterations
