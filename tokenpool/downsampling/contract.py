"""What every downsampling method takes and returns.

A downsampler gets the patch tokens of a block and their significance scores. It returns fewer tokens and, for each
input token, the output token that it went to. It knows nothing of class tokens, sizes or the rest of the network.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenpool import schedules


class Downsampled(NamedTuple):
    """Output of a downsampler.

    Attributes:
        tokens: (B, K, D), the tokens that remain.
        assignment: (B, N) int64, for each input token the index of its output token, -1 if it was dropped.
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
    """Base class of all methods: at most `keep` of N tokens remain.

    With `keep >= N` the tokens stay as they are. With `keep = 0` all tokens are dropped. No image may depend on the
    other images of its batch: on a CPU and without gradients, a large batch is processed in parts.

    Attributes:
        uses_scores: whether `reduce` needs significance scores.
        uses_sizes: whether `reduce` needs `sizes` (B, N), the number of patches that each token stands for.
        uses_keys: whether `reduce` needs `keys` (B, N, d), the mean over heads of the attention's keys.
        merges: whether no token is dropped: each one goes into an output token, so that `tokenpool.unpool` can put
            the output back to the patches.
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
        """One downsampler for each block of the host, None for a block without one.

        Raises:
            ValueError: if `keep` is missing, does not fit the host, or leaves no token to a head that reads patches.
        """
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
        """Whether the downsampler changes n tokens."""
        return n > self.keep

    def forward(self, tokens: Tensor, scores: Tensor | None = None, **hints: Tensor) -> Downsampled:
        """Downsample tokens.

        Args:
            tokens: (B, N, D).
            scores: (B, N), significance scores, if the class uses them.
            **hints: `sizes` (B, N) and `keys` (B, N, d), each if the class uses it.
        """
        batch, n, _ = tokens.shape
        if not self.acts_on(n):
            return Downsampled(tokens, torch.arange(n, device=tokens.device).expand(batch, n))
        if self.keep == 0:
            return Downsampled(tokens[:, :0], torch.full((batch, n), -1, device=tokens.device))
        return self.reduce(tokens, scores, **hints)

    def reduce(self, tokens: Tensor, *scores: Any, **hints: Any) -> Downsampled:
        """Reduce N tokens to `keep` of them, where 0 < keep < N. The arguments are those of `forward`.

        A subclass writes `reduce(self, tokens, scores)`, with the keywords `sizes` and `keys` if it uses them.
        """
        raise NotImplementedError

    def macs(self, n: int, width: int, key_width: int) -> int:
        """Multiply-adds of `reduce` in closed form, as `flops.count` counts them. Budgets are met faster with it.

        The formula holds for the class that defines it and not for subclasses, which may do more. A class without a
        formula of its own is traced instead, which takes longer.

        Args:
            n: number of tokens N, more than `keep`.
            width: D, the width of the tokens.
            key_width: d, the width of the keys.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"keep={self.keep}"
