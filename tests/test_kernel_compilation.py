"""The Triton kernels, compiled for GPUs on a machine without one."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tokenpool import gpu
from tokenpool.gpu import kernels, launch

HOPPER, AMPERE = 90, 80


@pytest.mark.skipif(not gpu.available, reason="Triton is not installed")
@pytest.mark.slow
def test_they_compile_for_gpus(tmp_path: Path) -> None:
    """Needs no GPU: Triton brings NVIDIA's assembler. The shared memory must be at most that of `attention_memory`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "cannot compile" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == len(WORK)
    for name, kernel in compiled.items():
        assert kernel["bytes"] > 1000, name
        assert kernel["shared"] <= kernel["expected"] <= 227 * 1024, name
        assert kernel["stack"] <= 256, f"{name} keeps {kernel['stack']} bytes of a thread's numbers in memory"


WORK = (
    (HOPPER, "kmedoids", torch.bfloat16, 196, 384),
    (HOPPER, "kmedoids", torch.float32, 196, 384),
    (HOPPER, "means", torch.bfloat16, 196, 384),
    (HOPPER, "weighted_means", torch.bfloat16, 196, 384),
    (HOPPER, "attention", torch.bfloat16, 197, 64),
    (HOPPER, "attention", torch.float16, 100, 32),
    (HOPPER, "received", torch.float32, 197, 64),
    (HOPPER, "received", torch.float32, 257, 32),
    (AMPERE, "kmedoids", torch.float16, 100, 384),
    (AMPERE, "attention", torch.bfloat16, 197, 64),
)


def compile_for(capability: int, name: str, dtype: torch.dtype, n: int, width: int) -> dict[str, int]:
    """Compile one kernel as its launch would, where strides and widths are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    item, expected = dtype.itemsize, 227 * 1024
    number = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    pointers = {"weights": "*fp32", "scratch": "*fp32", "offset": "*fp32", "share": "*fp32", "bias": "*fp32"}
    pointers |= {
        "assignment": "*i64",
        "medoids": "*i64",
        "order": "*i32",
        "previous": "*i64",
        "start": "*i32",
        "received": "*fp32",
    }
    pointers |= dict.fromkeys(("points", "tokens", "q", "k", "v", "out"), number)
    if name == "kmedoids":
        kernel, shape = kernels.kmedoids_kernel, launch.medoid_shape(n, item)
    elif name == "means":
        kernel, shape = kernels.means_kernel, launch.mean_shape(width)
    elif name == "weighted_means":
        kernel, shape = kernels.weighted_means_kernel, launch.mean_shape(width)
    else:
        kernel, shape = kernels.attention_kernel, launch.attention_shape(n, width, item)
        shape |= {"WITH_BIAS": True, "WITH_OUTPUT": name == "attention"}
        expected = launch.attention_memory(n, width, item)
    if kernel is not kernels.attention_kernel:
        pointers.pop("k")  # there, the number of clusters

    constants = {key: value for key, value in shape.items() if key.isupper()}
    options = {key: value for key, value in shape.items() if key not in constants and value is not None}
    signature = (
        dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32"} | pointers | dict.fromkeys(constants, "constexpr")
    )
    signature = {key: signature[key] for key in kernel.arg_names}
    any_number = ("n", "heads", "iterations", "scale", *(() if "k" in pointers else "k"), *constants)
    sixteen = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if key not in any_number}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=sixteen)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        stack = stack_of(file.name, Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return {"bytes": len(binary.asm["cubin"]), "shared": binary.metadata.shared, "expected": expected, "stack": stack}


def stack_of(cubin: str, tool: Path) -> int:
    """Bytes of memory in which each thread keeps what its registers do not hold; 0 where nothing can tell."""
    if not tool.exists():
        return 0
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True).stdout
    return int(usage.split("STACK:")[1].split()[0]) if "STACK:" in usage else 0


if __name__ == "__main__":
    try:
        from triton.backends.nvidia import compiler  # noqa: F401
    except ImportError:
        sys.exit("This Triton cannot compile for NVIDIA")
    print(json.dumps({str(work): compile_for(*work) for work in WORK}))
