"""Convolution on the token grid (appendix D)."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from tokenpool.downsampling.contract import Downsampled, Downsampler, Host


class Convolution(Downsampler):
    """2x2 convolution with stride 2 on the token grid, width to width (appendix D).

    An odd last row or column of the grid is dropped, so that 14 x 14 tokens become 7 x 7, 3 x 3 and 1 x 1: "no more
    than 3 convolution downsampling layers". The kernel starts as the mean of its four tokens, so that a trained model
    still works at the start of its fine-tuning.

    Args:
        width: D, the width of the tokens.
        grid: rows and columns of tokens.
    """

    uses_scores = False

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__(keep=(grid[0] // 2) * (grid[1] // 2))
        self.grid = grid
        self.convolution = nn.Conv2d(width, width, kernel_size=2, stride=2)
        with torch.no_grad():
            self.convolution.weight.copy_(torch.eye(width)[:, :, None, None].expand(-1, -1, 2, 2) / 4)
            self.convolution.bias.zero_()  # type: ignore[union-attr]  # PyTorch types every bias as optional

    @classmethod
    def for_blocks(  # type: ignore[override]  # `at` is the only one of the base class's options that it takes
        cls, host: Host, keep: Sequence[int] | None, at: Sequence[int] = ()
    ) -> list[Downsampler | None]:
        """Convolutions at the blocks `at`, which count from 0.

        Raises:
            ValueError: if `keep` is given, if the grid is not fixed or too small, or if `at` does not list blocks.
        """
        if keep is not None:
            raise ValueError("convolution takes no keep: it quarters the tokens at the blocks at=[...]")
        if host.is_dynamic:
            raise ValueError("convolution needs a grid of one shape, but the model has dynamic_img_size=True")
        usable = isinstance(at, Sequence) and all(isinstance(block, Integral) for block in at) and len(at) > 0
        if not usable or sorted(set(at)) != list(at) or at[0] < 0 or at[-1] >= host.depth:
            raise ValueError(f"at = {at!r} must list different blocks in ascending order, each in 0..{host.depth - 1}")
        layers: list[Downsampler | None] = [None] * host.depth
        height, width = host.grid
        for block in at:
            if min(height, width) < 2:
                raise ValueError(f"at = {at}: only {height} x {width} tokens are left for the one at block {block}")
            layers[block] = cls(host.width, (height, width))
            height, width = height // 2, width // 2
        return layers

    def acts_on(self, n: int) -> bool:
        return True

    def forward(self, tokens: Tensor, scores: Tensor | None = None, **hints: Tensor) -> Downsampled:
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
