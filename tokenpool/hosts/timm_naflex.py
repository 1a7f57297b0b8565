"""timm's NaFlexVit: images of any size and aspect ratio, in batches with padding."""

from collections.abc import Callable
from typing import Any, ClassVar

from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool.blocks import NOT_IN_A_GRAPH, Given, PooledBlock
from tokenpool.eager import is_in_graph
from tokenpool.hosts.adapter import Layers
from tokenpool.hosts.masks import valid_patches
from tokenpool.hosts.timm_eva import (
    PooledEvaBlock,
    TimmEva,
    eva_layers,
    four_dimensional,
    watch_rotary_attention,
)
from tokenpool.hosts.timm_vit import PooledTimmBlock, TimmViT
from tokenpool.stream import NEEDS_PLAIN


class PooledNaFlexBlock(PooledTimmBlock):
    """timm's `Block` with a downsampler between attention and MLP. It takes a mask of padding."""

    def given(
        self, tokens: Tensor | None, attn_mask: Tensor | None = None, is_causal: bool = False, **named: Any
    ) -> Given:
        _check_named(is_causal, named)
        return Given(valid=_valid_patches(attn_mask, tokens, self.frame.prefix))


class PooledNaFlexEvaBlock(PooledEvaBlock):
    """timm's `EvaBlock` with a downsampler between attention and MLP. It takes a mask of padding."""

    def given(
        self,
        tokens: Tensor | None,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **named: Any,
    ) -> Given:
        _check_named(is_causal, named)
        table = None if rope is None else four_dimensional(rope)
        return Given(table, _valid_patches(attn_mask, tokens, self.frame.prefix))


def _check_named(is_causal: bool, named: dict[str, Any]) -> None:
    if is_causal or named:
        raise TypeError(f"a pooled block got more than tokens, positions and a mask of padding; {NEEDS_PLAIN}")


def _valid_patches(mask: Tensor | None, tokens: Tensor | None, prefix: int) -> Tensor | None:
    """Return which patches (B, N) are not padding, or None without a mask, and in blocks that are not the first."""
    if mask is None or tokens is None:
        return None
    if is_in_graph():
        raise ValueError(NOT_IN_A_GRAPH)
    return valid_patches(mask, tokens, prefix)


class TimmNaFlex(TimmViT):
    """Adapter of timm's `NaFlexVit`, if all blocks are `Block` or `EvaBlock`.

    Patches of padding are removed from a batch before the first block, and come back as zeros after the last block. If
    the model gets a mask of patches, its last block returns all patches, so that they fit the mask. The mask of the
    attention must hide the same patches as `patch_valid`; timm derives it from `patch_valid`.
    """

    FAMILY = "timm's NaFlexVit models (NaFlex ViT, SigLIP 2 NaFlex, C-RADIO)"
    PARTS = ((r"embeds", "patch_embedding"), *TimmEva.PARTS[1:])
    OPTIONS: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "use_naflex": lambda model: None if _name(model).startswith("naflexvit") else True,
        "img_size": lambda model: _list(model.embeds.default_img_size),
        "pos_embed_grid_size": lambda model: None if model.embeds.default_img_size else _list(_position_grid(model)),
        "patch_size": lambda model: _list(model.embeds.patch_size),
        "in_chans": lambda model: model.in_chans,
        "num_classes": lambda model: model.num_classes,
        "global_pool": lambda model: model.global_pool,
        "fc_norm": lambda model: not isinstance(model.fc_norm, nn.Identity),
        "embed_dim": lambda model: model.embed_dim,
        "depth": lambda model: len(model.blocks),
        "num_heads": lambda model: model.blocks[0].attn.num_heads,
        "class_token": lambda model: model.has_class_token,
        "reg_tokens": lambda model: model.num_reg_tokens,
        "pool_include_prefix": lambda model: model.pool_include_prefix,
        "use_key_only_attn_mask": lambda model: model.use_key_only_attn_mask,
        "dynamic_img_pad": lambda model: model.embeds.dynamic_img_pad,
        "pos_embed": lambda model: model.embeds.pos_embed_type,
        "pos_embed_interp_mode": lambda model: model.embeds.pos_embed_interp_mode,
        "pos_embed_ar_preserving": lambda model: model.embeds.pos_embed_ar_preserving,
        "pos_embed_antialias": lambda model: model.embeds.pos_embed_antialias,
        "pos_embed_align_corners": lambda model: model.embeds.pos_embed_align_corners,
        "pos_embed_use_grid_sample": lambda model: model.embeds.pos_embed_use_grid_sample,
        "enable_patch_interpolator": lambda model: model.embeds.enable_patch_interpolator,
        "patchify_channels_last": lambda model: model.embeds.channels_last,
    }
    IDENTITY = (
        "num_prefix_tokens",
        "pool_include_prefix",
        "has_class_token",
        "use_key_only_attn_mask",
        *(name for name in TimmEva.IDENTITY if name.startswith("rope.")),
    )

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, NaFlexVit)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model is built for.

        This is the argument `img_size`, or else the size in timm's configuration of the weights, or else the grid of
        the position embedding, or else 16 x 16 patches.
        """
        config = getattr(self.model, "pretrained_cfg", None) or {}
        size = self.model.embeds.default_img_size or config.get("input_size", ())[1:]
        if not size:
            rows, columns = _position_grid(self.model) or (16, 16)
            size = rows * self.model.embeds.patch_size[0], columns * self.model.embeds.patch_size[1]
        return self.model.in_chans, *size

    @property
    def is_dynamic(self) -> bool:
        return True

    @property
    def is_rotary(self) -> bool:
        return self.model.rope is not None

    def grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        rows, columns = self.model.embeds.dynamic_feat_size(image_size or self.image_shape[1:])
        return rows, columns

    def pooled_class(self, block: nn.Module) -> type[PooledBlock] | None:
        return {Block: PooledNaFlexBlock, EvaBlock: PooledNaFlexEvaBlock}.get(type(block))

    def layers(self, block: Any) -> Layers:
        if isinstance(block, EvaBlock | PooledEvaBlock):
            return eva_layers(block, self.width, self.model.rope, self.model.rope_is_mixed)
        return super().layers(block)

    def watch_attention(self, block: Any, record: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
        if isinstance(block, EvaBlock):
            return watch_rotary_attention(block, record)
        return super().watch_attention(block, record)

    def convert(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Convert names of ViTs and of C-RADIO, by timm's own function."""
        copied = {name: value.clone() if name.endswith("_token") else value for name, value in weights.items()}
        try:
            converted = checkpoint_filter_fn(copied, self.model)  # it adds to the prefix tokens in place
        except Exception:  # timm's function does not check the weights; the caller then reports the wrong keys
            return weights, []
        return converted, [] if set(converted) == set(weights) else ["converted the names as timm does"]


def _name(model: Any) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or ""


def _list(size: Any) -> list[int] | None:
    return None if size is None else list(size)


def _position_grid(model: Any) -> tuple[int, int] | None:
    return model.embeds.pos_embed_grid_size
