"""When the Triton kernels are used, and when the plain functions are."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenpool import clustering, gpu
from tokenpool.gpu import launch

CHOOSING = ("TRITON_INTERPRET", "TOKENPOOL_KERNELS")  # environment variables
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.usefixtures("triton_runs")


@pytest.fixture
def chosen() -> Iterator[None]:
    with gpu.using("triton"):
        yield


def test_by_default_never_on_the_processor() -> None:
    tokens = torch.zeros(1, 4, 3)
    with gpu.using("auto"):
        assert not gpu.kmedoids_fits(tokens) and not gpu.means_fits(tokens)
        assert not gpu.attention_fits(tokens[None], tokens[None], tokens[None])


@runs
def test_what_does_not_fit(chosen: None) -> None:
    def attend(*shape: int, dtype: torch.dtype = torch.float16) -> bool:
        q = torch.zeros(shape, device=DEVICE, dtype=dtype)
        return gpu.attention_fits(q, q, q)

    tokens = torch.zeros(1, 1024, 1, device=DEVICE)
    assert gpu.kmedoids_fits(tokens) and not gpu.kmedoids_fits(tokens.double())
    assert not gpu.kmedoids_fits(torch.zeros(1, 1025, 1, device=DEVICE))
    assert gpu.means_fits(torch.zeros(1, 1025, 1, device=DEVICE))
    assert attend(1, 1, 197, 64) and attend(1, 1, 40, 128) and attend(1, 1, 40, 32, dtype=torch.float32)
    assert not attend(1, 1, 513, 16) and not attend(1, 1, 40, 129) and not attend(1, 1, 9, 9, dtype=torch.float64)
    assert not attend(1, 1, 512, 128) and not attend(1, 1, 400, 64, dtype=torch.float32)  # too much shared memory
    q = torch.zeros(1, 1, 9, 16, device=DEVICE)
    assert not gpu.attention_fits(q, q, q.half()) and not gpu.attention_fits(q, q[:, :, :5], q)
    with gpu.using("plain"):
        assert not gpu.kmedoids_fits(tokens)


@runs
@pytest.mark.parametrize("init", [None, "ward"])
def test_chosen_where_the_first_medoids_are_looked_for(init: str | None, chosen: None, monkeypatch) -> None:
    source = torch.Generator().manual_seed(0)
    tokens, weights = (torch.rand(2, 40, *shape, generator=source).to(DEVICE) for shape in ((6,), ()))
    with gpu.using("plain"):
        expected = clustering.kmedoids(tokens, 9, weights, init)
    launched, kernel = [], gpu.kmedoids
    monkeypatch.setattr(gpu, "kmedoids", lambda *given: launched.append(1) or kernel(*given))
    leaf = tokens.clone().requires_grad_()
    found = clustering.kmedoids(leaf, 9, weights, init)
    assert launched and torch.equal(found.assignment, expected.assignment)
    torch.testing.assert_close(found.centers, expected.centers)
    assert found.centers.requires_grad
    points = clustering.kmedoids(tokens, 9, weights, tokens[:, :9])  # points to start from: not for the kernel
    assert launched == [1] and points.centers.shape == (2, 9, 6)


@runs
def test_not_in_an_exported_model(chosen: None) -> None:
    class Pool(torch.nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens + 1 if gpu.means_fits(tokens) else tokens - 1

    tokens = torch.zeros(1, 4, 3, device=DEVICE)
    assert (Pool()(tokens) == 1).all()
    assert (torch.export.export(Pool(), (tokens,)).module()(tokens) == -1).all()
    assert (torch.jit.trace(Pool(), tokens, check_trace=False)(tokens) == -1).all()


@runs
def test_compiled_code_is_not_taken_for_exported_code(chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` of PyTorch 2.7 to 2.13 replaces `is_exporting` by True, as it does `is_dynamo_compiling`."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: torch.compiler.is_dynamo_compiling())

    def pool(tokens: Tensor, heads: Tensor) -> Tensor:
        fit = gpu.kmedoids_fits(tokens) and gpu.means_fits(tokens) and gpu.attention_fits(heads, heads, heads)
        return tokens + 1 if fit else tokens - 1

    tokens, heads = torch.zeros(1, 4, 3, device=DEVICE), torch.zeros(1, 2, 4, 16, device=DEVICE)
    compiled = torch.compile(pool, backend="eager", fullgraph=True, dynamic=True)
    assert (compiled(tokens, heads) == 1).all()
    assert (compiled(tokens, torch.zeros(1, 2, 513, 16, device=DEVICE)) == -1).all()


@runs
def test_sizes_of_attention_that_do_not_work_are_not_used(chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = launch.attention

    def limited(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        if q.shape[2] > 16:
            raise RuntimeError("out of resource: shared memory")
        return kernel(q, *others)

    monkeypatch.setattr(launch, "attention", limited)
    gpu.passes_attention_test.cache_clear()
    small, large = (torch.zeros(1, 2, n, 16, device=DEVICE, dtype=torch.float16) for n in (9, 17))
    assert gpu.attention_fits(small, small, small)
    with pytest.warns(UserWarning, match="attention kernel for 32 keys of width 16 in torch.float16 cannot be used"):
        assert not gpu.attention_fits(large, large, large)
    with warnings.catch_warnings():  # only once
        warnings.simplefilter("error")
        assert not gpu.attention_fits(large, large, large)
    gpu.passes_attention_test.cache_clear()


@runs
@pytest.mark.slow
@pytest.mark.parametrize("broken", [None, "wrong", "error"])
def test_kernels_that_do_not_work_on_a_device_are_not_used(broken: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    means = launch.means
    if broken == "wrong":
        monkeypatch.setattr(launch, "means", lambda *given: means(*given) + 1)
    elif broken == "error":
        monkeypatch.setattr(launch, "means", None)
    gpu.passes_self_test.cache_clear()
    device = ("cpu", None, 1) if DEVICE == "cpu" else ("cuda", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert gpu.passes_self_test(*device) == (broken is None)
    gpu.passes_self_test.cache_clear()
    assert [str(warning.message).split(":")[0] for warning in caught] == (
        [] if broken is None else [f"The Triton kernels cannot be used on {DEVICE}"]
    )


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(ValueError, match="choice = 'cuda' must be one of auto, triton, plain"), gpu.using("cuda"):
        pass


WITHOUT_TRITON = """
import os, sys
sys.modules["triton"] = None
os.environ["TOKENPOOL_KERNELS"] = "fast"
try:
    from tokenpool import gpu
