"""timm's VisionTransformer of standard blocks: ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP and others."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool import deit  # noqa: F401  # registers models with timm
from tokenpool.attention import Asked, Attended, ScoredAttention
from tokenpool.blocks import PooledBlock
from tokenpool.hosts.adapter import Adapter, Layers

# Arguments that timm's VisionTransformer and Eva have in common, see `Adapter.OPTIONS`.
SHARED_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "img_size": lambda model: list(model.patch_embed.img_size),
    "patch_size": lambda model: list(model.patch_embed.patch_size),
    "in_chans": lambda model: model.in_chans,
    "num_classes": lambda model: model.num_classes,
    "global_pool": lambda model: model.global_pool,
    "embed_dim": lambda model: model.embed_dim,
    "depth": lambda model: len(model.blocks),
    "num_heads": lambda model: model.blocks[0].attn.num_heads,
    "dynamic_img_size": lambda model: model.dynamic_img_size,
    "dynamic_img_pad": lambda model: model.patch_embed.dynamic_img_pad,
    "class_token": lambda model: model.cls_token is not None,
}


class PooledTimmBlock(PooledBlock):
    """timm's `Block` with a downsampler between attention and MLP."""

    norm1: nn.Module
    attn: ScoredAttention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    @classmethod
    def scored_class(cls, attention: nn.Module) -> type[ScoredAttention] | None:
        return ScoredAttention if type(attention) is Attention else None

    def attend(self, tokens: Tensor, asked: Asked) -> Attended:
        attended = self.attn(self.norm1(tokens), asked)
        return attended._replace(output=self.drop_path1(self.ls1(attended.output)))

    def feed_forward(self, tokens: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))


class TimmViT(Adapter):
    """Adapter of timm's `VisionTransformer` and its subclasses, if all blocks are timm's `Block`."""

    FAMILY = "timm's VisionTransformer models of standard blocks (ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP, ...)"
    PARTS: ClassVar[Sequence[tuple[str, str]]] = (
        (r"patch_embed", "patch_embedding"),
        (r"blocks\.\d+\.attn\.(qkv|gate)", "qkv_projections"),
        (r"blocks\.\d+\.attn\.proj", "o_projection"),
        (r"blocks\.\d+\.attn:", "softmax_attention"),
        (r"blocks\.\d+\.mlp", "mlp"),
        (r"blocks\.\d+\.downsampler\.convolution", "convolution"),
        (r"blocks\.\d+\.downsampler", "clustering"),
        (r"head|attn_pool|fc_norm", "head"),
    )
    OPTIONS: ClassVar[dict[str, Callable[[Any], Any]]] = SHARED_OPTIONS | {
        "reg_tokens": lambda model: model.num_reg_tokens,
        "pool_include_prefix": lambda model: model.pool_include_prefix,
    }
    IDENTITY: ClassVar[Sequence[str]] = (
        "num_prefix_tokens",
        "pool_include_prefix",
        "no_embed_class",
        "has_class_token",
    )

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    @property
    def width(self) -> int:
        return self.model.embed_dim

    @property
    def prefix(self) -> int:
        return self.model.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        return self.model.has_class_token

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.model.in_chans, *self.model.patch_embed.img_size

    @property
    def is_dynamic(self) -> bool:
        return self.model.dynamic_img_size

    @property
    def head_reads_patches(self) -> bool:
        return self.model.global_pool not in ("token", "")

    def grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        patch_embed = self.model.patch_embed
        rows, columns = patch_embed.dynamic_feat_size(image_size) if image_size else patch_embed.grid_size
        return rows, columns

    def pooled_class(self, block: nn.Module) -> type[PooledBlock] | None:
        return PooledTimmBlock if type(block) is Block else None

    def layers(self, block: Any) -> Layers:
        attention = block.attn
        inner = attention.num_heads * attention.head_dim
        before = [(attention.qkv, self.width), (attention.proj, inner)]
        if getattr(attention, "gate", None) is not None:
            before.append((attention.gate, self.width))
        return Layers(before, [(block.mlp, self.width)], attention.num_heads, attention.head_dim)

    def watch_attention(self, block: Any, record: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
        def record_input(name: str) -> Callable[..., None]:
            return lambda module, inputs: record(name, inputs[0])

        def record_heads(module: nn.Module, inputs: Any, output: Tensor) -> None:
            batch, n, _ = output.shape
            q, k, v = output.reshape(batch, n, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
            record("queries", q)
            record("keys", k)
            record("values", v.transpose(1, 2).flatten(2))  # (B, N, D)

        return [
            block.register_forward_pre_hook(record_input("before")),
            block.attn.qkv.register_forward_hook(record_heads),
            block.attn.proj.register_forward_pre_hook(record_input("filtered")),
            block.norm2.register_forward_pre_hook(record_input("after")),
        ]

    def convert(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Convert names of other formats and sizes of position and patch embeddings, by timm's own function."""
        try:
            converted = self._convert(dict(weights))
        except Exception:  # timm's function does not check the weights; the caller then reports the wrong keys
            return weights, []
        before, own = weights.get("pos_embed"), self.model.pos_embed
        if before is not None and own is not None and before.shape == own.shape:
            converted["pos_embed"] = before  # timm would assume a square grid and resample
        notes = [] if set(converted) == set(weights) else ["converted the names as timm does"]
        height, width = self.grid()
        is_square = math.isqrt(height * width) ** 2 == height * width
        if converted.get("pos_embed") is before is not None and height != width and is_square:
            notes.append(f"assumed that pos_embed has {height} x {width} patches, like the model")
        for key in ("pos_embed", "patch_embed.proj.weight"):
            if key in weights and key in converted and weights[key].shape != converted[key].shape:
                shapes = tuple(weights[key].shape), tuple(converted[key].shape)
                notes.append("resampled {} from {} to {}".format(key, *shapes))
        return converted, notes

    def _convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return checkpoint_filter_fn(weights, self.model, adapt_layer_scale=True, **self._interpolation())

    def _interpolation(self) -> dict[str, Any]:
        """Return timm's options for resampling. FlexiViT models need other options than the default."""
        name = (getattr(self.model, "pretrained_cfg", None) or {}).get("architecture") or ""
        return {"interpolation": "bilinear", "antialias": False} if "flexi" in name else {}
