"""The paper's downsampling methods, all behind one contract.

A downsampler gets the patch tokens of a block and their significance scores, and returns fewer tokens together with
the output token that each input token went to. It knows nothing of class tokens, sizes, or the rest of the network.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpool import clustering, schedules


class Downsampled(NamedTuple):
    """What a downsampler returns.

    Attributes:
        tokens: (B, K, D), the tokens that go on.
        assignment: (B, N) int64, for each input token the output token that it went to, -1 where it was dropped.
    """

    tokens: Tensor
    assignment: Tensor


class Host(NamedTuple):
    """What a downsampler may know of the model that it is built into.

    Attributes:
        depth: number of blocks.
        width: D of the tokens.
        grid: rows and columns of patches.
        reads_patches: whether the model's head needs at least one patch token.
        is_dynamic: whether the grid may differ from image to image.
        unpools: whether each patch gets the value of its merged token back, for the model's head.
    """

    depth: int
    width: int
    grid: tuple[int, int]
    reads_patches: bool
    is_dynamic: bool = False
    unpools: bool = False


class Downsampler(nn.Module):
    """At most `keep` of N tokens go on. With `keep >= N` nothing happens, with `keep = 0` all are dropped.

    On a CPU without gradients a large batch comes in parts, so that no image may depend on others.

    Attributes:
        uses_scores: whether it needs significance scores.
        uses_sizes: whether it needs `sizes` (B, N), the number of original tokens that each token stands for.
        uses_keys: whether it needs `keys` (B, N, d), the attention's keys, mean over heads.
        merges: whether each token goes into one that remains, so that merged tokens can be put back (`unpool`).
    """

    uses_scores = True
    uses_sizes = False
    uses_keys = False
    merges = False

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    @classmethod
    def for_blocks(cls, host: Host, keep: Sequence[int] | None, **options: Any) -> list["Downsampler | None"]:
        """One downsampler for each block of the host, None for a block that has none."""
        if keep is None:
            raise ValueError(
                f"{cls.__name__} needs keep, a list of {host.depth} whole numbers, one a block, or a spelling of one "
                "such as 0.9 (see tokenpool.schedules.resolve), or gmacs"
            )
        keep = schedules.checked(keep, host.depth)
        if host.reads_patches and 0 in keep:
            raise ValueError(f"keep[{keep.index(0)}] = 0 would leave nothing to this model's head: it reads patches")
        return [cls(limit, **options) for limit in keep]

    def acts_on(self, n: int) -> bool:
        """Whether anything happens to n tokens."""
        return n > self.keep

    def forward(self, tokens: Tensor, scores: Tensor | None = None, **hints: Tensor | None) -> Downsampled:
        """Downsample tokens (B, N, D) by their scores (B, N), and by `sizes` and `keys` where the class uses them."""
        batch, n, _ = tokens.shape
        if not self.acts_on(n):
            return Downsampled(tokens, torch.arange(n, device=tokens.device).expand(batch, n))
        if self.keep == 0:
            return Downsampled(tokens[:, :0], torch.full((batch, n), -1, device=tokens.device))
        return self.reduce(tokens, scores, **hints)

    def reduce(self, tokens: Tensor, scores: Tensor | None) -> Downsampled:
        """Reduce N tokens to 0 < K < N."""
        raise NotImplementedError

    def macs(self, n: int, width: int, key_width: int) -> int:
        """Multiply-adds of `reduce`, as `flops.count` counts them: a closed form, so that budgets are met quickly.

        It holds for the class that states it, not for its subclasses, which may do more. Where a class states none,
        its `reduce` is traced, which takes longer.

        Args:
            n: tokens N, more than `keep`.
            width: D of the tokens.
            key_width: d of the keys.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"keep={self.keep}"


