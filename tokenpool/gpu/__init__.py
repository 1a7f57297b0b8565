"""Triton kernels for GPUs: weighted K-Medoids, the means of its clusters, and attention that also returns scores.

A kernel computes in one launch the same as `clustering` or `attention` in many passes over (B, N, N) matrices. The
results are the same up to rounding. `kmedoids_fits`, `means_fits` and `attention_fits` return whether a kernel replaces
the plain function.

The kernels are not used by default, see docs/results/speed-gpu.md for the reason. The environment variable
TOKENPOOL_KERNELS, or `using`, chooses. "triton" and "auto" use the kernels on NVIDIA GPUs of compute capability 8.0 and
later if Triton is installed and a self-test at the first use passes. "triton" uses them also for tensors on the CPU, in
Triton's slow interpreter, if TRITON_INTERPRET=1 is set before `tokenpool` is imported. "plain" is the default.

`kernels` contains the Triton code, `launch` the functions that call it, and `availability` the decision.
"""

from tokenpool.gpu.availability import (
    CHOICES,
    DTYPES,
    MAX_KEYS,
    MAX_POINTS,
    MAX_WIDTH,
    attention_fits,
    kmedoids_fits,
    means_fits,
    passes_attention_test,
    passes_self_test,
    using,
)
from tokenpool.gpu.kernels import INTERPRETED, available
from tokenpool.gpu.launch import Medoids, attention, kmedoids, means, received, weighted_means
from tokenpool.moved import old_names

__all__ = [
    "CHOICES",
    "DTYPES",
    "INTERPRETED",
    "MAX_KEYS",
    "MAX_POINTS",
    "MAX_WIDTH",
    "Medoids",
    "attention",
    "attention_fits",
    "available",
    "kmedoids",
    "kmedoids_fits",
    "means",
    "means_fits",
    "passes_attention_test",
    "passes_self_test",
    "received",
    "using",
    "weighted_means",
]

__getattr__ = old_names(__name__)  # PEP 562
