import pytest
import torch

import tokenpool
from tokenpool.downsampling import Downsampled
from tokenpool.stream import compose
from tokenpool.tracing import reconstruction_error

KEEP = [30, 17, 5, 0]


@pytest.mark.parametrize("method", ["power_bert", "random", "wkmedoids", "kmeans"])
def test_assignments_follow_every_patch(small, photos, method: str) -> None:
    tokenpool.patch(small, method, KEEP)
    trace = tokenpool.trace(small, photos)
    with torch.no_grad():
        assert torch.equal(trace.logits, small(photos))
    gone = torch.zeros(5, 36, dtype=torch.bool)
    together = None
    for block, limit in zip(trace.blocks, KEEP, strict=True):
        assert block.tokens == limit and block.assignment.shape == (5, 36)
        assert block.assignment.max() < max(limit, 0) or limit == 0
        assert (block.assignment[gone] == -1).all()  # what is dropped stays dropped
        gone = block.assignment == -1
        same = block.assignment[:, :, None] == block.assignment[:, None, :]
        assert together is None or (same | ~together).all()  # what is merged stays merged
        together = same
    assert gone.all() and trace.blocks[3].error.isnan().all()
    assert not any(block.error.isnan().any() for block in trace.blocks[:3])
    assert not small.blocks[0].downsampler._forward_hooks


def test_blocks_without_downsampling_report_the_identity(small, photos) -> None:
    blocks = tokenpool.trace(tokenpool.patch(small, "wkmedoids", [36, 40, 9, 9]), photos).blocks
    for block in blocks[:2]:
        assert (block.assignment == torch.arange(36)).all() and (block.error == 0).all()
    assert torch.equal(blocks[2].assignment, blocks[3].assignment) and (blocks[3].error == 0).all()
    assert (blocks[2].error > 0).all()


def test_reconstruction_error_by_hand() -> None:
    tokens = torch.tensor([[[0.0], [1.0], [5.0], [9.0]]])
    kept = torch.tensor([[[0.5], [9.0]]])
    merged = Downsampled(kept, torch.tensor([[0, 0, 1, 1]]))
    assert reconstruction_error(tokens, merged).item() == 0.25 + 0.25 + 16
    dropped = Downsampled(kept, torch.tensor([[0, 0, -1, 1]]))  # the dropped 5 is as near to 9 as it gets
    assert reconstruction_error(tokens, dropped).item() == pytest.approx(16.5)
    nothing = Downsampled(tokens[:, :0], torch.full((1, 4), -1))
    assert reconstruction_error(tokens, nothing).isnan().all()


def test_compose() -> None:
    first, second = torch.tensor([[0, 1, -1, 2]]), torch.tensor([[1, -1, 0]])
    assert compose(first, second).tolist() == [[1, -1, -1, 0]]
    assert compose(first, second[:, :0]).tolist() == [[-1] * 4]
