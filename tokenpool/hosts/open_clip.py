"""open_clip's own vision towers. The timm models in its other towers have timm's adapters."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool.attention import Asked, Attended, ScoredAttention
from tokenpool.blocks import Given, PooledBlock
from tokenpool.hosts.adapter import Adapter, Layers
from tokenpool.stream import NEEDS_PLAIN


class PackedAttention(ScoredAttention):
    """PyTorch's `MultiheadAttention` with one packed projection of queries, keys and values."""

    OWN = ("in_proj_weight", "in_proj_bias")

    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj: nn.Module

    @property
    def dropout(self) -> float:
        return self._host[0].dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, n, _ = x.shape
        packed = F.linear(x, self.in_proj_weight, getattr(self, "in_proj_bias", None))
        q, k, v = packed.reshape(batch, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        return self.out_proj(out)


class PooledOpenClipBlock(PooledBlock):
    """open_clip's `ResidualAttentionBlock` with a downsampler between attention and MLP."""

    ln_1: nn.Module
    ls_1: nn.Module
    ln_2: nn.Module
    mlp: nn.Module
    ls_2: nn.Module

    @classmethod
    def scored_class(cls, attention: nn.Module) -> type[ScoredAttention] | None:
        packed = type(attention) is nn.MultiheadAttention and attention.in_proj_weight is not None
        return PackedAttention if packed else None

    def given(self, tokens: Tensor | None, *arguments: Any, **named: Any) -> Given:
        if any(value is not None for value in (*arguments, *named.values())):
            raise TypeError(f"a pooled block got an attention mask; {NEEDS_PLAIN}")
        return Given()

    def attend(self, tokens: Tensor, asked: Asked) -> Attended:
        attended = self.scored_attention(self.ln_1(tokens), asked)
        return attended._replace(output=self.ls_1(attended.output))

    def feed_forward(self, tokens: Tensor) -> Tensor:
        return self.ls_2(self.mlp(self.ln_2(tokens)))

    def get_weight_dtype(self) -> Any:
        """Return the dtype of the weights, as open_clip's block does."""
        host: Any = self._host[0]
        return host.get_weight_dtype()


class OpenClip(Adapter):
    """Adapter of open_clip's own `VisionTransformer`, the `visual` of a CLIP model."""

    FAMILY = "open_clip's VisionTransformer"
    STACK = "transformer.resblocks"
    PARTS: ClassVar[Sequence[tuple[str, str]]] = (
        (r"conv1", "patch_embedding"),
        (r"transformer\.resblocks\.\d+\.attn\.out_proj", "o_projection"),
        (r"transformer\.resblocks\.\d+\.attn:linear", "qkv_projections"),
        (r"transformer\.resblocks\.\d+\.attn:", "softmax_attention"),
        (r"transformer\.resblocks\.\d+\.mlp", "mlp"),
        (r"transformer\.resblocks\.\d+\.downsampler\.convolution", "convolution"),
        (r"transformer\.resblocks\.\d+\.downsampler", "clustering"),
        (r"attn_pool|:", "head"),
    )
    CLASSIFIERS = frozenset({"proj"})
    COUNT_POOLED = True  # PyTorch's fused attention is one operator, which fvcore does not know

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        module = sys.modules.get("open_clip.transformer")
        return module is not None and isinstance(model, module.VisionTransformer)

    @property
    def width(self) -> int:
        return self.model.transformer.width

    @property
    def prefix(self) -> int:
        return 1

    @property
    def has_class_token(self) -> bool:
        return True

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width = self.model.image_size
        return self.model.conv1.in_channels, height, width

    @property
    def head_reads_patches(self) -> bool:
        model = self.model
        return model.attn_pool is not None or model.pool_type != "tok" or model.output_tokens

    def grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        height, width = image_size or self.model.image_size
        rows, columns = self.model.patch_size
        return height // rows, width // columns

    def pooled_class(self, block: nn.Module) -> type[PooledBlock] | None:
        plain = sys.modules["open_clip.transformer"].ResidualAttentionBlock
        return PooledOpenClipBlock if type(block) is plain and self.model.transformer.batch_first else None

    def layers(self, block: Any) -> Layers:
        attention = block.attn
        packed = nn.Linear(self.width, 3 * self.width, device="meta").to_empty(device="cpu")  # only counted
        before = [(packed, self.width), (attention.out_proj, self.width)]
        return Layers(before, [(block.mlp, self.width)], attention.num_heads, attention.head_dim)

    def watch_attention(self, block: Any, record: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
        def record_heads(module: nn.Module, inputs: Any) -> None:
            scored = PackedAttention(module)
            q, k, v = scored.project(inputs[0])
            record("queries", q)
            record("keys", k)
            record("values", v.transpose(1, 2).flatten(2))  # (B, N, D)
            out = F.scaled_dot_product_attention(q, k, v)  # the module computes it in one operator
            record("filtered", out.transpose(1, 2).flatten(2))

        return [
            block.register_forward_pre_hook(lambda module, inputs: record("before", inputs[0])),
            block.attn.register_forward_pre_hook(record_heads),
            block.ln_2.register_forward_pre_hook(lambda module, inputs: record("after", inputs[0])),
        ]
