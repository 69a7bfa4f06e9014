"""Calls that are too short for a sweep.

`rin` and `cell`: a few steps for inference, straight from the weights, what a streaming model calls for every sample.

At B = 1 and D = 128 the arithmetic of a step takes 2 to 3 us, a registered operator 6 and a matrix packed for the sweep
5 to 10. So short calls have a way of their own: one native call a layer that reads W and U as they lie. Nothing derived
from the weights is kept between calls, so an optimizer, `load_state_dict` or an edit of `.data` cannot make it stale:
`.data = ` changes address, shape and layout and leaves `_version` alone, so there is no key to a cache but what is
looked at here in every call.

They return None when this way does not fit; the general one then runs, or says what is wrong.

`products`: one step of many rows, or one that needs gradients, by torch's own matrix products. There is no loop to
fuse, packing U for it took three quarters of a decoder's training step at D = 1,024, and a graph of torch's operators
costs less than a function of our own (a training step at B = 1, D = 64: 93 us; torch.nn.RNN 105, the sweep 144).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_rin import backends, cpu, profiling, watchers
from fused_rin.problem import ACTIVATIONS, ALL_ROWS, DTYPES, Rows, Rule, Weights

MAX_ROWS = cpu.MAX_STEP_ROWS  # why, csrc/cpu/sweep.h says
# Above this many rows times steps the sweep, with its packed matrix, is faster: measured up to 1,024 units, where 16
# steps of one row and 4 of four rows are still ahead of it, 8 of four rows behind; up to 256 units far more would be.
MAX_ROW_STEPS = 16

# Looked up once: together they would cost as much as the arithmetic of a step of 64 units.
_unobserved = watchers.unobserved
_without_modes = watchers.without_function_modes
_grad_enabled, _num_threads = torch.is_grad_enabled, torch.get_num_threads
_Parameter, _ANY_OFFSET = torch.nn.Parameter, watchers.ANY_OFFSET


def is_short(steps: int, batch: int, dtype: torch.dtype, batch_first: bool) -> bool:
    """Whether a call of these sizes is one for `rin`."""
    if not 0 < batch <= MAX_ROWS or not 0 < steps * batch <= MAX_ROW_STEPS:
        return False
    # Steps are read one after the other, and in 16 bits the sweep carries the state in float32 where a step rounds it.
    return steps == 1 or not (DTYPES.get(dtype, 2) > 1 or (batch > 1 and batch_first))


def _here(backend: str) -> bool:
    """Whether it is the CPU backend's turn."""
    return backends.requested(backend) in ("auto", "cpu") and cpu._native is not None


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
            place = tensor.data_ptr()
            return place if place > _ANY_OFFSET else watchers.address(tensor)
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


