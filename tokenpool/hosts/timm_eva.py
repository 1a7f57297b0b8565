"""timm's Eva models: EVA, EVA-02, DINOv3, Perception Encoder, rope-ViT, Sapiens2 and others."""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool.attention import Asked, Attended, ScoredAttention
from tokenpool.blocks import Given, PooledBlock
from tokenpool.hosts.adapter import Layers
from tokenpool.hosts.timm_vit import SHARED_OPTIONS, TimmViT
from tokenpool.stream import NEEDS_PLAIN


class RotaryAttention(ScoredAttention):
    """timm's `AttentionRope`: rotary positions, fused or separate projections, grouped queries."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, host: Any, *options: Any) -> None:
        super().__init__(host, *options)
        self.rotates_halves = bool(host.rotate_half)
        self.num_kv_groups = int(getattr(host, "num_kv_groups", 1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, n, _ = x.shape
        if getattr(self, "qkv", None) is not None:
            q, k, v = self.fused(x).reshape(batch, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            layers = self.q_proj, self.k_proj, self.v_proj
            q, k, v = (layer(x).reshape(batch, n, -1, self.head_dim).transpose(1, 2) for layer in layers)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.num_kv_groups > 1:
            k, v = (values.repeat_interleave(self.num_kv_groups, dim=1) for values in (k, v))
        return q, k, v

    def fused(self, x: Tensor) -> Tensor:
        """Compute the fused projection (B, N, 3 H d) of tokens (B, N, D)."""
        return self.qkv(x)

    def rotate(self, values: Tensor, table: Tensor) -> Tensor:
        prefix = values.shape[2] - table.shape[2]
        rotated = apply_rot_embed_cat(values[:, :, prefix:], table, half=self.rotates_halves)
        return torch.cat([values[:, :, :prefix], rotated], dim=2)


class PooledEvaAttention(RotaryAttention):
    """timm's `EvaAttention`: its queries and values have a bias, and its keys have none."""

    OWN = ("q_bias", "k_bias", "v_bias")

    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor

    def fused(self, x: Tensor) -> Tensor:
        if getattr(self, "q_bias", None) is None:
            return self.qkv(x)
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        if self._host[0].qkv_bias_separate:
            return self.qkv(x) + bias
        return F.linear(x, cast(Tensor, self.qkv.weight), bias)


class PooledEvaBlock(PooledBlock):
    """timm's `EvaBlock` with a downsampler between attention and MLP."""

    OWN: ClassVar[tuple[str, ...]] = ("gamma_1", "gamma_2")

    norm1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    @classmethod
    def scored_class(cls, attention: nn.Module) -> type[ScoredAttention] | None:
        return {AttentionRope: RotaryAttention, EvaAttention: PooledEvaAttention}.get(type(attention))

    def given(
        self,
        tokens: Tensor | None,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **named: Any,
    ) -> Given:
        if attn_mask is not None or is_causal or named:
            raise TypeError(f"a pooled block got an attention mask; {NEEDS_PLAIN}")
        return Given(table=None if rope is None else four_dimensional(rope))

    def attend(self, tokens: Tensor, asked: Asked) -> Attended:
        attended = self.scored_attention(self.norm1(tokens), asked)
        return attended._replace(output=self.drop_path1(self._scaled(attended.output, "gamma_1")))

    def feed_forward(self, tokens: Tensor) -> Tensor:
        return self.drop_path2(self._scaled(self.mlp(self.norm2(tokens)), "gamma_2"))

    def _scaled(self, branch: Tensor, name: str) -> Tensor:
        gamma = getattr(self, name, None)
        return branch if gamma is None else gamma * branch


class PooledEvaBlockPostNorm(PooledEvaBlock):
    """timm's `EvaBlockPostNorm`, which normalises the output of attention and MLP, not their input."""

    OWN = ()

    def attend(self, tokens: Tensor, asked: Asked) -> Attended:
        attended = self.scored_attention(tokens, asked)
        return attended._replace(output=self.drop_path1(self.norm1(attended.output)))

    def feed_forward(self, tokens: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(tokens)))