class Noise:
    """Uniform random numbers, one for each token.

    Training draws from PyTorch's global generator, anew for every image. Evaluation uses one fixed draw for each number
    of tokens, the same for every image, so that it is repeatable and no image depends on its batch. A generator, if
    given, is used in both and draws anew for every image.

    Args:
        seed: of the fixed draw.
        generator: to draw from.
    """

    def __init__(self, seed: int, generator: torch.Generator | None) -> None:
        if not isinstance(seed, Integral) or seed < 0:
            raise ValueError(f"seed = {seed!r} must be a whole number, not negative")
        self.seed = seed
        self.generator = generator

    def draw(self, tokens: Tensor, training: bool) -> Tensor:
        """Numbers (B, N) in [0, 1) for the tokens (B, N, D)."""
        batch, n, _ = tokens.shape
        if self.generator is not None:
            if torch.compiler.is_compiling():
                raise ValueError("a generator cannot be compiled or exported: select at random by seed instead")
            return torch.rand(batch, n, generator=self.generator, device=self.generator.device).to(tokens.device)
        if training:
            return torch.rand(batch, n, device=tokens.device)
        return torch.tensor(_fixed_draw(int(n), self.seed), dtype=torch.float32, device=tokens.device).expand(batch, n)


class Selection(Downsampler):
    """Keep the K tokens of highest priority, in their order, and drop the others."""

    def reduce(self, tokens: Tensor, scores: Tensor | None) -> Downsampled:
        batch, n, width = tokens.shape
        chosen = clustering.highest(self.priority(tokens, scores), self.keep).sort(dim=-1).values  # (B, K)
        kept = tokens.gather(1, chosen[:, :, None].expand(-1, -1, width))  # (B, K, D)
        order = torch.arange(self.keep, device=tokens.device).expand(batch, -1)
        assignment = torch.full((batch, n), -1, device=tokens.device).scatter(1, chosen, order)
        return Downsampled(kept, assignment)

    def priority(self, tokens: Tensor, scores: Tensor | None) -> Tensor:
        """Priorities (B, N), the higher the better."""
        raise NotImplementedError

    def macs(self, n: int, width: int, key_width: int) -> int:
        return 0  # sorting is free


class PowerBert(Selection):
    """PoWER-BERT: the K tokens of highest significance score, equation (5) (Goyal et al. 2020)."""

    macs = Selection.macs

    def priority(self, tokens: Tensor, scores: Tensor) -> Tensor:
        return scores


class Random(Selection):
    """K tokens at random, without replacement.

    Args:
        keep: the most tokens that go on.
        seed: see `Noise`.
        generator: see `Noise`.
    """

    uses_scores = False
    macs = Selection.macs

    def __init__(self, keep: int, seed: int = 0, generator: torch.Generator | None = None) -> None:
        super().__init__(keep)
        self.noise = Noise(seed, generator)

    def priority(self, tokens: Tensor, scores: Tensor | None) -> Tensor:
        return self.noise.draw(tokens, self.training)


class Importance(Random):
    """K tokens without replacement, drawn with probability proportional to the significance score.

    Successive draws from the categorical distribution are the K highest of log score + Gumbel noise.
    """

    uses_scores = True
    macs = Selection.macs

    def priority(self, tokens: Tensor, scores: Tensor) -> Tensor:
        uniform = self.noise.draw(tokens, self.training).clamp(min=torch.finfo(torch.float32).tiny)
        return scores.log() - (-uniform.log()).log()


