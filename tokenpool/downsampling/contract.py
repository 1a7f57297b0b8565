"""The interface of all downsampling methods.

A downsampler gets the patch tokens of a block and their significance scores. It returns fewer tokens and, for each
input token, the index of its output token. It does not depend on class tokens or on the rest of the network.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tokenpool import schedules


class Downsampled(NamedTuple):
    """Output of a downsampler.

    Attributes:
        tokens: (B, K, D), the tokens that remain.
        assignment: (B, N) int64, for each input token the index of its output token, or -1 if it was dropped.
    """

    tokens: Tensor
    assignment: Tensor


class Masked(NamedTuple):
    """Output, in training, of a downsampler that masks tokens and drops none.

    Attributes:
        tokens: (B, N, D).
        assignment: (B, N) int64, the identity.
        mask: (B, N), positive weights, with gradient. They multiply the sizes of the tokens. Later attentions add the
            log of the size to the logits of a token's key, so a weight near zero removes the token from them.
    """

    tokens: Tensor
    assignment: Tensor
    mask: Tensor


class Host(NamedTuple):
    """The properties of a model that a downsampler may use.

    Attributes:
        depth: number of blocks.
        width: width D of the tokens.
        grid: rows and columns of patches.
        reads_patches: whether the model's head needs at least one patch token.
        is_dynamic: whether the grid may differ from image to image.
        unpools: whether the head reads all patches, each with the value of its merged token.
        has_class_token: whether the model has a class token.
    """

    depth: int
    width: int
    grid: tuple[int, int]
    reads_patches: bool
    is_dynamic: bool = False
    unpools: bool = False
    has_class_token: bool = False

    def schedule(self, form: float | str | None) -> Callable[[int], list[int]] | None:
        """Return the function from the number of patches of an image to its schedule. See `schedules.resolve`."""
        if form is None:
            return None
        return partial(schedules.resolve, form, depth=self.depth, least=int(self.reads_patches))


class Downsampler(nn.Module):
    """Base class of all methods: at most `keep` of N tokens remain.

    With `keep >= N` the tokens do not change. With `keep = 0` all tokens are dropped. The result of an image must not
    depend on the other images of its batch, because a large batch is processed in parts (on a CPU, without gradients).

    Args:
        keep: maximum number K of tokens that remain.

    Attributes:
        uses_scores: whether `reduce` needs significance scores.
        uses_sizes: whether `reduce` needs `sizes` (B, N), the number of patches that each token stands for.
        uses_keys: whether `reduce` needs `keys` (B, N, d), the mean over heads of the attention's keys.
        uses_class_attention: whether `reduce` needs `class_attention` (B, N), the attention of the class token to each
            token: mean over heads, without gradient. Only for models with a class token.
        merges: whether each token is merged into an output token, and none is dropped. `tokenpool.unpool` needs this.
        masks: whether `forward` returns `Masked` in training. The model's attention then always uses sizes, as with
            `carry=True`.
    """

    uses_scores = True
    uses_sizes = False
    uses_keys = False
    uses_class_attention = False
    merges = False
    masks = False

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    @classmethod
    def for_blocks(cls, host: Host, keep: Sequence[int] | None, **options: Any) -> list["Downsampler | None"]:
        """Create one downsampler for each block of a model.

        Args:
            host: properties of the model.
            keep: retention schedule, one whole number for each block.
            **options: arguments of the class.

        Returns:
            The downsampler of each block, or None for a block without a downsampler.

        Raises:
            ValueError: if `keep` is missing, has the wrong length, or leaves no token to a head that reads patches.
                Also if the class uses the attention of a class token, but the model has no class token.
        """
        if cls.uses_class_attention and not host.has_class_token:
            raise ValueError(
                f"{cls.__name__} needs the attention of a class token, but the model has no class token: choose "
                "another method, or a model with a class token"
            )
        if keep is None:
            raise ValueError(
                f"{cls.__name__} needs a schedule: give gmacs, or keep as a list of {host.depth} whole numbers (one a "
                "block) or in a short form such as 0.9 (see tokenpool.schedules.resolve)"
            )
        keep = schedules.checked(keep, host.depth)
        if host.reads_patches and 0 in keep:
            raise ValueError(
                f"keep[{keep.index(0)}] = 0 must be at least 1: the head of this model reads the patch tokens"
            )
        return [cls(limit, **options) for limit in keep]

    def with_keep(self, keep: int) -> Self:
        """Return this downsampler with another `keep`. Its parameters, modules, hooks and generator are the same."""
        if keep == self.keep:
            return self
        other = type(self).__new__(type(self))  # copy.copy could not be compiled
        vars(other).update(vars(self) | {"keep": keep})
        return other

    def acts_on(self, n: int) -> bool:
        """Return whether the downsampler changes n tokens."""
        return n > self.keep

    def forward(self, tokens: Tensor, scores: Tensor | None = None, **hints: Tensor) -> "Downsampled | Masked":
        """Downsample tokens.

        Args:
            tokens: (B, N, D).
            scores: (B, N), significance scores, if the class uses them.
            **hints: `sizes` (B, N), `keys` (B, N, d) and `class_attention` (B, N), if the class uses them.

        Returns:
            The remaining tokens (B, K, D) and the assignment (B, N).
        """
        batch, n, _ = tokens.shape
        if not self.acts_on(n):
            return Downsampled(tokens, torch.arange(n, device=tokens.device).expand(batch, n))
        if self.keep == 0:
            return Downsampled(tokens[:, :0], torch.full((batch, n), -1, device=tokens.device))
        return self._checked(tokens, self.reduce(tokens, scores, **hints))

    def _checked(self, tokens: Tensor, found: "Downsampled | Masked") -> "Downsampled | Masked":
        """Check the result of `reduce`, which a class of a user's own may get wrong. Shapes cost nothing in a graph.

        Raises:
            TypeError: if the result is not a tuple of two or more.
            ValueError: if its shapes do not fit the tokens (B, N, D).
        """
        if not isinstance(found, tuple) or len(found) < 2:
            raise TypeError(
                f"{type(self).__name__}.reduce must return tokenpool.Downsampled(tokens, assignment), not "
                f"{type(found).__name__}"
            )
        (_, n, width), kept, assignment = tokens.shape, found[0], found[1]
        if kept.dim() != 3 or kept.shape[1] > n or kept.shape[2] != width or assignment.shape[1:] != (n,):
            raise ValueError(
                f"{type(self).__name__}.reduce must return tokens (B, K, {width}) with K <= {n} and an assignment "
                f"(B, {n}), not {tuple(kept.shape)} and {tuple(assignment.shape)}"
            )
        return found

    def reduce(self, tokens: Tensor, *scores: Any, **hints: Any) -> Downsampled:
        """Reduce N tokens to `keep` tokens, where 0 < keep < N. The arguments are the same as in `forward`.

        A subclass implements `reduce(self, tokens, scores)`, with the keywords `sizes`, `keys` and `class_attention` if
        it uses them.
        """
        raise NotImplementedError

    def macs(self, n: int, width: int, key_width: int) -> int:
        """Return the multiply-adds of `reduce` by a formula. This makes the search for a budget faster.

        The result must equal `flops.count`. The formula is used only for the class that defines it, not for its
        subclasses, which may cost more. A class without its own formula is traced, which takes longer.

        Args:
            n: number of tokens N, more than `keep`.
            width: width D of the tokens.
            key_width: width d of the keys.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"keep={self.keep}"
