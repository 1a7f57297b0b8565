"""Vision transformers of Hugging Face's transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and SigLIP 2.

transformers is an optional package, which this module does not import. Models are known by the names of their classes.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool.blocks import PooledBlock, Setting
from tokenpool.downsampling import METHODS, Downsampler
from tokenpool.hosts.adapter import Adapter, Layers
from tokenpool.hosts.huggingface_layers import (
    PooledCLIPLayer,
    PooledDINOLayer,
    PooledDINOv3Layer,
    PooledLayer,
    PooledViTLayer,
    ProjectedAttention,
    output_projection,
    transformers_name,
)


class Tower(NamedTuple):
    """A vision transformer in transformers.

    Attributes:
        stack: name of its stack of layers.
        layer: name of the class of its layers.
        pooled: pooled class of its layers.
        prefix: number of prefix tokens besides register tokens.
        is_dynamic: whether the grid of patches may differ from image to image.
    """

    stack: str
    layer: str
    pooled: type[PooledLayer]
    prefix: int
    is_dynamic: bool


class Place(NamedTuple):
    """The place of the vision transformer in a model of transformers.

    Attributes:
        tower: name of the vision transformer in the model. "" is the model itself.
        reads_patches: whether the model reads the patch tokens. A pooling head in the tower is not included.
        reads_grid: whether the model reads each patch token at its place in the grid.
    """

    tower: str
    reads_patches: bool
    reads_grid: bool = False


TOWERS = {
    "ViTModel": Tower("layers", "ViTLayer", PooledViTLayer, 1, False),
    "DeiTModel": Tower("layers", "DeiTLayer", PooledViTLayer, 2, False),
    "Dinov2Model": Tower("encoder.layer", "Dinov2Layer", PooledDINOLayer, 1, True),
    "Dinov2WithRegistersModel": Tower("encoder.layer", "Dinov2WithRegistersLayer", PooledDINOLayer, 1, True),
    "DINOv3ViTModel": Tower("model.layer", "DINOv3ViTLayer", PooledDINOv3Layer, 1, True),
    "CLIPVisionModel": Tower("encoder.layers", "CLIPEncoderLayer", PooledCLIPLayer, 1, False),
    "SiglipVisionModel": Tower("encoder.layers", "SiglipEncoderLayer", PooledCLIPLayer, 0, False),
    "Siglip2VisionModel": Tower("encoder.layers", "Siglip2EncoderLayer", PooledCLIPLayer, 0, True),
}
PLACES = {name: Place("", False) for name in TOWERS} | {
    "ViTForImageClassification": Place("vit", False),
    "ViTForMaskedImageModeling": Place("vit", True, reads_grid=True),
    "DeiTForImageClassification": Place("deit", False),
    "DeiTForImageClassificationWithTeacher": Place("deit", False),
    "DeiTForMaskedImageModeling": Place("deit", True, reads_grid=True),
    "Dinov2ForImageClassification": Place("dinov2", True),
    "Dinov2WithRegistersForImageClassification": Place("dinov2_with_registers", True),
    "CLIPModel": Place("vision_model", False),
    "CLIPVisionModelWithProjection": Place("vision_model", False),
    "CLIPForImageClassification": Place("vision_model", True),
    "SiglipModel": Place("vision_model", False),
    "SiglipForImageClassification": Place("vision_model", True),
    "Siglip2Model": Place("vision_model", False),
    "Siglip2ForImageClassification": Place("vision_model", True),
}
_LAYER = r"(\w+\.)*layers?\.\d+\."
# The result of a model for an image: the first of these outputs that the model has.
_RESULTS = ("logits", "image_embeds", "pooler_output", "reconstruction", "last_hidden_state")


class HuggingFaceViT(Adapter):
    """Adapter of transformers' vision transformers, alone and in models that contain one (see `PLACES`)."""

    FAMILY = "transformers' ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and SigLIP 2"
    PARTS: ClassVar[Sequence[tuple[str, str]]] = (
        (r"(\w+\.)*embeddings", "patch_embedding"),
        (_LAYER + r"(attention|self_attn)\.[qkv]_proj", "qkv_projections"),
        (_LAYER + r"(attention|self_attn)\.(o|out)_proj", "o_projection"),
        (_LAYER + r"(attention|self_attn):", "softmax_attention"),
        (_LAYER + r"mlp", "mlp"),
        (_LAYER + r"downsampler\.convolution", "convolution"),
        (_LAYER + r"(downsampler|positions)", "clustering"),
        (r"(\w+\.)*(\w*classifier|head|pooler|decoder|visual_projection)", "head"),
    )
    SAVED_BY = "save_pretrained"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return _known_name(model, PLACES) is not None

    # Parts of the model

    @property
    def place(self) -> Place:
        """The place of the vision transformer in the model."""
        return PLACES[str(_known_name(self.model, PLACES))]

    @property
    def tower(self) -> Any:
        """The vision transformer."""
        return self.model.get_submodule(self.place.tower)

    @property
    def kind(self) -> Tower:
        """The kind of vision transformer."""
        return TOWERS[str(_known_name(self.tower, TOWERS))]

    @property
    def stack(self) -> str:
        return f"{self.place.tower}.{self.kind.stack}".lstrip(".")

    @property
    def width(self) -> int:
        return self.tower.config.hidden_size

    @property
    def prefix(self) -> int:
        registers = getattr(self.tower.embeddings, "register_tokens", None)
        return self.kind.prefix + (0 if registers is None else registers.shape[1])

    @property
    def has_class_token(self) -> bool:
        return self.kind.prefix > 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        config = self.tower.config
        if self.takes_patches:
            rows, columns = self.grid()
            height, width = _pair(config.patch_size)
            return config.num_channels, rows * height, columns * width
        return config.num_channels, *_pair(config.image_size)

    @property
    def takes_patches(self) -> bool:
        """Whether the model takes patches instead of images (SigLIP 2)."""
        return not hasattr(self.tower.config, "image_size")

    @property
    def is_dynamic(self) -> bool:
        return self.kind.is_dynamic

    @property
    def is_rotary(self) -> bool:
        return self.kind.pooled is PooledDINOv3Layer

    @property
    def head_reads_patches(self) -> bool:
        return self.place.reads_patches or getattr(self.tower, "use_head", False)

    def grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        config = self.tower.config
        if image_size is None and self.takes_patches:
            side = math.isqrt(config.num_patches)
            return side, side
        height, width = image_size or _pair(config.image_size)
        rows, columns = _pair(config.patch_size)
        return height // rows, width // columns

    def pooled_class(self, block: nn.Module) -> type[PooledBlock] | None:
        return self.kind.pooled if transformers_name(block) == self.kind.layer else None

    # Patch

    def check(self) -> None:
        """See `Adapter.check`.

        transformers puts hooks on layers if a call asks for hidden states or attentions. This method removes them, so
        that they are not lost on a replaced layer. The plain model puts them on again with the next such call.
        """
        for module in self.tower.modules():
            _remove_capturing_hooks(module)
        super().check()
        if any(getattr(block, "gradient_checkpointing", False) for block in self.blocks):
            raise ValueError(
                "the model has gradient checkpointing, which pooled layers do not have: call "
                "model.gradient_checkpointing_disable() before tokenpool.patch"
            )

    def pool(self, layers: Sequence[Downsampler | None], setting: Setting) -> None:
        """See `Adapter.pool`.

        Raises:
            ValueError: for a method that drops patches, if the model reads the patches by a mask or by their places.
        """
        needs_all = self.place.reads_grid or (self.takes_patches and self.head_reads_patches)
        if needs_all and not all(layer is None or layer.merges for layer in layers):
            raise ValueError(
                f"downsampler {setting.downsampler!r} drops patches, but {type(self.model).__name__} needs all "
                "patches: use a method that merges tokens, such as key_medoids"
            )
        super().pool(layers, setting)

    def record(self, setting: Setting | None) -> None:
        """Write the setting to `model.config.tokenpool`, where `save_pretrained` finds it.

        A setting that `tokenpool.patch_from_config` could not restore is not written: with a method that is not
        registered, an option that is no JSON value, or a patch with parameters of its own.
        """
        config = self.model.config
        if hasattr(config, "tokenpool"):
            del config.tokenpool
        if setting is None or setting.downsampler not in METHODS or self._has_own_parameters(setting):
            return
        try:
            config.tokenpool = json.loads(json.dumps(setting.arguments()))
        except TypeError:
            return

    def _has_own_parameters(self, setting: Setting) -> bool:
        return setting.learn_alpha or any(layer is not None and layer.state_dict() for layer in self.downsamplers)

    # Costs and signals

    def run(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Run the model on images. Of a model for images and texts, only the part for images runs.

        Args:
            images: (B, C, H, W). SigLIP 2 gets their patches, without padding.
            model: see `Adapter.run`.

        Returns:
            (B, classes), or the features of the images, (B, D).
        """
        called: Any = model or self.model
        call = getattr(called, "get_image_features", called)
        outputs = call(**self._arguments(images), return_dict=True)
        return next(outputs[name] for name in _RESULTS if outputs.get(name) is not None)

    def _arguments(self, images: Tensor) -> dict[str, Any]:
        if not self.takes_patches:
            return {"pixel_values": images}
        batch, channels, height, width = images.shape
        rows, columns = self.grid((height, width))
        down, right = _pair(self.tower.config.patch_size)
        patches = images[:, :, : rows * down, : columns * right].reshape(batch, channels, rows, down, columns, right)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, P P C)
        shapes = torch.tensor([[rows, columns]], device=images.device).expand(batch, -1)
        return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}

    def layers(self, block: Any) -> Layers:
        attention = block.get_submodule(self.kind.pooled.ATTENTION)
        heads, head_dim, _ = ProjectedAttention.heads_of(attention)
        before = [(getattr(attention, name), self.width) for name in ("q_proj", "k_proj", "v_proj")]
        before.append((output_projection(attention), heads * head_dim))
        return Layers(before, [(block.mlp, self.width)], heads, head_dim, 2 * head_dim if self.is_rotary else 0)

    def watch_attention(self, block: Any, record: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
        attention = block.get_submodule(self.kind.pooled.ATTENTION)
        scored: Any = self.kind.pooled.scored_class(attention)

        def record_heads(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            pooled = scored(module)
            q, k, v = pooled.project(named["hidden_states"] if "hidden_states" in named else inputs[0])
            if named.get("position_embeddings") is not None:
                cosine, sine = named["position_embeddings"]
                table = torch.cat([sine, cosine], dim=-1)[None, None]
                q, k = pooled.rotate(q, table), pooled.rotate(k, table)
            record("queries", q)
            record("keys", k)
            record("values", v.transpose(1, 2).flatten(2))  # (B, N, D)

        after = block.get_submodule(self.kind.pooled.NORMS[1])
        return [
            block.register_forward_pre_hook(lambda module, inputs: record("before", inputs[0])),
            attention.register_forward_pre_hook(record_heads, with_kwargs=True),
            output_projection(attention).register_forward_pre_hook(
                lambda module, inputs: record("filtered", inputs[0])
            ),
            after.register_forward_pre_hook(lambda module, inputs: record("after", inputs[0])),
        ]


def _known_name(model: nn.Module, names: dict[str, Any]) -> str | None:
    """Return the name of the first class of transformers among the classes of a model that is in `names`."""
    kinds = (kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    return next((kind.__name__ for kind in kinds if kind.__name__ in names), None)


def _remove_capturing_hooks(module: nn.Module) -> None:
    """Remove the hooks of transformers' `capture_outputs` from a module, so that transformers puts them on again."""
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
            del module._forward_hooks[key]
    vars(module).pop("_output_capturing_hooks_installed", None)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return height, width
