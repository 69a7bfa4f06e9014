"""What torch knows that the plan needs: the GPU, and how exact float32 products have to be. Imports no Triton."""

from __future__ import annotations

import functools
import os

import torch

from .plan import Device


@functools.cache
def device_record(index: int | None) -> Device:
    """What torch knows of a GPU; None is the interpreter, which runs the programs of a grid one after the other."""
    if index is None:
        return Device("Triton's interpreter", (9, 0), 1, 1 << 20)
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", None) or p.shared_memory_per_block
    vendor = "nvidia" if torch.version.hip is None else "amd"
    return Device(p.name, (p.major, p.minor), p.multi_processor_count, shared, vendor)


def fp32_precision() -> str:
    """ "tf32" where torch lets its own float32 matrix products use it, else "tf32x3"; FUSED_RIN_TRITON_FP32 decides
    over both ("ieee" for products without tensor cores)."""
    asked = os.environ.get("FUSED_RIN_TRITON_FP32")
    if asked:
        return asked
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9, where reading allow_tf32 may raise
        chosen = matmul.fp32_precision
        return "tf32" if chosen == "tf32" else "tf32x3"
    return "tf32" if matmul.allow_tf32 else "tf32x3"
