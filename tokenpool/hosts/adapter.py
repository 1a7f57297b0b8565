"""The interface between this library and a family of models."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool.blocks import PooledBlocks, Setting
from tokenpool.downsampling import Downsampler, Host


class Layers(NamedTuple):
    """The layers of a block that determine its cost. All other layers of a block cost nothing.

    Attributes:
        before: layers that run on the tokens that enter the block, before the downsampler: each with its input width.
        after: layers that run on the tokens that leave the downsampler: each with its input width.
        heads: number of attention heads.
        head_dim: width of the queries and keys of a head; values have the same width.
    """

    before: list[tuple[nn.Module, int]]
    after: list[tuple[nn.Module, int]]
    heads: int
    head_dim: int


class Adapter(ABC):
    """What the library needs to know of a model that belongs to one family of models.

    An adapter holds the model and nothing else, so that it is cheap to make one whenever it is needed. It works on
    plain and on patched models. All that depends on the family is in the subclass; other modules of the library ask
    the adapter, and never name the parts of a model themselves.

    Class attributes that a subclass sets:
        FAMILY: the family in words, for the message of refused models.
        PARTS: pairs of a pattern and one of `flops.PARTS` (or another name), for the names of modules in the model.
            The first pattern that matches the start of a name decides which part the module's FLOPs belong to.
        OPTIONS: for each argument of `timm.create_model` that a saved model keeps, a function that reads the value
            from a model.
        IDENTITY: attributes of a model that, besides its modules and weights, decide its output. A model is saved only
            if the model that is built from the file agrees in them.
        CLASSIFIERS: names of the parameters that depend on the number of classes.
    """

    FAMILY: ClassVar[str]
    PARTS: ClassVar[Sequence[tuple[str, str]]]
    OPTIONS: ClassVar[dict[str, Callable[[Any], Any]]]
    IDENTITY: ClassVar[Sequence[str]]
    CLASSIFIERS: ClassVar[frozenset[str]] = frozenset(
        {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    )

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # Any, since PyTorch's stubs know no attributes of a model

    @classmethod
    @abstractmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether a model belongs to this family, by its class alone. `check` looks at its blocks."""

    # What the model is made of

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """The stack of blocks that is in the model now: `PooledBlocks` in a patched model."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width D of the tokens."""

    @property
    @abstractmethod
    def prefix(self) -> int:
        """Number P of prefix tokens (class, register, distillation), which come before the patch tokens."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model is built for."""

    @property
    @abstractmethod
    def is_dynamic(self) -> bool:
        """Whether the grid of patches may differ from image to image."""

    @property
    @abstractmethod
    def head_reads_patches(self) -> bool:
        """Whether the model's head reads all patch tokens, and not only the class token."""

    @abstractmethod
    def grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of patches of an image of this height and width; default: of the position embedding."""

    # Patching

    @abstractmethod
    def check(self) -> None:
        """Check that the blocks can be exchanged for pooled blocks, or a patched model's blocks for plain ones.

        Raises:
            TypeError: if a block is of a kind that cannot be pooled; the message says why.
            ValueError: if an exchanged module has hooks, parameters or a forward method that would be lost.
        """

    @abstractmethod
    def pool(self, layers: Sequence[Downsampler | None], setting: Setting) -> None:
        """Exchange the blocks of a plain model for pooled blocks with these downsamplers, one a block, in place."""

    @abstractmethod
    def unpool(self) -> None:
        """Exchange the pooled blocks of a patched model for its own blocks, in place."""

    # Costs, signals, weights

    @abstractmethod
    def layers(self, block: nn.Module) -> Layers:
        """Return the layers that determine the cost of a block, pooled or plain."""

    @abstractmethod
    def watch_attention(self, block: nn.Module, record: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
        """Call `record` with name and value of each signal in a plain block, whenever the block runs.

        The names and shapes are those of `redundancy.Signals`, with prefix tokens.
        """

    @abstractmethod
    def convert(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Convert weights of a file to the names and sizes of this model.

        Returns:
            The weights, and a note in words on each change that a user should know of. What cannot be converted is
            returned as it is.
        """

    # The same for all families

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def is_patched(self) -> bool:
        """Whether the model is patched."""
        return isinstance(self.blocks, PooledBlocks)

    @property
    def setting(self) -> Setting | None:
        """How the model was patched; None if it is plain."""
        return self.blocks.setting if self.is_patched else None

    @property
    def downsamplers(self) -> list[Downsampler | None]:
        """The downsampler of each block, None for a block that has none."""
        return [block.downsampler if self.is_patched else None for block in self.blocks]

    def host(self, dense: bool = False) -> Host:
        """Return what a downsampler may know of the model; for `dense` see `tokenpool.patch`."""
        unpools = dense or self.head_reads_patches
        reads_patches = unpools or not self.prefix
        return Host(self.depth, self.width, self.grid(), reads_patches, self.is_dynamic, unpools)

    def copy_around(self, stand_in: nn.Module) -> nn.Module:
        """Return a copy of the model with a stand-in for its stack of blocks; the blocks themselves are not copied."""
        return copy.deepcopy(self.model, {id(self.blocks): stand_in})

    def blank_image(self, image_size: tuple[int, int] | None = None) -> Tensor:
        """Return a black image (1, C, H, W); default: of the size that the model is built for."""
        channels, *size = self.image_shape
        return torch.zeros(1, channels, *(image_size or size))