except ValueError as error:
    print(error)
os.environ["TOKENPOOL_KERNELS"] = "triton"
import torch
from tokenpool import gpu
print(gpu.available, gpu.means_fits(torch.zeros(1, 2, 3)))
"""


ON_A_GPU = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tokenpool import gpu
from tokenpool.gpu import availability
torch.cuda.get_device_capability = lambda device: (9, 0)
with FakeTensorMode():
    tokens = torch.empty(1, 2, 3, device="cuda")
for passes in (True, False):
    availability.passes_self_test = lambda *device: passes
    used = [gpu.means_fits(tokens)]
    for choice in gpu.CHOICES:
        with gpu.using(choice):
            used.append(gpu.means_fits(tokens))
    print(used)
"""


@pytest.mark.slow
@pytest.mark.skipif(not gpu.available, reason="Triton is not installed")
def test_on_a_gpu_they_are_used_only_if_chosen_and_if_the_test_passes() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in CHOOSING}
    command = [sys.executable, "-W", "ignore", "-c", ON_A_GPU]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[False, True, True, False]", "[False, False, False, False]"], done.stderr


@pytest.mark.slow
def test_imports_without_triton_and_reads_the_environment() -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "TOKENPOOL_KERNELS = 'fast' must be one of auto, triton, plain",
        "False False",
    ], done.stderr
