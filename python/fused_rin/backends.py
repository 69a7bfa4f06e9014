"""Which backend runs a problem, and why.

A backend is a module that fits `Backend`. "auto" takes the first that can run the problem; a backend that is asked for
by name either runs or raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fused_rin import cpu, reference, settings
from fused_rin.problem import Rows, Rule, Units

NAMES = settings.BACKENDS


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run this problem."""


class Backend(Protocol):
    """What runs the two sweeps. Tensors are plain and contiguous, arguments checked."""

    name: str
    # What it has: activations, and forms of units with factors of their own.
    activations: frozenset[str]
    forms: frozenset[str]

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, hidden: int, /) -> str | None:
        """Why it cannot run a problem of this kind, with the way out, or None if it can."""

    def describe(
        self, steps: int, batch: int, groups: int, hidden: int, dtype: torch.dtype, device: torch.device | str, /
    ) -> str:
        """The plan for a problem, in words."""

    def forward(
        self,
        pre: Tensor,
        weight: Tensor,
        h0: Tensor | None,
        rows: Rows,
        rule: Rule,
        /,
        *,
        out: Tensor | None = None,
        units: Units | None = None,
        aside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The states, in the layout of pre (in `out`, where it is given), and h_n [B, G, D].

        Outside, the values of the activation go to `aside`, where it is given.
        """

    def backward(
        self,
        grad_out: Tensor | None,
        grad_h_n: Tensor | None,
        weight: Tensor,
        saved: Tensor,
        rows: Rows,
        rule: Rule,
        /,
        *,
        units: Units | None = None,
        h0: Tensor | None = None,
        aside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of pre, in the layout of saved, and of h0 [B, G, D]; a gradient that is None is zero.

        saved: the output, outside the values. Outside, the gradient of the state goes to `aside`, where it is given.
        """


def check_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


_default = settings.BACKEND


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, calls that say backend="auto" use `name`, in the whole process.

    Raises ValueError for a name that is not a backend's.
    """
    global _default
    before, _default = _default, check_name(name)
    try:
        yield
    finally:
        _default = before


def requested(name: str) -> str:
    """The backend a call asks for, after `use_backend` and FUSED_RIN_BACKEND have had their say."""
    if name != "auto":
        return check_name(name)
    return _default


def _backend(name: str) -> Backend:
    """A GPU backend is imported when it is first asked about."""
    if name == "cpu":
        return cpu
    if name == "reference":
        return reference
    return importlib.import_module({"cuda": "fused_rin.cuda", "triton": "fused_rin.triton_kernels"}[name])


# In order of preference; what has no entry (mps, meta, ...) runs the reference.
_CANDIDATES = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def _reason(name: str, device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """Why a backend cannot run a problem. Kept for the GPU backends, whose plans take longer to find than to follow."""
    if device.type == "cpu":
        return _backend(name).unavailable_reason(device, dtype, hidden)
    return _kept_reason(name, device, dtype, hidden, torch.get_float32_matmul_precision())


@functools.lru_cache(maxsize=1024)
def _kept_reason(name: str, device: torch.device, dtype: torch.dtype, hidden: int, precision: str) -> str | None:
    return _backend(name).unavailable_reason(device, dtype, hidden)


def _rule_reason(name: str, activation: str, form: str | None) -> str | None:
    """Why a backend that could run here has no kernel for such a rule, or None."""
    if form is None and activation in ("relu", "tanh"):  # all have these
        return None
    backend = _backend(name)
    if activation not in backend.activations:
        return f"it has no kernel for the activation {activation!r}, only for {', '.join(sorted(backend.activations))}"
    if form is not None and form not in backend.forms:
        return f"it has no kernel for units with factors of their own in the form {form!r}"
    return None


def select(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    batch: int,
    activation: str = "relu",
    form: str | None = None,
) -> tuple[Backend, dict[str, str]]:
    """The backend for a request (`requested` applied already), and why better ones were passed over.

    Raises BackendError if a backend asked for by name cannot run.
    """
    if name != "auto":
        reason = _reason(name, device, dtype, hidden) or _rule_reason(name, activation, form)
        if reason is not None:
            raise BackendError(f"backend {name!r} was asked for and cannot run: {reason}")
        return _backend(name), {}
    passed_over: dict[str, str] = {}
    for candidate in _CANDIDATES.get(device.type, ("reference",)):
        reason = _reason(candidate, device, dtype, hidden) or _rule_reason(candidate, activation, form)
        if reason is None and candidate == "cpu":
            reason = cpu.why_too_narrow(batch, hidden)
        if reason is None:
            return _backend(candidate), passed_over
        passed_over[candidate] = reason
    raise AssertionError("the reference runs everything")
