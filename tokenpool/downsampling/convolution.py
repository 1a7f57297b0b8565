"""Layers at given blocks, without a schedule: convolution on the token grid (appendix D)."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from tokenpool.downsampling.contract import Downsampled, Downsampler, Host


class Placed(Downsampler):
    """Base class of methods that take `at=[...]`, the blocks that reduce tokens, in place of a schedule."""

    uses_scores = False

    @classmethod
    def places(cls, host: Host, keep: Sequence[int] | None, at: Sequence[int]) -> list[int]:
        """Check the arguments of `for_blocks`.

        Args:
            host: properties of the model.
            keep: must be None.
            at: ascending indices of blocks, starting at 0.

        Returns:
            `at` as a list of Python integers.

        Raises:
            ValueError: if `keep` is given, if the grid is not fixed, or if `at` does not list blocks.
        """
        name = cls.__name__
        if keep is not None:
            raise ValueError(f"{name} takes no keep: give at=[...], the blocks that reduce tokens")
        if host.is_dynamic:
            raise ValueError(
                f"{name} needs a fixed grid, but the model takes images of any size (timm: dynamic_img_size=True)"
            )
        usable = isinstance(at, Sequence) and all(isinstance(block, Integral) for block in at) and len(at) > 0
        if not usable or sorted(set(at)) != list(at) or at[0] < 0 or at[-1] >= host.depth:
            raise ValueError(f"at = {at!r} must list different blocks in ascending order, in 0..{host.depth - 1}")
        return [int(block) for block in at]

    def acts_on(self, n: int) -> bool:
        return True


class Convolution(Placed):
    """2x2 convolution with stride 2 on the token grid (appendix D). The width of the tokens stays the same.

    An odd last row or column of the grid is dropped. So 14 x 14 tokens become 7 x 7, 3 x 3 and 1 x 1: "no more than 3
    convolution downsampling layers". The initial kernel computes the mean of its four tokens, so that a trained model
    still works at the start of fine-tuning.

    Args:
        width: width D of the tokens.
        grid: rows and columns of tokens.
    """

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__(keep=(grid[0] // 2) * (grid[1] // 2))
        self.grid = grid
        self.convolution = nn.Conv2d(width, width, kernel_size=2, stride=2)
        with torch.no_grad():
            self.convolution.weight.copy_(torch.eye(width)[:, :, None, None].expand(-1, -1, 2, 2) / 4)
            self.convolution.bias.zero_()  # type: ignore[union-attr]  # PyTorch types every bias as optional

    @classmethod
    def for_blocks(  # type: ignore[override]  # `at` replaces the base class's **options
        cls, host: Host, keep: Sequence[int] | None, at: Sequence[int] = ()
    ) -> list[Downsampler | None]:
        """Create a convolution for each block in `at`.

        Args:
            host: properties of the model.
            keep: must be None.
            at: ascending indices of blocks, starting at 0.

        Raises:
            ValueError: if `keep` is given, if the grid is not fixed or too small, or if `at` does not list blocks.
        """
        layers: list[Downsampler | None] = [None] * host.depth
        height, width = host.grid
        for block in cls.places(host, keep, at):
            if min(height, width) < 2:
                raise ValueError(
                    f"at = {at}: only {height} x {width} tokens are left at block {block}, expected at least 2 x 2"
                )
            layers[block] = cls(host.width, (height, width))
            height, width = height // 2, width // 2
        return layers

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
