"""A few steps for inference, straight from the weights: what a streaming model calls for every sample that arrives.

At B = 1 and D = 128 the arithmetic of a step takes 2 to 3 us, a registered operator 6 and a matrix packed for the sweep
5 to 10. So short calls have a way of their own: one native call a layer that reads W and U as they lie. Nothing derived
from the weights is kept between calls, so an optimizer, `load_state_dict` or an edit of `.data` cannot make it stale:
`.data = ` changes address, shape and layout and leaves `_version` alone, so there is no key to a cache but what is
looked at here in every call.

`rin` and `cell` return None when this way does not fit; the general one then runs, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rin import backends, cpu, watchers
from fused_rin.problem import ACTIVATIONS, DTYPES

MAX_ROWS = cpu.MAX_STEP_ROWS  # why, csrc/cpu/kernels.h says
# Above this many rows times steps the sweep, with its packed matrix, is faster: measured up to 1,024 units, where 16
# steps of one row and 4 of four rows are still ahead of it, 8 of four rows behind; up to 256 units far more would be.
MAX_ROW_STEPS = 16

# Looked up once: together they would cost as much as the arithmetic of a step of 64 units.
_unobserved = watchers.unobserved
_grad_enabled, _num_threads = torch.is_grad_enabled, torch.get_num_threads
_empty, _empty_like = torch.empty, torch.empty_like
_Parameter = torch.nn.Parameter


def is_short(steps: int, batch: int, dtype: torch.dtype, batch_first: bool) -> bool:
    """Whether a call of these sizes is one for `rin`."""
    if not 0 < batch <= MAX_ROWS or not 0 < steps * batch <= MAX_ROW_STEPS:
        return False
    # Steps are read one after the other, and in 16 bits the sweep carries the state in float32 where a step rounds it.
    return steps == 1 or not (DTYPES.get(dtype, 2) > 1 or (batch > 1 and batch_first))


def _here(backend: str) -> bool:
    """Whether it is the CPU backend's turn and nobody looks."""
    return backends.requested(backend) in ("auto", "cpu") and cpu._native is not None and _unobserved()


def _address(tensor: Any, dtype: torch.dtype, shape: tuple[int, ...], grad: bool) -> int:
    """Where the numbers of a plain tensor of this dtype and shape lie; 0 if it is anything else, or empty.

    As `watchers.is_readable`, with what a kernel has to know beside it, in half the time.
    """
    kind = type(tensor)
    if kind is not _Parameter and kind is not Tensor:
        return 0
    try:
        if (
            tensor.dtype is dtype
            and tensor.shape == shape
            and tensor.is_contiguous()
            and tensor.is_cpu
            and not (grad and tensor.requires_grad)
            and not tensor.is_neg()
        ):
            return tensor.data_ptr()
    except RuntimeError:  # other layouts, batched tensors: no shape, no strides or no memory
        pass
    return 0


def _addresses(
    parameters: dict[str, Any],
    names: Sequence[str],
    dtype: torch.dtype,
    matrices: tuple[tuple[int, int], tuple[int, int]],
    hidden: int,
    grad: bool,
) -> tuple[int, int, int, int] | None:
    """Addresses of W, U, b_ih, b_hh (0 if there are none), or None unless each is a plain tensor of its shape."""
    get, vector = parameters.get, (hidden,)
    w_ih, w_hh = _address(get(names[0]), dtype, matrices[0], grad), _address(get(names[1]), dtype, matrices[1], grad)
    if not (w_ih and w_hh):
        return None
    if len(names) == 2:
        return w_ih, w_hh, 0, 0
    b_ih, b_hh = _address(get(names[2]), dtype, vector, grad), _address(get(names[3]), dtype, vector, grad)
    return (w_ih, w_hh, b_ih, b_hh) if b_ih and b_hh else None


