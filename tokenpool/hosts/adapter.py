"""The interface between this library and a family of models."""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool.adoption import check_exchangeable, reference
from tokenpool.attention import ScoredAttention
from tokenpool.blocks import PooledBlock, PooledBlocks, Setting
from tokenpool.downsampling import Downsampler, Host
from tokenpool.hosts.obstacles import obstacle
from tokenpool.stream import NEEDS_PLAIN, Frame

_INTERMEDIATES = "forward_intermediates"


class Layers(NamedTuple):
    """The layers of a block that determine its cost. All other layers of a block cost nothing.

    Attributes:
        before: layers that run before the downsampler, each with its input width.
        after: layers that run after the downsampler, each with its input width.
        heads: number of attention heads.
        head_dim: width of the queries and keys of a head; values have the same width.
        table: number of floats of the rotary table for each patch, of all heads. 0 without rotary positions.
    """

    before: list[tuple[nn.Module, int]]
    after: list[tuple[nn.Module, int]]
    heads: int
    head_dim: int
    table: int = 0


class Adapter(ABC):
    """Access to the parts of a model that belongs to one family of models.

    An adapter holds only the model, so it is cheap to create. It works on plain and on patched models. A subclass
    contains all code that depends on the family. Other modules of the library use the adapter and never name the parts
    of a model.

    Class attributes that a subclass sets:
        FAMILY: the family in words, for error messages.
        STACK: name of the stack of blocks in the model.
        PARTS: pairs of a pattern and the name of a part, usually one of `flops.PARTS`. The first pattern that matches
            the start of a module's name decides to which part the module's FLOPs belong.
        OPTIONS: the arguments of `timm.create_model` that a checkpoint stores, each with a function that reads the
            value from a model.
        IDENTITY: attributes that change the output of a model, besides modules and weights. A dot leads to an attribute
            of a module; a missing attribute counts as None. A model can be saved only if a model that is built from the
            checkpoint has the same values.
        CLASSIFIERS: names of the parameters that depend on the number of classes.
        COUNT_POOLED: whether the FLOPs of a plain model are counted with pooled blocks that keep all tokens. This is
            for models that run operators which fvcore does not know.
        SAVED_BY: the model's own method that saves it, if `tokenpool.save` does not save models of this family.
    """

    FAMILY: ClassVar[str]
    STACK: ClassVar[str] = "blocks"
    PARTS: ClassVar[Sequence[tuple[str, str]]]
    OPTIONS: ClassVar[dict[str, Callable[[Any], Any]]] = {}
    IDENTITY: ClassVar[Sequence[str]] = ()
    CLASSIFIERS: ClassVar[frozenset[str]] = frozenset(
        {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    )
    COUNT_POOLED: ClassVar[bool] = False
    SAVED_BY: ClassVar[str | None] = None

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # Any, because PyTorch's stubs do not know the attributes of a model

    @classmethod
    @abstractmethod
    def fits(cls, model: nn.Module) -> bool:
        """Return whether the class of a model belongs to this family. `check` examines the blocks."""

    # Parts of the model

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
    def is_dynamic(self) -> bool:
        """Whether the grid of patches may differ from image to image."""
        return False

    @property
    @abstractmethod
    def head_reads_patches(self) -> bool:
        """Whether the head reads the patch tokens, not only the class token."""

    @abstractmethod
    def grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return rows and columns of patches.

        Args:
            image_size: height and width of an image in pixels. Default: the grid of the position embedding.
        """

    @abstractmethod
    def pooled_class(self, block: nn.Module) -> type[PooledBlock] | None:
        """Return the pooled class of one of the model's own blocks, or None if the block cannot be pooled."""

    # Costs, signals, weights

    @abstractmethod
    def layers(self, block: nn.Module) -> Layers:
        """Return the layers that determine the cost of a block, pooled or plain."""

    def watch_attention(self, block: nn.Module, record: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
        """Call `record(name, value)` for each signal of a plain block, whenever the block runs.

        The signals have the names and shapes of `redundancy.Signals`, but include prefix tokens.

        Returns:
            Handles that remove the hooks.

        Raises:
            TypeError: if the adapter does not support it.
        """
        raise TypeError(f"signals of {self.FAMILY} are not supported: its adapter has no watch_attention")

    def convert(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Convert weights of a file to the names and sizes of this model.

        Returns:
            The weights, and a note in words on each important change. Weights that cannot be converted are returned
            unchanged.
        """
        return weights, []

    # Methods for all families

    @property
    def stack(self) -> str:
        """Name of the stack of blocks in this model. Adapters of nested models replace it."""
        return self.STACK

    @property
    def blocks(self) -> Any:
        """The current stack of blocks: `PooledBlocks` in a patched model."""
        return self.model.get_submodule(self.stack)

    @property
    def is_rotary(self) -> bool:
        """Whether the attention rotates queries and keys by their positions."""
        return False

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token. A family with a class token overrides this."""
        return False

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
        """The arguments that the model was patched with. None for a plain model."""
        return self.blocks.setting if self.is_patched else None

    @property
    def downsamplers(self) -> list[Downsampler | None]:
        """The downsampler of each block, or None for a block without a downsampler."""
        return [block.downsampler if self.is_patched else None for block in self.blocks]

    def check(self) -> None:
        """Check that `pool` (of a plain model) or `unpool` (of a patched model) can replace the blocks.

        Raises:
            TypeError: if a block cannot be pooled. The message gives the reason.
            ValueError: if a replaced module has hooks, parameters or a forward method that would be lost.
        """
        stack, where = self.blocks, f"model.{self.stack}"
        if type(stack) not in (nn.Sequential, nn.ModuleList, PooledBlocks):
            raise TypeError(
                f"{where} is a {type(stack).__name__}, which cannot be pooled: it is not the model's own stack of "
                f"blocks; supported are {self.FAMILY}"
            )
        check_exchangeable(stack, where)
        for index, block in enumerate(stack):
            name = f"{self.stack}[{index}]"
            if self.is_patched:
                _check_pooled(block, name)
                kind, path, own = type(block), block.ATTENTION, (*type(block.scored_attention).OWN, "alpha")
            else:
                kind, scored = self._pooled_classes(block, index)
                path, own = kind.ATTENTION, scored.OWN
            check_exchangeable(block, name, kind.OWN)
            check_exchangeable(block.get_submodule(path), f"{name}.{path}", own)

    def _pooled_classes(self, block: nn.Module, index: int) -> tuple[type[PooledBlock], type[ScoredAttention]]:
        kind = self.pooled_class(block)
        inner = block if kind is None else block.get_submodule(kind.ATTENTION)
        scored = None if kind is None else kind.scored_class(inner)
        if kind is None or scored is None:
            raise TypeError(
                f"block {index} is a {type(inner).__name__}, which cannot be pooled: {obstacle(block)}; supported are "
                f"{self.FAMILY}"
            )
        return kind, scored

    def pool(self, layers: Sequence[Downsampler | None], setting: Setting) -> None:
        """Replace the blocks of a plain model by pooled blocks, in place.

        Args:
            layers: the downsampler of each block, or None.
            setting: arguments that the model is patched with.
        """
        like = reference(self.blocks)
        layers = [layer and layer.to(device=like.device, dtype=like.dtype) for layer in layers]
        used = [layer for layer in layers if layer is not None]
        host = self.host(setting.dense)
        frame = Frame(
            prefix=self.prefix,
            sizes=setting.carry or any(layer.uses_sizes for layer in used),
            positions=setting.positions if self.is_rotary else None,
            unpools=host.unpools and any(layer.merges for layer in used),
            drops=host.unpools and not all(layer.merges for layer in used),
            schedule=host.schedule(setting.form),
        )
        blocks = [
            self.pooled_class(block)(block, layer, frame, setting)  # type: ignore[misc]  # `check` rules None out
            for block, layer in zip(self.blocks, layers, strict=True)
        ]
        self._put(PooledBlocks(blocks, setting, self.blocks))
        if hasattr(self.model, _INTERMEDIATES):
            setattr(self.model, _INTERMEDIATES, _refuse_intermediates)
        self.record(setting)

    def unpool(self) -> None:
        """Replace the pooled blocks of a patched model by the model's own blocks, in place."""
        self._put(self.blocks.give_back())
        vars(self.model).pop(_INTERMEDIATES, None)
        self.record(None)

    def record(self, setting: Setting | None) -> None:  # noqa: B027 - most models have no place for a setting
        """Write the setting where the model's own method of saving finds it. None removes the setting."""

    def _put(self, stack: nn.Module) -> None:
        parent, _, name = self.stack.rpartition(".")
        setattr(self.model.get_submodule(parent), name, stack)

    def host(self, dense: bool = False) -> Host:
        """Return the properties of the model that a downsampler may use. See `tokenpool.patch` for `dense`."""
        unpools = dense or self.head_reads_patches
        reads_patches = unpools or not self.prefix
        return Host(self.depth, self.width, self.grid(), reads_patches, self.is_dynamic, unpools, self.has_class_token)

    def identity(self) -> list[str]:
        """Return the attributes in `IDENTITY` with their values, as text. A name may have dots."""

        def read(name: str) -> Any:
            return functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), self.model)

        return [f"{name} = {read(name)}" for name in self.IDENTITY]

    def copy_with_blocks(self, stand_in: nn.Module) -> nn.Module:
        """Return a copy of the model with another module as its stack of blocks. The model's blocks are not copied."""
        return copy.deepcopy(self.model, {id(self.blocks): stand_in})

    def run(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Run a model on images.

        Args:
            images: (B, C, H, W).
            model: the module to call: the model of this adapter, or a module that wraps it. Default: the model.

        Returns:
            (B, classes), or the features of the images if the model has no classes.
        """
        return (model or self.model)(images)

    def blank_image(self, image_size: tuple[int, int] | None = None) -> Tensor:
        """Return a black image (1, C, H, W). The default is the model's own image size."""
        channels, *size = self.image_shape
        return torch.zeros(1, channels, *(image_size or size))


def _refuse_intermediates(*arguments: Any, **named: Any) -> NoReturn:
    """Stand in for a method that expects all patches after each block. It could reshape fewer tokens silently."""
    raise TypeError(f"{_INTERMEDIATES} was called; {NEEDS_PLAIN}")


def _check_pooled(block: nn.Module, name: str) -> None:
    for path, kind in (("", PooledBlock), (getattr(block, "ATTENTION", ""), ScoredAttention)):
        module, where = block.get_submodule(path), f"{name}.{path}".rstrip(".")
        if not isinstance(module, kind):
            raise TypeError(
                f"{where} is a {type(module).__name__} and would be lost: put the {kind.__name__} of patch back first"
            )
