"""In a graph that is compiled for a CPU, clustering and attention with scores are operators that run the eager code."""

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import tokenpool
from tokenpool import clustering


@pytest.fixture
def compiled() -> Iterator[tuple[Callable, list[str]]]:
    """Compile a function, and the names of all operators of its graphs, forward and backward."""
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend=aot_autograd(fw_compiler=backend), fullgraph=True), names
    torch._dynamo.reset()


@pytest.mark.parametrize("algorithm", [clustering.kmeans, clustering.kmedoids])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_clustering(compiled: tuple, algorithm: Callable, needs_gradient: bool) -> None:
    compile_, names = compiled
    tokens, weights = torch.randn(3, 20, 4), torch.rand(3, 20).index_fill(1, torch.arange(2), 0)
    eager, graph = (tokens.clone().requires_grad_(needs_gradient) for _ in range(2))
    expected = algorithm(eager, 6, weights)
    centers, assignment = compile_(algorithm)(graph, 6, weights)
    assert names.count(f"tokenpool.eager_{algorithm.__name__}.default") == 1
    assert torch.equal(assignment, expected.assignment)
    torch.testing.assert_close(centers, expected.centers)
    if needs_gradient:
        for found in (centers, expected.centers):
            found.square().sum().backward()
        torch.testing.assert_close(graph.grad, eager.grad)


@pytest.mark.parametrize("method", ["wkmedoids", "power_bert", "tome"])
def test_a_model(compiled: tuple, method: str) -> None:
    compile_, names = compiled
    torch.manual_seed(0)
    model = tokenpool.patch(timm.create_model("test_vit").eval(), method, 0.8)
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(compile_(model)(images), model(images), rtol=0, atol=1e-4)
    scored = sum(name == "tokenpool.eager_scored_attention.default" for name in names)
    assert scored == (0 if method == "tome" else len(model.blocks))