def rin(module: Any, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """A few steps of all layers of a unidirectional RIN; shapes as in RIN.forward."""
    if type(input) is not Tensor or not _here(module.backend):
        return None
    try:
        shape, dtype = input.shape, input.dtype
    except RuntimeError:  # nested tensors have none
        return None
    hidden, layers = module.hidden_size, module.num_layers
    # Sizes one by one: a slice of a torch.Size takes 0.5 us, a tuple makes torch.empty 0.7 us slower.
    if len(shape) == 3:
        first, second, features = shape
        steps, batch = (second, first) if module.batch_first else (first, second)
        state_shape: tuple[int, ...] = (layers, batch, hidden)
        out_shape: tuple[int, ...] = (first, second, hidden)
    elif len(shape) == 2:
        steps, features = shape
        batch, state_shape, out_shape = 1, (layers, hidden), (steps, hidden)
    else:
        return None
    inputs, code, grad = module.input_size, DTYPES.get(dtype), _grad_enabled()
    if (
        code is None
        or not is_short(steps, batch, dtype, module.batch_first)
        or features != inputs
        or module.bidirectional
        or module._written_weights
        or (module.dropout and module.training)
    ):
        return None
    x, h = _address(input, dtype, shape, grad), 0
    if not x:
        return None
    if hx is not None:
        h = _address(hx, dtype, state_shape, grad)
        if not h:
            return None

    heads, weights = module.num_heads, []
    block, parameters, width = hidden // heads, module._parameters, inputs
    for names in module._all_weights:
        addresses = _addresses(parameters, names, dtype, ((hidden, width), (hidden, block)), hidden, grad)
        if addresses is None:
            return None
        weights.append(addresses)
        width = hidden
    h_n = _empty(*state_shape, dtype=dtype, device="cpu") if hx is None else _empty_like(hx)
    out = _empty(*out_shape, dtype=dtype, device="cpu")
    rule, threads, isa = (code, ACTIVATIONS[module.nonlinearity], module.skip_factor), _num_threads(), cpu._isa
    state, y, native = h_n.data_ptr(), out.data_ptr(), cpu._native.step
    size = batch * hidden * input.element_size()
    if layers > 1 and steps > 1:
        between = _empty(layers - 1, steps, size, dtype=torch.uint8, device="cpu")  # outputs of all layers but the last
        next_y = between.data_ptr()
    for addresses in weights:
        layers -= 1
        if not layers:
            target, copy = y, state
        elif steps == 1:
            target, copy = state, 0
        else:
            target, copy = next_y, state
            next_y += steps * size
        native((steps, batch, inputs, heads, block), rule, addresses, x, h, target, copy, threads, isa)
        x, inputs, state, h = target, hidden, state + size, h + size if h else 0
    return out, h_n


_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def cell(module: Any, input: Tensor, hx: Tensor | None) -> Tensor | None:
    """One step of a RINCell; shapes as in RINCell.forward."""
    if type(input) is not Tensor or not _here(module.backend):
        return None
    try:
        shape, dtype = input.shape, input.dtype
    except RuntimeError:
        return None
    inputs, hidden = module.input_size, module.hidden_size
    if len(shape) == 2:
        batch, features = shape
        state_shape: tuple[int, ...] = (batch, hidden)
    elif len(shape) == 1:
        batch, features, state_shape = 1, shape[0], (hidden,)
    else:
        return None
    code, grad = DTYPES.get(dtype), _grad_enabled()
    if not 0 < batch <= MAX_ROWS or features != inputs or code is None:
        return None
    x, h = _address(input, dtype, shape, grad), 0
    if not x:
        return None
    if hx is not None:
        h = _address(hx, dtype, state_shape, grad)
        if not h:
            return None
    names = _CELL if module.bias else _CELL[:2]
    addresses = _addresses(module._parameters, names, dtype, ((hidden, inputs), (hidden, hidden)), hidden, grad)
    if addresses is None:
        return None
    out = _empty(*state_shape, dtype=dtype, device="cpu") if hx is None else _empty_like(hx)
    cpu._native.step(
        (1, batch, inputs, 1, hidden), (code, ACTIVATIONS[module.nonlinearity], module.skip_factor), addresses, x, h,
        out.data_ptr(), 0, _num_threads(), cpu._isa,
    )  # fmt: skip
    return out
