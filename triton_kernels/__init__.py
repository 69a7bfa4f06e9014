"""The persistent sweep in Triton: GPUs of every vendor Triton knows, and no compiler needed at install.

`forward` and `backward` take plain contiguous tensors, already checked by `functional.py`; nothing here knows
autograd. Importing this package imports neither Triton nor the kernels: that happens in the first call.

Why the kernels stand behind the package's own operators (`fused_rin::sweep_forward` and `sweep_backward`) and
not behind `torch.library.triton_op`: that one lets torch.compile trace into the Python launcher and build the kernel
into its graph. Here it would cost more than it gives. There is nothing to fuse into a kernel that runs for the whole
sequence. One schema serves all backends, so a compiled graph does not depend on which one runs. The traced launcher
would have to express a loop over waves, a cooperative launch (`launch_cooperative_grid`) and cleared barrier counters
for symbolic sizes. In eager mode the operators are passed by altogether, since the dispatcher costs more than the call.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch
from fused_rin.device import Device, NoPlan
from fused_rin.problem import ACTIVATIONS, FORMS, Rows, Rule, Units
from torch import Tensor

from .device import device_record, fp32_precision
from .plan import Plan, plan

__all__ = ["Device", "NoPlan", "Plan", "backward", "describe", "forward", "plan", "unavailable_reason"]

name = "triton"
activations, forms = frozenset(ACTIVATIONS), frozenset(FORMS)

OLDEST = (3, 6)  # the oldest Triton that the tests run


def forward(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    *,
    out: Tensor | None = None,
    units: Units | None = None,
    aside: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """`out` in the layout of `pre` and `h_n` [B, G, D]; arguments as `reference.forward`.

    float32, float16 or bfloat16; 16-bit types accumulate and carry the state in float32. Raises NoPlan (a ValueError)
    where no tiles fit. `plan` overrides the rule.
    """
    from .launch import run

    return run(pre, None, h0, weight, rows, rule, out=out, units=units, aside=aside, chosen=plan)


def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    weight: Tensor,
    saved: Tensor,
    rows: Rows,
    rule: Rule,
    *,
    units: Units | None = None,
    h0: Tensor | None = None,
    aside: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of `pre`, in the layout of `saved`, and of `h0` [B, G, D]. None for a gradient means zero.

    Rows past a sequence's length get 0. The gradient of U is left to a GEMM over what this returns.
    """
    from .launch import run

    initial = h0 if units is not None and units.form == "current" else None
    return run(
        grad_out, saved, grad_h_n, weight, rows, rule, units=units, initial=initial, aside=aside, chosen=plan
    )  # fmt: skip


def unavailable_reason(
    device: torch.device | None = None, dtype: torch.dtype | None = None, hidden: int | None = None
) -> str | None:
    """Why these kernels cannot run, with the way out, or None if they can. What is not given is not asked about."""
    missing = _missing()
    if missing is not None or device is None:
        return missing
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f'it runs on CUDA and ROCm tensors, got {device}; use backend="auto"'
    if device.type == "cuda" and not torch.cuda.is_available():
        return 'PyTorch sees no GPU here; use backend="auto"'
    try:
        _plan(hidden or 1, dtype or torch.float32, device)
    except NoPlan as reason:
        return str(reason)
    return None


def describe(
    steps: int, batch: int, groups: int, hidden: int, dtype: torch.dtype, device: torch.device | str = "cuda"
) -> str:
    """The plan for a problem, in words. Raises NoPlan where there is none."""
    return _plan(hidden, dtype, torch.device(device), groups, batch).describe()


def _plan(hidden: int, dtype: torch.dtype, device: torch.device, groups: int = 1, batch: int = 1) -> Plan:
    index = device.index
    if index is None and device.type == "cuda":
        index = torch.cuda.current_device()
    return plan(hidden, dtype, groups, batch, device_record(index), fp32_precision())


@functools.cache
def _missing() -> str | None:
    """What is wrong with the installed Triton."""
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed (pip install triton); without it use backend="auto"'
    version = _triton_version()
    if version < OLDEST:
        old, oldest = ".".join(map(str, version)), ".".join(map(str, OLDEST))
        return f'Triton {old} is older than {oldest} (pip install -U triton); with it use backend="auto"'
    return None


def _triton_version() -> tuple[int, ...]:
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            text = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())
    import triton

    return tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
