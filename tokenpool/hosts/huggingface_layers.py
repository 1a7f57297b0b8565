"""Pooled layers of the vision transformers in Hugging Face's transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP.

transformers is an optional package. Nothing here imports it: layers are known by the names of their classes.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenpool.attention import Asked, Attended, ScoredAttention
from tokenpool.blocks import NOT_IN_A_GRAPH, Given, PooledBlock
from tokenpool.hosts.masks import valid_patches
from tokenpool.stream import NEEDS_PLAIN

# Arguments that models give to their layers and that the layers do not use.
_UNUSED = {
    *("num_items_in_batch", "return_dict", "use_cache", "output_router_logits"),
    *("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"),
}
_CHECKPOINTING = (
    "a pooled layer has no gradient checkpointing: call model.gradient_checkpointing_disable() before tokenpool.patch, "
    "and train without it"
)


def transformers_name(module: nn.Module) -> str | None:
    """Return the name of the module's class, if the class is one of transformers' own models or layers."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("transformers.models.") else None


def output_projection(attention: nn.Module) -> nn.Module:
    """Return the layer after the heads, which has one of two names."""
    return attention.get_submodule("o_proj" if "o_proj" in attention._modules else "out_proj")


class ProjectedAttention(ScoredAttention):
    """The attention of transformers' ViT, DeiT, DINOv2, CLIP and SigLIP: separate projections `q_proj`, `k_proj`, ...

    `_attn_implementation` has no effect: queries, keys and values meet in PyTorch's `scaled_dot_product_attention`,
    which has kernels of its own, flash attention included.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    @staticmethod
    def heads_of(host: Any) -> tuple[int, int, float]:
        heads = host.num_attention_heads if hasattr(host, "num_attention_heads") else host.num_heads
        return heads, host.head_dim, host.scaling if hasattr(host, "scaling") else host.scale

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self._host[0].config

    @property
    def dropout(self) -> float:
        host = self._host[0]
        return float(host.attention_dropout if hasattr(host, "attention_dropout") else host.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, n, _ = x.shape
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (layer(x).reshape(batch, n, self.num_heads, self.head_dim).transpose(1, 2) for layer in layers)
        return q, k, v

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        return output_projection(self)(out)


class RotaryProjectedAttention(ProjectedAttention):
    """DINOv3's attention: queries and keys of patches are rotated. A row of the table has d sines, then d cosines."""

    def rotate(self, values: Tensor, table: Tensor) -> Tensor:
        prefix = values.shape[2] - table.shape[2]
        sine, cosine = table.chunk(2, dim=-1)
        patches = values[:, :, prefix:]  # (B, H, M, d)
        first, second = patches.chunk(2, dim=-1)
        rotated = patches * cosine + torch.cat([-second, first], dim=-1) * sine
        return torch.cat([values[:, :, :prefix], rotated], dim=2)


class PooledLayer(PooledBlock):
    """A layer of a vision transformer in transformers, with a downsampler between attention and MLP.

    Class attributes that a subclass sets:
        NORMS: names of the normalisations before attention and MLP.
    """

    NORMS: ClassVar[tuple[str, str]]

    mlp: nn.Module

    @classmethod
    def scored_class(cls, attention: nn.Module) -> type[ScoredAttention] | None:
        names = {"ViTAttention", "DeiTAttention", "Dinov2Attention", "Dinov2WithRegistersAttention"}
        names |= {"CLIPAttention", "SiglipAttention", "Siglip2Attention"}
        return ProjectedAttention if transformers_name(attention) in names else None

    @property
    def gradient_checkpointing(self) -> bool:
        """Always False. `model.gradient_checkpointing_enable()` sets this attribute, and gets an error."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        if value:
            raise ValueError(_CHECKPOINTING)

    def given(
        self,
        tokens: Tensor | None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **named: Any,
    ) -> Given:
        cosine, sine = position_embeddings or (None, None)
        table = None if cosine is None or sine is None else torch.cat([sine, cosine], dim=-1)[None, None]
        if tokens is None:
            return Given(table)
        self._check_arguments(named)
        if attention_mask is None:
            return Given(table)
        valid = valid_patches(sdpa_form(attention_mask), tokens, self.frame.prefix)
        if torch.compiler.is_exporting():  # transformers then makes a mask even if there is no padding
            torch.ops.aten._assert_async.msg(valid.all(), NOT_IN_A_GRAPH)
            return Given(table)
        return Given(table, valid)

    def attend(self, tokens: Tensor, asked: Asked) -> Attended:
        attended = self.scored_attention(self.get_submodule(self.NORMS[0])(tokens), asked)
        return attended._replace(output=self.after_branch(attended.output, 1))

    def feed_forward(self, tokens: Tensor) -> Tensor:
        return self.after_branch(self.mlp(self.get_submodule(self.NORMS[1])(tokens)), 2)

    def after_branch(self, branch: Tensor, index: int) -> Tensor:
        """Compute the last operation of a branch: the attention branch has index 1, and the MLP branch index 2."""
        return branch

    def _check_arguments(self, named: dict[str, Any]) -> None:
        config = getattr(self.scored_attention, "config", None)
        for name in ("output_hidden_states", "output_attentions"):
            if named.get(name, getattr(config, name, False)):
                raise TypeError(
                    f"{name} needs a plain model, because the layers of a pooled model have different numbers of "
                    "tokens: call tokenpool.unpatch first (tokenpool.trace shows the tokens of each layer)"
                )
        unknown = [name for name, value in named.items() if value is not None and value is not False]
        unknown = [name for name in unknown if name not in _UNUSED]
        if unknown:
            raise TypeError(f"a pooled layer cannot use the argument {unknown[0]!r}; {NEEDS_PLAIN}")


class PooledViTLayer(PooledLayer):
    """The layer of transformers' ViT and DeiT."""

    ATTENTION = "attention"
    NORMS = ("layernorm_before", "layernorm_after")

    dropout: nn.Module

    def after_branch(self, branch: Tensor, index: int) -> Tensor:
        return self.dropout(branch)


class PooledDINOLayer(PooledLayer):
    """The layer of transformers' DINOv2, with or without registers."""

    ATTENTION = "attention"
    NORMS = ("norm1", "norm2")

    drop_path: nn.Module

    def after_branch(self, branch: Tensor, index: int) -> Tensor:
        return self.drop_path(self.get_submodule(f"layer_scale{index}")(branch))


class PooledDINOv3Layer(PooledDINOLayer):
    """The layer of transformers' DINOv3, with rotary positions."""

    @classmethod
    def scored_class(cls, attention: nn.Module) -> type[ScoredAttention] | None:
        return RotaryProjectedAttention if transformers_name(attention) == "DINOv3ViTAttention" else None


class PooledCLIPLayer(PooledLayer):
    """The layer of transformers' CLIP, SigLIP and SigLIP 2."""

    ATTENTION = "self_attn"
    NORMS = ("layer_norm1", "layer_norm2")


def sdpa_form(mask: Any) -> Any:
    """Return a mask (B, tokens) for flash attention, where 0 is padding, as (B, 1, 1, tokens) bool. Others stay."""
    return (mask != 0)[:, None, None] if isinstance(mask, Tensor) and mask.dim() == 2 else mask
