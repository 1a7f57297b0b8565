"""Max pooling of the sequence of tokens (HVT)."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from tokenpool.downsampling.contract import Downsampled, Downsampler, Host
from tokenpool.downsampling.convolution import Placed

_KERNEL, _STRIDE = 3, 2


class HierarchicalPooling(Placed):
    """Max pooling of the sequence of tokens, kernel 3 and stride 2 (HVT; Pan et al. 2021), to compare with.

    N tokens in the order of the grid's rows become (N - 3) // 2 + 1. A learned position embedding is added to them, as
    in the paper. It is zero at first, so that a trained model still works at the start of fine-tuning.

    Windows overlap, but an assignment has one output token for each input token: the window whose centre is nearest,
    and the later window if two are equally near. With an even N the last token is in no window and is dropped. The
    paper has no class token and classifies the mean of the last tokens; here the model's own head stays.

    Args:
        width: width D of the tokens.
        grid: rows and columns of tokens. Only their product counts.

    Attributes:
        position: (K, D) parameter, the position embedding.
    """

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__(keep=(prod(grid) - _KERNEL) // _STRIDE + 1)
        self.tokens = prod(grid)
        self.position = nn.Parameter(torch.zeros(self.keep, width))

    @classmethod
    def for_blocks(  # type: ignore[override]  # `at` replaces the base class's **options
        cls, host: Host, keep: Sequence[int] | None, at: Sequence[int] = ()
    ) -> list[Downsampler | None]:
        """Create a pooling layer for each block in `at`.

        Args:
            host: properties of the model.
            keep: must be None.
            at: ascending indices of blocks, starting at 0.

        Raises:
            ValueError: if `keep` is given, if the grid is not fixed or too small, or if `at` does not list blocks.
        """
        layers: list[Downsampler | None] = [None] * host.depth
        tokens = prod(host.grid)
        for block in cls.places(host, keep, at):
            if tokens < _KERNEL:
                raise ValueError(
                    f"at = {at}: only {tokens} tokens are left at block {block}, expected at least {_KERNEL}"
                )
            layer = cls(host.width, (1, tokens))
            layers[block], tokens = layer, layer.keep
        return layers

    def forward(self, tokens: Tensor, scores: Tensor | None = None, **hints: Tensor) -> Downsampled:
        batch, n, _ = tokens.shape
        if n != self.tokens:
            raise ValueError(f"hierarchical pooling expects {self.tokens} tokens, got {n}")
        end = _STRIDE * (self.keep - 1) + 1
        out = tokens[:, 0:end:_STRIDE]
        for offset in range(1, _KERNEL):
            out = torch.maximum(out, tokens[:, offset : end + offset : _STRIDE])  # (B, K, D)
        index = torch.arange(n, device=tokens.device)
        nearest = (index // _STRIDE).clamp(max=self.keep - 1)  # the centre of window k is token 2 k + 1
        assignment = torch.where(index < end + _KERNEL - 1, nearest, -1)
        return Downsampled(out + self.position, assignment.expand(batch, n))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, keep={self.keep}"
