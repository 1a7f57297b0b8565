"""The DeiT models that timm does not have."""

import timm

import tokenpool  # noqa: F401 - registers the models


def test_new_deits_are_registered() -> None:
    for name, width in (("deit_e252_patch16_224", 252), ("deit_e318_patch16_224", 318)):
        model = timm.create_model(name)
        assert model.embed_dim == width and len(model.blocks) == 12 and model.blocks[0].attn.num_heads == 6
        blocks = 12 * (12 * width**2 + 13 * width)
        around = (768 + 1) * width + (1 + 197) * width + 2 * width + 1000 * (width + 1)
        assert sum(parameter.numel() for parameter in model.parameters()) == blocks + around
