"""The CUDA backend: plans a sweep and hands tensors to the native kernels as addresses and sizes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rin import cuda_plan

if TYPE_CHECKING:
    from fused_rin.backends import Device

try:
    from fused_rin import _cuda  # type: ignore[attr-defined]
except ImportError as error:  # built without nvcc, or a binary of another Python
    _cuda = None
    _import_error = error

ACTIVATIONS = {"none": 0, "relu": 1, "tanh": 2}


def unavailable_reason(device: torch.device, dtype: torch.dtype, hidden: int | None = None) -> str | None:
    """Why this backend cannot run a problem on `device` in `dtype` (of `hidden` units, if given), or None if it can."""
    if _cuda is None:
        return (
            f"the CUDA module could not be imported ({_import_error}); install with nvcc on the PATH to build it "
            "(FUSED_RIN_CUDA=on makes a missing nvcc an error)"
        )
    if device.type != "cuda":
        return f"it runs on CUDA tensors, got {device}"
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, this PyTorch is built for ROCm"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device here"
    try:
        _plan(1, 1, hidden or 1, dtype, device)
    except cuda_plan.NoPlan as reason:
        return str(reason)
    return None


@functools.cache
def _record(index: int) -> Device:
    from fused_rin.backends import Device  # here: backends imports the backends

    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    # Bytes that a block may opt in to. Older releases of torch do not report it; the figures are CUDA's table.
    table = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
    shared = getattr(properties, "shared_memory_per_block_optin", table.get(capability, 99) * 1024)
    return Device(
        name=properties.name,
        capability=capability,
        sms=properties.multi_processor_count,
        shared_memory_per_block=shared,
        registers_per_sm=getattr(properties, "regs_per_multiprocessor", 65536),
        l2_bytes=getattr(properties, "L2_cache_size", 0),
        max_cluster_size=16 if capability >= (9, 0) and capability[0] < 12 else 1,
    )


def _place(tensor: Tensor) -> tuple[Device, int, int]:
    """The device that a tensor is on: its record, its ordinal, and its current stream."""
    index = tensor.device.index
    return _record(index), index, torch.cuda.current_stream(index).cuda_stream


def _allow_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later, where asking the old way may raise
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def _plan(batch: int, groups: int, hidden: int, dtype: torch.dtype, device: torch.device) -> cuda_plan.BlockPlan:
    index = torch.cuda.current_device() if device.index is None else device.index
    return cuda_plan.plan(batch, groups, hidden, dtype, _record(index), allow_tf32=_allow_tf32())


def describe(
    steps: int, batch: int, groups: int, hidden: int, dtype: torch.dtype, device: torch.device | str = "cuda"
) -> str:
    """The plan for a problem, in words; raises cuda_plan.NoPlan where there is none."""
    return _plan(batch, groups, hidden, dtype, torch.device(device)).describe()


def _aligned(tensor: Tensor | None, odd: int, sides: int = 1) -> Tensor | None:
    """The tensor as the kernels need it: an even hidden size, aligned to two elements. A copy only where it is not."""
    if tensor is None:
        return None
    if odd:
        return pad(tensor, (0, 1) * sides)
    return tensor.clone() if tensor.data_ptr() % (2 * tensor.element_size()) else tensor


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sweep(
    in_: Tensor | None,
    saved: Tensor | None,
    state_in: Tensor | None,
    weight: Tensor,
    like: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    skip: float,
    activation: str,
    num_reversed: int,
) -> tuple[Tensor, Tensor]:
    groups, hidden = like.shape[-2:]
    steps, batch = like.shape[:2] if offsets is None else (offsets.numel(), lengths.numel())  # type: ignore[union-attr]
    record, index, stream = _place(like)
    chosen = cuda_plan.plan(batch, groups, hidden, like.dtype, record, allow_tf32=_allow_tf32())
    odd = hidden % 2
    in_, saved, state_in = _aligned(in_, odd), _aligned(saved, odd), _aligned(state_in, odd)
    weight = _aligned(weight, odd, sides=2)  # type: ignore[assignment]
    out = like.new_empty(*like.shape[:-1], hidden + odd)
    state_out = like.new_empty(batch, groups, hidden + odd)
    kernel = chosen.kernel
    _cuda.sweep_block(
        steps, batch, groups, hidden + odd, num_reversed, cuda_plan.DTYPES[like.dtype], ACTIVATIONS[activation],
        saved is not None, skip, _address(lengths), _address(offsets), _address(resets), weight.data_ptr(),
        _address(in_), _address(saved), _address(state_in), out.data_ptr(), state_out.data_ptr(),
        cuda_plan.MATH[kernel.math], kernel.hidden, kernel.rows, index, stream,
    )  # fmt: skip
    if odd:
        return out[..., :hidden].contiguous(), state_out[..., :hidden].contiguous()
    return out, state_out


def forward(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    *,
    skip: float,
    activation: str,
    num_reversed: int,
) -> tuple[Tensor, Tensor]:
    """The forward sweep; shapes and meaning as in `fused_rin.reference.recurrence`, all tensors contiguous.

    An odd hidden size costs a padded copy of `pre` and one of the output. Raises cuda_plan.NoPlan where no kernel fits.
    """
    return _sweep(pre, None, h0, weight, pre, lengths, offsets, resets, skip, activation, num_reversed)


def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    weight: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    *,
    skip: float,
    activation: str,
    num_reversed: int,
) -> tuple[Tensor, Tensor]:
    """The backward sweep; shapes and meaning as in `fused_rin.reference.backward`, all tensors contiguous.

    Raises cuda_plan.NoPlan where no kernel fits.
    """
    return _sweep(grad_out, out, grad_h_n, weight, out, lengths, offsets, resets, skip, activation, num_reversed)
