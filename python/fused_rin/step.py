"""One step for inference, straight from the weights: what a streaming model calls for every sample that arrives.

At B = 1 and D = 128 the arithmetic of a step takes 3 us, a registered operator 6 and a matrix packed for the sweep
5 to 10. So a single step has a way of its own: one native call that reads W and U as they lie. Nothing derived from
the weights is kept between calls, so an optimizer, `load_state_dict` or an edit of `.data` cannot make it stale.

`rin` and `cell` return None when this way does not fit; the general one then runs, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rin import backends, cpu

# Above this many rows a matrix product over all of them is faster than a dot product for each (measured: at 4 rows
# this way is ahead of torch.nn.RNNCell at every D from 8 to 1,024, at 16 rows behind it from D = 512 on).
MAX_ROWS = 4

# Looked up once: together they would cost as much as the arithmetic of a step of 64 units.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_autocast = torch._C._is_any_autocast_enabled
_transforms = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad
_kinds = (Tensor, torch.nn.Parameter)


def _unobserved(backend: str) -> bool:
    """Whether nothing has to see operators here: no tracer, transform, mode or autocast, and the CPU backend's turn."""
    return (
        backends.requested(backend) in ("auto", "cpu")
        and cpu._native is not None
        and not (_dispatch_modes() or _function_modes() or _autocast() or _transforms())
        and _tracing_state() is None
        and _forward_ad._current_level < 0
    )


def _plain(tensor: Any, dtype: torch.dtype, shape: tuple[int, ...], grad: bool) -> bool:
    return (
        type(tensor) in _kinds
        and tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.is_contiguous()
        and tensor.is_cpu
        and not (grad and tensor.requires_grad)
    )


def _addresses(
    module: Any, names: Sequence[str], dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], grad: bool
) -> list[int]:
    """Addresses of W, U, b_ih, b_hh (0 if there are none), or nothing unless each is a plain tensor of its shape."""
    parameters = module._parameters
    found = [0, 0, 0, 0]
    for i, name in enumerate(names):
        tensor: Any = parameters.get(name)
        if not _plain(tensor, dtype, shapes[i], grad):
            return []
        found[i] = tensor.data_ptr()
    return found


def rin(module: Any, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """One step of all layers of a unidirectional RIN; shapes as in RIN.forward."""
    if type(input) is not Tensor or not _unobserved(module.backend):
        return None
    layers, hidden, shape = module.num_layers, module.hidden_size, input.shape
    if len(shape) == 3:
        steps, batch = (shape[1], shape[0]) if module.batch_first else (shape[0], shape[1])
        state_shape: tuple[int, ...] = (layers, batch, hidden)
    elif len(shape) == 2:
        steps, batch = shape[0], 1
        state_shape = (layers, hidden)
    else:
        return None
    if steps != 1 or not 0 < batch <= MAX_ROWS or module.bidirectional or (module.dropout and module.training):
        return None
    grad, dtype = torch.is_grad_enabled(), input.dtype
    inputs = module.input_size
    if dtype not in cpu.DTYPES or not _plain(input, dtype, (*shape[:-1], inputs), grad):
        return None
    if hx is not None and not _plain(hx, dtype, state_shape, grad):
        return None

    heads = module.num_heads
    square, bias, weights = (hidden, hidden // heads), (hidden,), []
    for names in module._all_weights:
        addresses = _addresses(module, names, dtype, ((hidden, inputs), square, bias, bias), grad)
        if not addresses:
            return None
        weights.append(addresses)
        inputs = hidden
    out, h_n = torch.empty((*shape[:-1], hidden), dtype=dtype), torch.empty(state_shape, dtype=dtype)
    stride = batch * hidden * input.element_size()
    x, inputs, state, h = input.data_ptr(), module.input_size, h_n.data_ptr(), 0 if hx is None else hx.data_ptr()
    for layer, addresses in enumerate(weights):
        cpu._native.step(
            batch, inputs, heads, hidden // heads, cpu.DTYPES[dtype], cpu.ACTIVATIONS[module.nonlinearity],
            module.skip_factor, *addresses, x, h, state, out.data_ptr() if layer == layers - 1 else 0,
            torch.get_num_threads(), cpu._isa,
        )  # fmt: skip
        x, inputs, state, h = state, hidden, state + stride, h + stride if h else 0
    return out, h_n


_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def cell(module: Any, input: Tensor, hx: Tensor | None) -> Tensor | None:
    """One step of a RINCell; shapes as in RINCell.forward."""
    if type(input) is not Tensor or not _unobserved(module.backend):
        return None
    shape, inputs, hidden, dtype = input.shape, module.input_size, module.hidden_size, input.dtype
    batch = shape[0] if len(shape) == 2 else 1
    state_shape = (*shape[:-1], hidden)
    grad = torch.is_grad_enabled()
    if (
        len(shape) not in (1, 2)
        or not 0 < batch <= MAX_ROWS
        or dtype not in cpu.DTYPES
        or not _plain(input, dtype, (*shape[:-1], inputs), grad)
        or not (hx is None or _plain(hx, dtype, state_shape, grad))
    ):
        return None
    shapes = ((hidden, inputs), (hidden, hidden), (hidden,), (hidden,))
    addresses = _addresses(module, _CELL if module.bias else _CELL[:2], dtype, shapes, grad)
    if not addresses:
        return None
    out = torch.empty(state_shape, dtype=dtype)
    cpu._native.step(
        batch, inputs, 1, hidden, cpu.DTYPES[dtype], cpu.ACTIVATIONS[module.nonlinearity], module.skip_factor,
        *addresses, input.data_ptr(), 0 if hx is None else hx.data_ptr(), out.data_ptr(), 0,
        torch.get_num_threads(), cpu._isa,
    )  # fmt: skip
    return out
