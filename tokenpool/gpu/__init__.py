"""Triton kernels for a GPU: weighted K-Medoids, the means of its clusters, and attention that also yields scores.

Each kernel does in one launch what `clustering` and `attention` do in many passes over (B, N, N) matrices. The results
are the same up to rounding. Every function has a plain counterpart. `kmedoids_fits`, `means_fits` and `attention_fits`
tell whether the kernel may take its place.

The kernels are used on NVIDIA GPUs of compute capability 8.0 and later where Triton is installed, if they pass a
self-test at their first use. The environment variable TOKENPOOL_KERNELS, or `using`, overrides this. "plain" never uses
them. "triton" also uses them for tensors on the CPU, in Triton's slow interpreter, if TRITON_INTERPRET=1 is set before
`tokenpool` is imported.

`kernels` holds the Triton code, `launch` the functions that call it, and `availability` the decision.
"""

from tokenpool.gpu.availability import (
    CHOICES,
    DTYPES,
    MOST_KEYS,
    MOST_POINTS,
    MOST_WIDTH,
    attention_fits,
    kmedoids_fits,
    means_fits,
    passes_self_test,
    using,
)
from tokenpool.gpu.kernels import INTERPRETED, available
from tokenpool.gpu.launch import Medoids, attention, kmedoids, means, received

__all__ = [
    "CHOICES",
    "DTYPES",
    "INTERPRETED",
    "MOST_KEYS",
    "MOST_POINTS",
    "MOST_WIDTH",
    "Medoids",
    "attention",
    "attention_fits",
    "available",
    "kmedoids",
    "kmedoids_fits",
    "means",
    "means_fits",
    "passes_self_test",
    "received",
    "using",
]
