"""What profilers and counters see of kernels that are called past torch's dispatcher.

ranges   `fused_rin::layer_forward` and the like, with the shapes of the tensors, in torch.profiler, and as NVTX
         under torch.autograd.profiler.emit_nvtx; where nobody looks, a step takes 0.05 us more, a layer or sweep 0.2
flops    formulas for torch.utils.flop_counter.FlopCounterMode, which sees the registered operators
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_Function = TypeVar("_Function", bound=Callable[..., Any])

enabled = torch._C._autograd._profiler_enabled
_enter = torch._C._autograd._record_function_with_args_enter
_exit = torch._C._autograd._record_function_with_args_exit


def in_range(name: str, tensors: tuple[Any, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` in a range `fused_rin::name` that bears the shapes of `tensors`.

    Tuples among them (weights, rows) are looked into; what is no tensor is left out.
    """
    flat = [t for item in tensors for t in (item if isinstance(item, tuple) else (item,)) if isinstance(t, Tensor)]
    handle = _enter(f"fused_rin::{name}", *flat)
    try:
        return function(*args, **kwargs)
    finally:
        _exit(handle)


def named(function: _Function) -> _Function:
    """A kernel's function that runs in a range of its name while a profiler looks."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if enabled():
            return in_range(function.__name__, args, function, *args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _forward_flops(pre: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * pre.numel() * weight[-1]


def _backward_flops(grad_out: Any, grad_h_n: Any, weight: torch.Size, states: torch.Size, *args: Any, **kw: Any) -> int:
    return 2 * states.numel() * weight[-1]


def count_sweeps() -> None:
    """Tells FlopCounterMode, if there is one, the flops of the sweeps, as it counts torch.nn.RNN's matrix products.

    2 D for each unit of each row, either way; elementwise work counts nothing there. Registered at the first call that
    may be counted, since to import torch.utils.flop_counter is to import Triton (0.15 s); so a counter that is at work
    already, with its copy of the register, is told too.
    """
    if torch.compiler.is_compiling():
        return
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    registers = [module.flop_registry]
    for mode in _get_current_dispatch_mode_stack():
        registers.append(getattr(getattr(mode, "counter", None), "flop_registry", {}))
    for name, formula in (("sweep_forward", _forward_flops), ("sweep_backward", _backward_flops)):
        for register in registers:
            register.setdefault(getattr(torch.ops.fused_rin, name), module.shape_wrapper(formula))
