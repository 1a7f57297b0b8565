from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """Photographs, weights and the paper's tables, which are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with photographs and weights, which is not here")
    return SHARED


@pytest.fixture
def small() -> VisionTransformer:
    """A small DeiT with random weights that are large enough for attention to have a shape."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=96, embed_dim=48, depth=4, num_heads=3, num_classes=7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture
def photos() -> torch.Tensor:
    """Noise of the size that `small` takes: 36 patches an image."""
    return torch.randn(5, 3, 96, 96, generator=torch.Generator().manual_seed(3))