def key_heads(model: Any) -> list[int] | None:
    """Return the number of key heads of each block, or None if no block has grouped queries."""
    groups = [getattr(block.attn, "num_kv_groups", 1) for block in model.blocks]
    heads = [block.attn.num_heads // shared for block, shared in zip(model.blocks, groups, strict=True)]
    return heads if max(groups, default=1) > 1 else None


class TimmEva(TimmViT):
    """Adapter of timm's `Eva`, if all blocks are `EvaBlock` or `EvaBlockPostNorm`."""

    FAMILY = "timm's Eva models (EVA, EVA-02, DINOv3, Perception Encoder, rope-ViT, ...)"
    PARTS = (
        *TimmViT.PARTS[:1],
        (r"blocks\.\d+\.attn\.(qkv|gate|[qkv]_proj)|blocks\.\d+\.attn:linear", "qkv_projections"),
        *TimmViT.PARTS[2:],
        (r"blocks\.\d+\.positions", "clustering"),
    )
    OPTIONS: ClassVar[dict[str, Callable[[Any], Any]]] = SHARED_OPTIONS | {
        "num_kv_heads": key_heads,
        "num_reg_tokens": lambda model: 0 if model.reg_token is None else model.reg_token.shape[1],
        "use_fc_norm": lambda model: not isinstance(model.fc_norm, nn.Identity),
    }
    IDENTITY = (
        "num_prefix_tokens",
        "no_embed_class",
        *(f"rope.{name}" for name in ("temperature", "max_res", "in_pixels", "linear_bands", "ref_feat_shape")),
        *(f"rope.{name}" for name in ("min_period", "max_period", "normalize_coords", "mrope_section")),
        *(f"rope.{name}" for name in ("grid_offset", "grid_indexing", "rotate_half")),
    )

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, Eva)

    @property
    def has_class_token(self) -> bool:
        return self.model.cls_token is not None

    @property
    def is_rotary(self) -> bool:
        return self.model.rope is not None

    def pooled_class(self, block: nn.Module) -> type[PooledBlock] | None:
        return {EvaBlock: PooledEvaBlock, EvaBlockPostNorm: PooledEvaBlockPostNorm}.get(type(block))

    def layers(self, block: Any) -> Layers:
        return eva_layers(block, self.width, self.model.rope, self.model.rope_mixed)

    def watch_attention(self, block: Any, record: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
        return watch_rotary_attention(block, record)

    def _convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return checkpoint_filter_fn(weights, self.model)


def four_dimensional(rope: Tensor) -> Tensor:
    """Return timm's rotary table as (B or 1, H or 1, N, W).

    Args:
        rope: (N, W), (H, N, W) or (B, H or 1, N, W). timm's tables without a batch have at most three dimensions.
    """
    return rope.reshape((1,) * (4 - rope.dim()) + rope.shape)


def eva_layers(block: Any, width: int, rope: nn.Module | None, is_mixed: bool) -> Layers:
    """Return the layers of an `EvaBlock` that determine its cost. See `Adapter.layers`.

    Args:
        block: the block, pooled or plain.
        width: width D of the tokens.
        rope: the model's rotary embedding, or None.
        is_mixed: whether each head has its own table.
    """
    attention = block.attn
    inner = attention.num_heads * attention.head_dim
    found = (getattr(attention, name, None) for name in ("qkv", "q_proj", "k_proj", "v_proj", "gate"))
    before = [(layer, width) for layer in found if layer is not None]
    tables = 0 if rope is None else attention.num_heads if is_mixed else 1
    return Layers(
        [*before, (attention.proj, inner)],
        [(block.mlp, width)],
        attention.num_heads,
        attention.head_dim,
        table=2 * attention.head_dim * tables,
    )


def watch_rotary_attention(block: Any, record: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
    """Record the signals of a plain `EvaBlock`. See `Adapter.watch_attention`.

    Queries and keys are recorded after normalisation and rotation.
    """
    kind = PooledEvaBlock.scored_class(block.attn)
    assert kind is not None

    def record_heads(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        scored = kind(module)
        q, k, v = scored.project(inputs[0])
        if named.get("rope") is not None:
            table = four_dimensional(named["rope"])
            q, k = scored.rotate(q, table), scored.rotate(k, table)
        record("queries", q)
        record("keys", k)
        record("values", v.transpose(1, 2).flatten(2))  # (B, N, D)

    post_norm = isinstance(block, EvaBlockPostNorm)
    after = block.mlp if post_norm else block.norm2
    return [
        block.register_forward_pre_hook(lambda module, inputs: record("before", inputs[0])),
        block.attn.register_forward_pre_hook(record_heads, with_kwargs=True),
        block.attn.proj.register_forward_pre_hook(lambda module, inputs: record("filtered", inputs[0])),
        after.register_forward_pre_hook(lambda module, inputs: record("after", inputs[0])),
    ]
