"""What torch knows that the plan needs: the GPU, and how exact float32 products have to be. Imports no Triton."""

from __future__ import annotations

from fused_rin import device as _device
from fused_rin import settings
from fused_rin.device import Device, allow_tf32

INTERPRETER = Device("Triton's interpreter", (9, 0), 1, 1 << 20)


def device_record(index: int | None) -> Device:
    """What torch knows of a GPU; None is the interpreter, which runs the programs of a grid one after the other."""
    return INTERPRETER if index is None else _device.device_record(index)


def fp32_precision() -> str:
    """ "tf32" where torch lets its own float32 matrix products use it, else "tf32x3"; FUSED_RIN_TRITON_FP32 decides
    over both ("ieee" for products without tensor cores)."""
    return settings.TRITON_FP32 or ("tf32" if allow_tf32() else "tf32x3")
