"""Further DeiT models, registered with timm.

The models of width 252 and 318 are from the paper (Marin et al. 2021, section 5). `deit_digits_patch2_16` is small
enough to train on scikit-learn's digits in minutes on a CPU.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

_IMAGENET: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
_DIGITS: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (1, 16, 16),
    "crop_pct": 1.0,
    "fixed_input_size": True,
    "mean": (0.305,),  # statistics of the pixels of scikit-learn's digits, in 0..1
    "std": (0.376,),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs(
    {
        "deit_e252_patch16_224": dict(_IMAGENET),
        "deit_e318_patch16_224": dict(_IMAGENET),
        "deit_digits_patch2_16": _DIGITS,
    }
)


@register_model
def deit_e252_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT of width 252: depth 12, 6 heads of 42."""
    return _create_deit("deit_e252_patch16_224", pretrained, embed_dim=252, **kwargs)


@register_model
def deit_e318_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT of width 318: depth 12, 6 heads of 53."""
    return _create_deit("deit_e318_patch16_224", pretrained, embed_dim=318, **kwargs)


@register_model
def deit_digits_patch2_16(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT for 16 x 16 grey images: 64 tokens of width 48, depth 6, 4 heads, 10 classes."""
    arguments = {"img_size": 16, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    arguments |= {"embed_dim": 48, "depth": 6, "num_heads": 4}
    return _create_deit("deit_digits_patch2_16", pretrained, **arguments | kwargs)


def _create_deit(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    arguments = {"patch_size": 16, "depth": 12, "num_heads": 6} | kwargs
    return build_model_with_cfg(
        VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments
    )
