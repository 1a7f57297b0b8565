"""K-Medoids as a loop of ONNX gives the clusters of K-Medoids in eager mode, and so do operators of compiled graphs."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from tokenpool import clustering
from tokenpool.tools.formats import Onnx, OpenVino

N = 30


class Clustering(nn.Module):
    """Clusters images of N patches with 6 numbers, and a weight, each."""

    def __init__(self, k: int, iterations: int, init: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.k, self.iterations, self.init, self.dtype = k, iterations, init, dtype
        self.register_buffer("points", torch.randn(self.k, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        tokens, weights = images[..., :6].to(self.dtype), images[..., 6]
        named: dict = {"by": clustering.unit_vectors(tokens), "init": "ward"} if self.init == "ward" else {}
        if self.init == "points":
            named = {"init": self.points.expand(images.shape[0], -1, -1)}
        if self.init == "indices":  # of weight zero, among others
            named = {"init": torch.arange(self.k).expand(images.shape[0], -1)}
        centers, assignment = clustering.kmedoids(tokens, self.k, weights, iterations=self.iterations, **named)
        return torch.cat([centers.flatten(1).float(), assignment.float()], dim=1)


def images(count: int, seed: int) -> Tensor:
    """Tokens around a few points, so that medoids move. Weights of a third are zero, so some clusters have none."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, 9, (count, N), generator=generator)
    tokens = torch.randn(count, 9, 6, generator=generator).gather(1, places[:, :, None].expand(-1, -1, 6))
    tokens = tokens + 0.3 * torch.randn(count, N, 6, generator=generator)
    weights = torch.rand(count, N, 1, generator=generator).index_fill(1, torch.arange(2, 12), 0)
    return torch.cat([tokens, weights], dim=2)


@pytest.mark.parametrize(
    "k, iterations, init, dtype",
    [
        (8, 5, "scores", torch.float32),
        (8, 1, "scores", torch.float32),
        (8, 2, "ward", torch.float32),
        (25, 5, "ward", torch.float32),
        (1, 5, "scores", torch.float32),
        (N, 5, "scores", torch.float32),
        (6, 5, "points", torch.float32),
        (9, 5, "indices", torch.float32),
        (8, 5, "scores", torch.float64),
        (12, 5, "scores", torch.float16),
    ],
)
@torch.no_grad()
def test_a_loop_gives_the_same_clusters(k: int, iterations: int, init: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module = Clustering(k, iterations, init, dtype)
    path = tmp_path / "clustering.onnx"
    Onnx().write(module, images(2, 0), path, {}, 20)
    run, _, operators = Onnx().read(path, 1)
    assert ("Loop" in operators) == (init != "points" and dtype != torch.float64) and not [
        name for name in operators if "-" in name
    ]
    assert not onnx.load(path).functions
    for seed, count in enumerate((1, 4, 60)):
        some = images(count, seed)
        torch.testing.assert_close(run(some), module(some), rtol=0, atol=5e-3 if dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize("init", ["scores", "ward", "indices"])
@torch.no_grad()
def test_an_exported_program(init: str) -> None:
    module = Clustering(12, 5, init, torch.float32)
    program = torch.export.export(module, (images(2, 0),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for some in (images(60, 3), images(3, 4).index_fill(2, torch.tensor([6]), 1)):  # the last with equal weights
        torch.testing.assert_close(program(some), module(some), rtol=0, atol=1e-4)


@pytest.mark.parametrize("k, init", [(8, "scores"), (12, "ward")])
@torch.no_grad()
def test_openvino(k: int, init: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    module = Clustering(k, 5, init, torch.float32)
    OpenVino().write(module, images(2, 0), tmp_path / "clustering.xml", {}, 20)
    run = OpenVino().read(tmp_path / "clustering.xml", 1)[0]
    for seed, count in enumerate((1, 60)):
        some = images(count, seed)
        torch.testing.assert_close(run(some), module(some), rtol=0, atol=1e-4)


def test_medoids_move_in_these_images() -> None:
    """So the test above is not one of a loop that ends at once, or one that always runs to its end."""
    some = images(60, 2)
    found = [Clustering(8, iterations, "scores", torch.float32)(some) for iterations in (1, 2, 5)]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
