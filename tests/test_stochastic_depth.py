import pytest
import timm
import torch
from timm.layers import DropPath

from tokenpool.training.stochastic_depth import SharedDropPath, share


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_processes_drop_what_one_drops(ranks: int) -> None:
    x = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(1))
    plain = DropPath(0.4).train()
    torch.manual_seed(3)
    expected = plain(x)
    assert (expected == 0).flatten(1).all(1).sum() not in (0, 12)
    for rank in range(ranks):
        shared = SharedDropPath(plain, torch.Generator().manual_seed(3), rank, ranks).train()
        assert torch.equal(shared(x[rank::ranks]), expected[rank::ranks])
        assert torch.equal(shared.eval()(x), x)


def test_a_model_keeps_its_weights_and_its_mode() -> None:
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, drop_path_rate=0.2).train()
    names = list(model.state_dict())
    share(model, torch.Generator(), 1, 2)
    found = [module for module in model.modules() if isinstance(module, DropPath)]
    assert len(found) == 4 and all(isinstance(module, SharedDropPath) and module.training for module in found)
    assert list(model.state_dict()) == names
    assert [module.drop_prob for module in found] == pytest.approx([0.1, 0.1, 0.2, 0.2])
