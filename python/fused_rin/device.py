"""What a plan has to know of a GPU, and what all GPU backends ask torch in the same words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class NoPlan(ValueError):
    """No kernel can run the problem on the device; says why, and what can."""


@dataclass(frozen=True)
class Device:
    """A GPU as plain data, so that plans are tested without one."""

    name: str
    capability: tuple[int, int]
    sms: int
    shared_memory_per_block: int  # bytes a block may opt in to
    registers_per_sm: int = 65536  # 32-bit registers
    l2_bytes: int = 0
    max_cluster_size: int = 1  # 1 before sm_90
    vendor: str = "nvidia"


# Bytes that a block may opt in to, for releases of torch that do not report it; the figures are CUDA's table.
_SHARED_KILOBYTES = {
    (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99,
}  # fmt: skip


@functools.cache
def device_record(index: int) -> Device:
    """What torch knows of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    nvidia = torch.version.hip is None
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    if not shared:
        known = _SHARED_KILOBYTES.get(capability, 99) * 1024
        shared = known if nvidia else properties.shared_memory_per_block
    return Device(
        name=properties.name,
        capability=capability,
        sms=properties.multi_processor_count,
        shared_memory_per_block=shared,
        registers_per_sm=getattr(properties, "regs_per_multiprocessor", 65536),
        l2_bytes=getattr(properties, "L2_cache_size", 0),
        max_cluster_size=16 if nvidia and (9, 0) <= capability < (12, 0) else 1,
        vendor="nvidia" if nvidia else "amd",
    )


def allow_tf32() -> bool:
    """Whether torch lets its own float32 matrix products use TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later, where asking the old way may raise
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def aligned(tensor: Tensor | None, size: int) -> Tensor | None:
    """The tensor at an address that is a multiple of `size` bytes: a copy only where it is not."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() % size else tensor


def launches(function: Callable[P, R]) -> Callable[P, R]:
    """Of a function that launches kernels: what to do about an error while a CUDA graph is captured.

    A kernel's first launch loads its code, which a capture forbids, and the graph is lost by then.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                raise
            raise RuntimeError(
                f"{error}; while a CUDA graph is captured no kernel can be loaded or compiled: call the model once "
                "with these sizes before the capture, forward and backward (torch.cuda.make_graphed_callables does)"
            ) from error

    return call
