"""Which backend runs a problem, and why.

A backend is a module with `unavailable_reason(device, dtype, hidden)`, `describe(steps, batch, groups, hidden, dtype,
device)`, `forward` and `backward`. "auto" takes the first that can run the problem; a backend that is asked for by name
either runs or raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from fused_rin import cpu, reference

NAMES = ("auto", "cpu", "cuda", "triton", "reference")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run this problem."""


@dataclass(frozen=True)
class Device:
    """What a plan has to know of a GPU; plain data, so that plans are tested without one."""

    name: str
    capability: tuple[int, int]
    sms: int
    shared_memory_per_block: int  # bytes a block may opt in to
    registers_per_sm: int  # 32-bit registers
    l2_bytes: int
    max_cluster_size: int  # 1 before sm_90


@dataclass(frozen=True)
class Choice:
    """What `explain` returns: the backend, its plan in words, and why others were passed over."""

    backend: str
    plan: str
    reason: str
    passed_over: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.plan}", f"  because {self.reason}"]
        lines += [f"  not {name}: {why}" for name, why in self.passed_over.items()]
        return "\n".join(lines)


class _Reference:
    """The plain PyTorch loop, as a backend."""

    forward = staticmethod(reference.recurrence)
    backward = staticmethod(reference.backward)

    @staticmethod
    def unavailable_reason(device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
        return None

    @staticmethod
    def describe(
        steps: int, batch: int, groups: int, hidden: int, dtype: torch.dtype, device: torch.device | str
    ) -> str:
        return f"a loop of PyTorch operations over {steps} steps"


def _check_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


_default = os.environ.get("FUSED_RIN_BACKEND", "auto")
if _default not in NAMES:
    raise ValueError(f"FUSED_RIN_BACKEND must be one of {', '.join(map(repr, NAMES))}, got {_default!r}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, calls that say backend="auto" use `name`, in the whole process.

    Raises ValueError for a name that is not a backend's.
    """
    global _default
    before, _default = _default, _check_name(name)
    try:
        yield
    finally:
        _default = before


def requested(name: str) -> str:
    """The backend a call asks for, after `use_backend` and FUSED_RIN_BACKEND have had their say."""
    if name != "auto":
        return _check_name(name)
    return _default


Module = ModuleType | type[_Reference]


def _module(name: str) -> Module:
    """A GPU backend is imported when it is first asked about."""
    if name == "cpu":
        return cpu
    if name == "reference":
        return _Reference
    return importlib.import_module({"cuda": "fused_rin.cuda", "triton": "fused_rin.triton_kernels"}[name])


# In order of preference; what has no entry (mps, meta, ...) runs the reference.
_CANDIDATES = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def _reason(name: str, device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """Why a backend cannot run a problem. Kept for the GPU backends, whose plans take longer to find than to follow."""
    if device.type == "cpu":
        return _module(name).unavailable_reason(device, dtype, hidden)
    return _kept_reason(name, device, dtype, hidden, torch.get_float32_matmul_precision())


@functools.lru_cache(maxsize=1024)
def _kept_reason(name: str, device: torch.device, dtype: torch.dtype, hidden: int, precision: str) -> str | None:
    return _module(name).unavailable_reason(device, dtype, hidden)


def select(name: str, device: torch.device, dtype: torch.dtype, hidden: int) -> tuple[Module, dict[str, str]]:
    """The backend module for a request (`requested` applied already), and why better ones were passed over.

    Raises BackendError if a backend asked for by name cannot run.
    """
    if name != "auto":
        reason = _reason(name, device, dtype, hidden)
        if reason is not None:
            raise BackendError(f"backend {name!r} was asked for and cannot run: {reason}")
        return _module(name), {}
    passed_over: dict[str, str] = {}
    for candidate in _CANDIDATES.get(device.type, ("reference",)):
        reason = _reason(candidate, device, dtype, hidden)
        if reason is None:
            return _module(candidate), passed_over
        passed_over[candidate] = reason
    raise AssertionError("the reference runs everything")


def explain(
    problem: Tensor | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    input_size: int = 0,
) -> Choice:
    """Which backend and plan `recurrence` would use for a problem, and why; with `input_size`, a layer of `RIN`.

    Args:
        problem: `pre` itself, or its shape (T, B, G, D), or (T, B, D) for one recurrence.
        dtype, device: of the problem where only its shape is given.
        backend: as in `recurrence`.
        input_size: of a layer, which on a CPU makes its input product and its gradients step by step as well (outside
            compilers, tracers and autocast); 0 for the bare recurrence.

    Raises ValueError for a shape of another rank or a negative input_size, and BackendError if the backend named cannot
    run the problem.
    """
    if isinstance(problem, Tensor):
        dtype, device, problem = problem.dtype, problem.device, tuple(problem.shape)
    if len(problem) not in (3, 4):
        raise ValueError(f"problem must be (T, B, G, D) or (T, B, D), got {tuple(problem)}")
    if input_size < 0:
        raise ValueError(f"input_size must not be negative, got {input_size}")
    steps, batch, *groups, hidden = problem
    name = requested(backend)
    device = torch.device(device)
    module, passed_over = select(name, device, dtype, hidden)
    chosen = "reference" if module is _Reference else module.__name__.rpartition(".")[2].removesuffix("_kernels")
    if name != "auto":
        reason = "it was asked for by name"
    elif passed_over:
        reason = "the backends before it cannot run this problem"
    else:
        reason = f"it is the first choice for {device.type} tensors"
    size = (steps, batch, groups[0] if groups else 1, hidden)
    if module is cpu and input_size:
        plan = cpu.describe(*size, dtype, device, input_size)
    else:
        plan = module.describe(*size, dtype, device)
    return Choice(chosen, plan, reason, passed_over)
