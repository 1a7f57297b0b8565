"""Methods that keep K of the tokens and drop the others: by significance score, at random, or both."""

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler


class Noise:
    """Uniform random numbers, one for each token.

    Training draws from PyTorch's global generator, anew for every image. Evaluation uses one fixed draw for each number
    of tokens. The draw is the same for every image, so that evaluation is repeatable and no image depends on its batch.
    A generator, if given, is used in training and in evaluation and draws anew for every image.

    Args:
        seed: of the fixed draw.
        generator: to draw from instead.

    Raises:
        ValueError: if the seed is not a whole number or is negative.
    """

    def __init__(self, seed: int, generator: torch.Generator | None) -> None:
        self.seed = seed
        self.generator = generator
        if not isinstance(seed, Integral) or seed < 0:
            raise ValueError(f"seed = {seed!r} must be a whole number, not negative")

    def draw(self, tokens: Tensor, training: bool) -> Tensor:
        """Numbers (B, N) in [0, 1) for the tokens (B, N, D).

        Raises:
            ValueError: if a model with a generator is compiled or exported.
        """
        batch, n, _ = tokens.shape
        if self.generator is not None:
            if torch.compiler.is_compiling():
                raise ValueError("a generator cannot be compiled or exported: select at random by seed instead")
            return torch.rand(batch, n, generator=self.generator, device=self.generator.device).to(tokens.device)
        if training:
            return torch.rand(batch, n, device=tokens.device)
        return torch.tensor(_fixed_draw(int(n), self.seed), dtype=torch.float32, device=tokens.device).expand(batch, n)


class Selection(Downsampler):
    """Base class: keep the K tokens of highest priority, in their order, and drop the others."""

    def reduce(self, tokens: Tensor, scores: Tensor | None) -> Downsampled:
        batch, n, width = tokens.shape
        chosen = clustering.stable_topk(self.priority(tokens, scores), self.keep).sort(dim=-1).values  # (B, K)
        kept = tokens.gather(1, chosen[:, :, None].expand(-1, -1, width))  # (B, K, D)
        order = torch.arange(self.keep, device=tokens.device).expand(batch, -1)
        assignment = torch.full((batch, n), -1, device=tokens.device).scatter(1, chosen, order)
        return Downsampled(kept, assignment)

    def priority(self, tokens: Tensor, scores: Any) -> Tensor:
        """Priorities (B, N); the highest K are kept. `scores` (B, N) is None for a class that uses none."""
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
        keep: the most tokens that remain.
        seed: see `Noise`.
        generator: see `Noise`.
    """

    uses_scores = False
    macs = Selection.macs

    def __init__(self, keep: int, seed: int = 0, generator: torch.Generator | None = None) -> None:
        super().__init__(keep)
        self.noise = Noise(seed, generator)

    def priority(self, tokens: Tensor, scores: Any) -> Tensor:
        return self.noise.draw(tokens, self.training)


class Importance(Random):
    """K tokens without replacement, drawn with probability proportional to the significance score.

    The K highest values of log score + Gumbel noise are K successive draws from the categorical distribution.
    """

    uses_scores = True
    macs = Selection.macs

    def priority(self, tokens: Tensor, scores: Tensor) -> Tensor:
        uniform = self.noise.draw(tokens, self.training).clamp(min=torch.finfo(torch.float32).tiny)
        return scores.log() - (-uniform.log()).log()


@torch.compiler.assume_constant_result
def _fixed_draw(n: int, seed: int) -> list[float]:
    """The numbers that `torch.rand(n)` draws with a new generator, as floats that can be compiled in and exported.

    NumPy's Mersenne twister is PyTorch's: the fraction is made of 24 of each 32 random bits.
    """
    twister = np.random.RandomState((seed * 1_000_003 + n) % 2**32)
    bits = twister.randint(0, 2**32, size=n, dtype=np.uint32) & (2**24 - 1)
    return (bits / 2**24).tolist()
