"""Methods that keep K tokens and drop the others: by significance score, at random, or both."""

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler
from tokenpool.eager import is_in_graph


class Noise:
    """Uniform random numbers, one for each token.

    In training, the numbers of each image are new draws from PyTorch's global generator. In evaluation, all images
    with the same number of tokens have the same fixed numbers. So evaluation is repeatable, and the result of an image
    does not depend on its batch. If a generator is given, the numbers are always new draws from it.

    Args:
        seed: seed of the fixed numbers.
        generator: generator for training and evaluation, or None.

    Raises:
        ValueError: if the seed is not a whole number or is negative.
    """

    def __init__(self, seed: int, generator: torch.Generator | None) -> None:
        self.seed = seed
        self.generator = generator
        if not isinstance(seed, Integral) or seed < 0:
            raise ValueError(f"seed = {seed!r} must be a whole number, not negative")

    def draw(self, tokens: Tensor, training: bool) -> Tensor:
        """Draw the numbers.

        Args:
            tokens: (B, N, D), for shape and device.
            training: whether the model is in training mode.

        Returns:
            (B, N) float32 in [0, 1).

        Raises:
            ValueError: if a model with a generator is compiled or exported.
        """
        batch, n, _ = tokens.shape
        if self.generator is not None:
            if torch.compiler.is_compiling():
                raise ValueError("a generator cannot be compiled or exported: give a seed instead of a generator")
            return torch.rand(batch, n, generator=self.generator, device=self.generator.device).to(tokens.device)
        if training:
            return torch.rand(batch, n, device=tokens.device)
        numbers = _fixed_draw(int(n), self.seed)
        if tokens.is_cuda and not is_in_graph():  # a copy from pinned memory does not wait for the GPU
            pinned = torch.tensor(numbers, dtype=torch.float32, pin_memory=True)
            return pinned.to(tokens.device, non_blocking=True).expand(batch, n)
        return torch.tensor(numbers, dtype=torch.float32, device=tokens.device).expand(batch, n)


class Selection(Downsampler):
    """Base class: keep the K tokens of highest priority in their original order, and drop the others."""

    def reduce(self, tokens: Tensor, scores: Tensor | None) -> Downsampled:
        batch, n, width = tokens.shape
        chosen = clustering.stable_topk(self.priority(tokens, scores), self.keep).sort(dim=-1).values  # (B, K)
        kept = tokens.gather(1, chosen[:, :, None].expand(-1, -1, width))  # (B, K, D)
        order = torch.arange(self.keep, device=tokens.device).expand(batch, -1)
        assignment = torch.full((batch, n), -1, device=tokens.device).scatter(1, chosen, order)
        return Downsampled(kept, assignment)

    def priority(self, tokens: Tensor, scores: Any) -> Tensor:
        """Return the priorities (B, N). The K tokens of highest priority are kept.

        Args:
            tokens: (B, N, D).
            scores: (B, N), significance scores, or None if the class does not use them.
        """
        raise NotImplementedError

    def macs(self, n: int, width: int, key_width: int) -> int:
        return 0  # sorting is free


class PowerBert(Selection):
    """PoWER-BERT: keep the K tokens of highest significance score, equation (5) (Goyal et al. 2020)."""

    macs = Selection.macs

    def priority(self, tokens: Tensor, scores: Tensor) -> Tensor:
        return scores


class Random(Selection):
    """Keep K random tokens, drawn without replacement.

    Args:
        keep: maximum number K of tokens that remain.
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
    """Keep K tokens, drawn without replacement with probability proportional to the significance score.

    The K highest values of log score + Gumbel noise are K successive draws from the categorical distribution.

    Args:
        keep: maximum number K of tokens that remain.
        seed: see `Noise`.
        generator: see `Noise`.
    """

    uses_scores = True
    macs = Selection.macs

    def priority(self, tokens: Tensor, scores: Tensor) -> Tensor:
        uniform = self.noise.draw(tokens, self.training).clamp(min=torch.finfo(torch.float32).tiny)
        return scores.log() - (-uniform.log()).log()


@torch.compiler.assume_constant_result
def _fixed_draw(n: int, seed: int) -> list[float]:
    """Return the numbers of `torch.rand(n)` with a new generator, as floats that a graph can contain.

    NumPy has the same Mersenne twister as PyTorch. PyTorch takes 24 of each 32 random bits as the fraction.
    """
    twister = np.random.RandomState((seed * 1_000_003 + n) % 2**32)
    bits = twister.randint(0, 2**32, size=n, dtype=np.uint32) & (2**24 - 1)
    return (bits / 2**24).tolist()