def rin(module: Any, input: Any, hx: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """A few steps of all layers of a unidirectional RIN; shapes as in RIN.forward."""
    if not _unobserved():
        if not watchers.only_a_default_device():
            return None
        with _without_modes():
            return rin(module, input, hx) if _unobserved() else None
    if type(input) is not Tensor or not _here(module.backend):
        return None
    grad, parameters = _grad_enabled(), module._parameters
    if grad:
        first = parameters.get("weight_ih_l0")
        if first is None or first.requires_grad:
            return _rin_in_training(module, input, hx)
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
    inputs, code = module.input_size, DTYPES.get(dtype)
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
    block, width = hidden // heads, inputs
    for names in module._all_weights:
        addresses = _addresses(parameters, names, dtype, ((hidden, width), (hidden, block)), hidden, grad)
        if addresses is None:
            return None
        weights.append(addresses)
        width = hidden
    # Twice as fast as torch.empty with a dtype and a device.
    h_n, out = input.new_empty(*state_shape), input.new_empty(*out_shape)
    rule, threads, isa = (code, ACTIVATIONS[module.nonlinearity], module.skip_factor), _num_threads(), cpu._isa
    state, y, native = h_n.data_ptr(), out.data_ptr(), cpu._native.step
    if profiling.enabled():
        native = partial(profiling.in_range, "step_forward", (input, hx), native)
    size = batch * hidden * input.element_size()
    if layers > 1 and steps > 1:
        between = input.new_empty(layers - 1, steps, batch, hidden)  # outputs of all layers but the last
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


def _rin_in_training(module: Any, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """One step of all layers by `products`: what RIN.forward comes to after all of its checks.

    What is not looked at here, torch's operators look at.
    """
    axis = 1 if module.batch_first else 0  # of time
    try:
        shape, dtype = input.shape, input.dtype
        if (
            len(shape) != 3
            or shape[axis] != 1
            or shape[2] != module.input_size
            or module.bidirectional
            or module._written_weights
            or module.num_heads != 1
            or (module.dropout and module.training)
            or not (dtype is torch.float32 or dtype is torch.float64)
            or not input.is_cpu
            or backends.requested(module.backend) != "auto"
            or (hx is not None and hx.shape != (module.num_layers, shape[1 - axis], module.hidden_size))
        ):
            return None
        parameters, tensors = module._parameters, [input] if hx is None else [input, hx]
        for names in module._all_weights:
            tensors += [parameters[name] for name in names]
        for t in tensors:
            if t.dtype is not dtype or not watchers.address(t):
                return None
    # Tensors without a shape or without memory, parametrized weights, weights that are None.
    except (RuntimeError, KeyError, AttributeError):
        return None
    row, rule, states = input.select(axis, 0), Rule(module.skip_factor, module.nonlinearity), []
    for number, names in enumerate(module._all_weights):
        own = Weights(*[parameters[name] for name in names])
        row = _products(row, None if hx is None else hx[number], own, rule)
        states.append(row)
    return torch.stack([row], axis), torch.stack(states)


_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def cell(module: Any, input: Tensor, hx: Tensor | None) -> Tensor | None:
    """One step of a RINCell; shapes as in RINCell.forward."""
    if not _unobserved():
        if not watchers.only_a_default_device():
            return None
        with _without_modes():
            return cell(module, input, hx) if _unobserved() else None
    if type(input) is not Tensor or not _here(module.backend):
        return None
    grad = _grad_enabled()
    if grad:
        first = module._parameters.get("weight_ih")
        if first is None or first.requires_grad:
            return _cell_in_training(module, input, hx)
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
    code = DTYPES.get(dtype)
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
    out = input.new_empty(*state_shape)
    native = cpu._native.step
    if profiling.enabled():
        native = partial(profiling.in_range, "step_forward", (input, hx), native)
    native(
        (1, batch, inputs, 1, hidden), (code, ACTIVATIONS[module.nonlinearity], module.skip_factor), addresses, x, h,
        out.data_ptr(), 0, _num_threads(), cpu._isa,
    )  # fmt: skip
    return out


def _cell_in_training(module: Any, input: Tensor, hx: Tensor | None) -> Tensor | None:
    """As `_rin_in_training`."""
    try:
        shape, dtype = input.shape, input.dtype
        if (
            len(shape) != 2
            or shape[1] != module.input_size
            or not (dtype is torch.float32 or dtype is torch.float64)
            or not input.is_cpu
            or backends.requested(module.backend) != "auto"
            or (hx is not None and hx.shape != (shape[0], module.hidden_size))
        ):
            return None
        parameters = module._parameters
        own = Weights(*[parameters[name] for name in (_CELL if module.bias else _CELL[:2])])
        for t in (input, hx, *own):
            if t is not None and (t.dtype is not dtype or not watchers.address(t)):
                return None
    except (RuntimeError, KeyError, AttributeError):
        return None
    return _products(input, hx, own, Rule(module.skip_factor, module.nonlinearity))


# Up to this many units a sweep of one step, a single call, is as fast without gradients, and faster from no state.
_FEW_UNITS = 64


def suits_products(dtype: torch.dtype, device: torch.device, backend: str) -> bool:
    """Whether a step that `rin` or `cell` did not take is one for `products`.

    Not in 16 bits, or where autocast would make them, where both products and the state need one sum in float32.
    """
    return (
        (dtype is torch.float32 or dtype is torch.float64)
        and device.type == "cpu"
        and backends.requested(backend) == "auto"
        and not torch._C._is_any_autocast_enabled()
    )


def layers_suit_products(
    steps: int, rows: Rows, groups: int, hidden: int, dtype: torch.dtype, device: torch.device, backend: str
) -> bool:
    """The same for the layers of a RIN. Where somebody traces it has to be the sweep: the steps of a call may vary."""
    return (
        steps == 1
        and rows is ALL_ROWS
        and groups == 1
        and (hidden > _FEW_UNITS or _grad_enabled())
        and suits_products(dtype, device, backend)
        and not torch.compiler.is_compiling()
        and _unobserved()
    )


def products(x: Tensor, h: Tensor | None, weights: Weights, rule: Rule) -> Tensor:
    """One step of one recurrence: x [B, I], h [B, D] or None for zeros -> the next state."""
    watchers.check_memory(x, h, *weights)
    return _products(x, h, weights, rule)


def _products(x: Tensor, h: Tensor | None, weights: Weights, rule: Rule) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = weights
    if h is None:  # and not no product: U is part of the graph, and an Inf in it of the result
        h = x.new_zeros(x.shape[0], w_hh.shape[0])
    if not rule.skip:
        cell = torch._VF.rnn_relu_cell if rule.activation == "relu" else torch._VF.rnn_tanh_cell
        return cell(x, h, w_ih, w_hh, b_ih, b_hh)
    a = F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
    a = torch.add(a, h, alpha=rule.skip)
    return torch.relu(a) if rule.activation == "relu" else torch.tanh(a)