class TokenPooling(Downsampler):
    """Token Pooling: cluster the tokens, go on with the weighted mean of each cluster (Algorithm 1).

    Args:
        keep: the most clusters.
        init: initial centres: "scores", the tokens of highest significance score, or "random" (Figure 6).
        iterations: the most iterations.
        seed: for `init="random"`, see `Noise`.
        generator: for `init="random"`, see `Noise`.
    """

    merges = True
    weighted = False
    algorithm = staticmethod(clustering.kmedoids)

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
            weights=_positive(scores) if self.weighted else None,
            init=clustering.highest(priority, self.keep),
            iterations=self.iterations,
            check_values=not tokens.is_cuda,  # no synchronisation in every block
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
    """WK-Medoids in the space of keys, from centres that lie apart: for models that are not fine-tuned. An extension.

    Objective (13) and the means of Algorithm 1, weighted by the significance scores, with two changes. Distances are
    between the attention's keys at unit length, mean over heads (as in Bolya et al. 2023), which are shorter than the
    tokens: 64 numbers in place of DeiT-S's 384. And the initial centres are those tokens that cost most to merge
    (`clustering.dearest_to_merge`), not those of highest score, which crowd. The options other than `iterations` are
    what it was chosen from (table `off_the_shelf`).

    Args:
        keep: the most clusters.
        iterations: the most iterations.
        by: distances between "keys" or "tokens", at unit length.
        weights: "scores", "sizes", or "both", their product.
        init: "ward", see above, or "scores".
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
        clusters = clustering.kmedoids(
            tokens,
            self.keep,
            weights=_positive({"scores": scores, "sizes": sizes, "both": sizes * scores}[self.weights]),
            init="ward" if self.init == "ward" else clustering.highest(scores, self.keep),
            iterations=self.iterations,
            check_values=not tokens.is_cuda,
            by=_unit(keys if self.by == "keys" else tokens),
        )
        return Downsampled(clusters.centers, clusters.assignment)

    def macs(self, n: int, width: int, key_width: int) -> int:
        return n * n * (key_width if self.by == "keys" else width)


class BipartiteMatching(Downsampler):
    """Bipartite soft matching (ToMe; Bolya et al. 2023, section 3), an extension: a baseline that is not in the paper.

    Every other token is matched to the one among the rest whose key is most similar (cosine). The pairs of highest
    similarity are merged, into the mean weighted by size. One round merges at most half of the tokens; where more have
    to go, which the authors do not provide for, another round follows.
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
            tokens, sizes = clustering.means(tokens, sizes, step, n), clustering.sums(sizes, step, n)
            assignment = step.gather(1, assignment)
        return Downsampled(tokens, assignment)

    def macs(self, n: int, width: int, key_width: int) -> int:
        macs = 0
        while n > self.keep:
            macs += (n + 1) // 2 * (n // 2) * key_width  # each pair's similarity, in each round
            n -= min(n - self.keep, n // 2)
        return macs


def _matched(keys: Tensor, pairs: int) -> Tensor:
    """The token that each goes to when that many pairs merge, counting those that remain, in their order: (B, N)."""
    batch, n, _ = keys.shape
    with torch.autocast(keys.device.type, enabled=False):
        units = _unit(keys)
        similarity = torch.bmm(units[:, ::2], units[:, 1::2].mT)  # (B, N/2, N/2)
        similarity, partner = similarity.max(dim=-1)  # (B, N/2), an index into the odd ones
    merged = 2 * clustering.highest(similarity, pairs)  # (B, pairs), even tokens
    remains = torch.ones(batch, n, dtype=torch.int64, device=keys.device).scatter(1, merged, 0)
    target = torch.arange(n, device=keys.device).expand(batch, n)
    target = target.scatter(1, merged, 1 + 2 * partner.gather(1, merged // 2))
    return (remains.cumsum(dim=1) - 1).gather(1, target)


class Convolution(Downsampler):
    """2x2 convolution with stride 2 on the token grid, width to width (appendix D).

    An odd last row or column of the grid is dropped, so that 14 x 14 tokens become 7 x 7, 3 x 3 and 1 x 1: "no more
    than 3 convolution downsampling layers". The kernel starts as the mean of its four tokens, which leaves a trained
    model something to go on from.
    """

    uses_scores = False

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__(keep=(grid[0] // 2) * (grid[1] // 2))
        self.grid = grid
        self.convolution = nn.Conv2d(width, width, kernel_size=2, stride=2)
        with torch.no_grad():
            self.convolution.weight.copy_(torch.eye(width)[:, :, None, None].expand(-1, -1, 2, 2) / 4)
            self.convolution.bias.zero_()

    @classmethod
    def for_blocks(cls, host: Host, keep: Sequence[int] | None, at: Sequence[int] = ()) -> list["Downsampler | None"]:
        """Convolutions at the blocks `at`, which count from 0."""
        if keep is not None:
            raise ValueError("convolution takes no keep: it quarters the tokens at the blocks at=[...]")
        if host.is_dynamic:
            raise ValueError("convolution needs a grid of one shape, but the model has dynamic_img_size=True")
        usable = isinstance(at, Sequence) and all(isinstance(block, Integral) for block in at) and len(at) > 0
        if not usable or sorted(set(at)) != list(at) or at[0] < 0 or at[-1] >= host.depth:
            raise ValueError(f"at = {at!r} must list different blocks in ascending order, each in 0..{host.depth - 1}")
        layers, (height, width) = [None] * host.depth, host.grid
        for block in at:
            if min(height, width) < 2:
                raise ValueError(f"at = {at}: only {height} x {width} tokens are left for the one at block {block}")
            layers[block] = cls(host.width, (height, width))
            height, width = height // 2, width // 2
        return layers

    def acts_on(self, n: int) -> bool:
        return True

    def forward(self, tokens: Tensor, scores: Tensor | None = None) -> Downsampled:
        batch, n, channels = tokens.shape
        height, width = self.grid
        if n != height * width:
            raise ValueError(f"convolution expects {height} x {width} = {height * width} tokens, got {n}")
        out = self.convolution(tokens.transpose(1, 2).reshape(batch, channels, height, width))  # (B, D, H/2, W/2)
        row = torch.arange(height, device=tokens.device)[:, None] // 2  # (H, 1)
        column = torch.arange(width, device=tokens.device)[None, :] // 2  # (1, W)
        target = row * (width // 2) + column  # (H, W)
        target = torch.where((row < height // 2) & (column < width // 2), target, -1)
        return Downsampled(out.flatten(2).transpose(1, 2), target.flatten().expand(batch, n))

    def extra_repr(self) -> str:
        return f"grid={self.grid}"


METHODS: dict[str, type[Downsampler] | None] = {
    "none": None,
    "convolution": Convolution,
    "power_bert": PowerBert,
    "random": Random,
    "importance": Importance,
    "kmeans": KMeans,
    "kmedoids": KMedoids,
    "wkmeans": WKMeans,
    "wkmedoids": WKMedoids,
    "key_medoids": KeyMedoids,
    "tome": BipartiteMatching,
}


def find(downsampler: str | type[Downsampler]) -> tuple[str, type[Downsampler] | None]:
    """Name and class of a method that is given by either.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if isinstance(downsampler, type) and issubclass(downsampler, Downsampler):
        names = [name for name, method in METHODS.items() if method is downsampler]
        return (names or [downsampler.__name__])[0], downsampler
    if not isinstance(downsampler, str) or downsampler not in METHODS:
        raise ValueError(f"unknown downsampler {downsampler!r}; known are {', '.join(METHODS)}")
    return downsampler, METHODS[downsampler]


def _positive(weights: Tensor) -> Tensor:
    """Weights that are not all zero, should no patch get any attention: then all count the same."""
    return weights.clamp(min=torch.finfo(weights.dtype).tiny)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors at unit length, in float32 or better."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def _checked_iterations(iterations: int) -> int:
    if not isinstance(iterations, Integral) or iterations < 1:
        raise ValueError(f"iterations = {iterations!r} must be a whole number, at least 1")
    return iterations


@torch.compiler.assume_constant_result
def _fixed_draw(n: int, seed: int) -> list[float]:
    """What `torch.rand` draws with a generator of its own, but as numbers that can be compiled in and exported.

    NumPy's twister is PyTorch's: 24 of each 32 random bits become the fraction.
    """
    twister = np.random.RandomState((seed * 1_000_003 + n) % 2**32)
    bits = twister.randint(0, 2**32, size=n, dtype=np.uint32) & (2**24 - 1)
    return (bits / 2**24).tolist()
