"""A layer of G recurrences: its input product, the recurrence, and all gradients.

On a CPU, where nobody watches the operators, it is one native call each way (`_Layer`). The general way is a matrix
product over all steps, the sweep, and more products over all steps for the gradients. On a CPU those products are bound
by memory: at B = 128, D = 100, T = 784 each tensor of all steps takes 40 MB, fresh from the operating system. Fused,
they are made in chunks of steps that stay in the caches (csrc/cpu/layer.h), and the gradient of pre is never stored at
all. For backward, the input and the output are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_rin import backends, cpu, gradients, ops, reference, unit_ops, watchers
from fused_rin.problem import ALL_ROWS, DTYPES, Rows, Rule, Units, Weights, sum_dtype
from fused_rin.watchers import DIRECT


class _Layer(torch.autograd.Function):
    """Arguments as in `forward`, tensors contiguous. The backward is differentiable again, through the reference."""

    # One object for all that needs no gradient: `apply` looks at every argument, for 0.5 us each.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        h0: Tensor | None,
        rest: tuple[Rows, Rule, int, bool],
    ) -> tuple[Tensor, Tensor]:
        out, h_n = cpu.layer_forward(x, Weights(w_ih, w_hh, b_ih, b_hh), h0, *rest)
        rows, *ctx.constants = rest
        tensors = (x, w_ih, w_hh, h0, out)
        ops.keep(ctx, tensors if rows is ALL_ROWS else tensors + rows)
        return out, h_n

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        if watchers.may_be_passed_by(grad_out, grad_h_n):
            with watchers.without_function_modes():
                return _layer_backward(ctx, grad_out, grad_h_n)
        return _layer_backward(ctx, grad_out, grad_h_n)


def _layer_backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_h_n is None:
        return (None,) * 7
    x, w_ih, w_hh, h0, out, *saved_rows = cast(list[Any], ops.restored(ctx))
    rule, groups, batch_first = ctx.constants
    rows, needs = ALL_ROWS, ctx.needs_input_grad
    if saved_rows:
        rows = Rows(*[None if t is None else t.contiguous() for t in saved_rows])
    if batch_first:
        out, grad_out = out.transpose(0, 1), None if grad_out is None else grad_out.transpose(0, 1)
    if groups == 1 and watchers.way_back(grad_out, grad_h_n) is DIRECT:
        tensors = [None if t is None else t.contiguous() for t in (grad_out, grad_h_n, x, w_ih, w_hh, h0, out)]
        grads = cpu.layer_backward(*tensors, rows, rule, needs)  # type: ignore[arg-type, call-arg]
        return *grads, None
    # Gradients arrive and are kept in the shapes of the layer, the recurrence's have [G, D].
    blocks = w_hh.view(groups, -1, w_ih.shape[0] // groups)
    split = (*x.shape[:-1], groups, blocks.shape[1])
    grad_out = None if grad_out is None else grad_out.reshape(split)
    grad_h_n = None if grad_h_n is None else grad_h_n.reshape(-1, *blocks.shape[:2])
    states = out.reshape(split)
    grad_pre, grad_h0 = ops.backward(grad_out, grad_h_n, blocks, states, rows, rule, "auto")
    grad_w_hh = None
    if needs[2]:
        grad_w_hh = gradients.weight_gradient(grad_pre, states, h0, rows, rule.num_reversed).view(w_hh.shape)
    grad_x, grad_w_ih, grad_b_ih, grad_b_hh = _input_gradients(grad_pre, x, w_ih, needs)
    return grad_x, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_h0 if needs[5] else None, None


def _input_gradients(grad_pre: Tensor, x: Tensor, w_ih: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Of x, w_ih, b_ih and b_hh, as products over all steps; `needs` as the arguments of the layer."""
    grad_x = grad_w_ih = grad_b_ih = grad_b_hh = None
    flat = grad_pre.reshape(-1, w_ih.shape[0])
    if needs[0]:
        grad_x = (flat @ w_ih).view(x.shape)
    if needs[1]:
        grad_w_ih = flat.t() @ x.reshape(-1, x.shape[-1])
    if needs[3] or needs[4]:  # a tensor of its own for each, see cpu.layer_backward
        grad_b_ih = flat.sum(0)
        grad_b_hh = grad_b_ih.clone()
    return grad_x, grad_w_ih, grad_b_ih, grad_b_hh


class _UnitLayer(torch.autograd.Function):
    """The same for units with factors of their own; what is kept beside the input, unit_ops.py says."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        h0: Tensor | None,
        skip: Tensor,
        gain: Tensor | None,
        rest: tuple[Rows, Rule, int, bool, str, Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, rule, groups, batch_first, form, noise, added = rest
        values = cpu.advised(x.new_empty(*x.shape[:-1], w_ih.shape[0])) if form == "outside" else None
        out, h_n = cpu.layer_forward(
            x, Weights(w_ih, w_hh, b_ih, b_hh), h0, rows, rule, groups, batch_first, Units(form, skip, gain, noise),
            added, values,
        )  # fmt: skip
        ctx.constants = rule, groups, batch_first, form
        ops.keep(ctx, (x, w_ih, w_hh, h0, out, values, skip, gain, *rows))
        return out, h_n, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if watchers.may_be_passed_by(*grads):
            with watchers.without_function_modes():
                return _unit_layer_backward(ctx, *grads)
        return _unit_layer_backward(ctx, *grads)


def _unit_layer_backward(
    ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None, grad_values: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_h_n is None and grad_values is None:
        return (None,) * 9
    x, w_ih, w_hh, h0, out, values, skip, gain, *saved_rows = cast(list[Any], ops.restored(ctx))
    rule, groups, batch_first, form = ctx.constants
    rows, needs = Rows(*[None if t is None else t.contiguous() for t in saved_rows]), ctx.needs_input_grad
    units = Units(form, skip, gain)
    if batch_first:
        out, grad_out = out.transpose(0, 1), None if grad_out is None else grad_out.transpose(0, 1)
    if groups == 1 and grad_values is None and watchers.way_back(grad_out, grad_h_n) is DIRECT:
        tensors: Any = (
            None if t is None else t.contiguous()
            for t in (grad_out, grad_h_n, x, w_ih, w_hh, h0, out, values, skip, gain)
        )
        grad_out, grad_h_n, x, w_ih, w_hh, h0, out, values, skip, gain = tensors
        grads = cpu.layer_backward(
            grad_out, grad_h_n, x, w_ih, w_hh, h0, out, rows, rule, needs, Units(form, skip, gain), values
        )
        return *grads, None
    blocks = w_hh.view(groups, -1, w_ih.shape[0] // groups)
    split = (*x.shape[:-1], groups, blocks.shape[1])
    grad_out, grad_values, values = (None if t is None else t.reshape(split) for t in (grad_out, grad_values, values))
    grad_h_n = None if grad_h_n is None else grad_h_n.reshape(-1, *blocks.shape[:2])
    states = out.reshape(split)
    grad_pre, grad_h0, grad_state = unit_ops.backward(
        grad_out, grad_h_n, grad_values, blocks, states if values is None else values, h0, rows, rule, units, "auto"
    )
    grad_w_hh = grad_skip = grad_gain = None
    if needs[2]:
        act = reference.ACTIVATIONS[rule.activation]
        grad_w_hh = gradients.weight_gradient_of_units(grad_pre, states, h0, rows, rule.num_reversed, units, act)
        grad_w_hh = grad_w_hh.view(w_hh.shape)
    if needs[6] or needs[7]:
        grad_skip, grad_gain = gradients.unit_gradients(grad_state, states, values, h0, rows, rule.num_reversed)
    grad_x, grad_w_ih, grad_b_ih, grad_b_hh = _input_gradients(grad_pre, x, w_ih, needs)
    return (
        grad_x, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_h0 if needs[5] else None, grad_skip, grad_gain, None
    )  # fmt: skip


def is_fused(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    rows: Rows,
    groups: int,
    name: str,
    units: Units | None = None,
    added: Tensor | None = None,
) -> bool:
    """Whether a layer is one native call: on a CPU, where nobody watches (`name`: of the backend, requested)."""
    if torch.compiler.is_compiling() or name not in ("auto", "cpu") or cpu._native is None:
        return False
    if not watchers.unobserved() and watchers.observer(product=True) is not None:
        return False
    # The tensors of one layer, in one dtype of the kernels, which read them unchecked?
    dtype, w_ih = x.dtype, weights.w_ih
    if dtype not in DTYPES or not x.numel() or w_ih is None or weights.w_hh is None or w_ih.dim() != 2:
        return False
    width = w_ih.shape[0]
    hidden, vector, (_, batch) = width // groups, (width,), rows.sizes(x)
    if name == "auto" and cpu.why_too_narrow(batch, hidden) is not None:
        return False
    shapes = (x.shape, (width, x.shape[-1]), (width, hidden), vector, vector, (batch, groups, hidden))
    for t, shape in zip((x, *weights, h0), shapes, strict=True):
        if t is not None and not watchers.is_plain(t, dtype, shape):
            return False
    if units is not None:
        factors, steps = (groups, hidden), (*x.shape[:-1], width)
        kinds = ((units.skip, factors), (units.gain, factors), (units.noise, steps), (added, steps))
        for t, shape in kinds:
            if t is not None and not watchers.is_plain(t, sum_dtype(dtype) if shape is factors else dtype, shape):
                return False
    return rows is ALL_ROWS or all(t is None or watchers.is_readable(t) for t in rows)


def forward(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    groups: int,
    backend: str,
    batch_first: bool = False,
    u_name: str = "weight_hh",
    units: Units | None = None,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A layer of G recurrences, on checked arguments.

    With `units`, whose factors are [G, D], of that kind; `added` [T, B, G * D] is then added to pre, without gradient.

    x [T, B, I] (or [rows, I] of a packed batch), h0 [B, G, D], `backend` as the caller named it. Returns out
    [T, B, G * D], with batch_first [B, T, G * D], and h_n [directions, B, heads * D]: no views where nobody watches,
    since code for torch.nn.RNN calls detach_() on them. Raises RuntimeError for weights that do not fit x; `u_name` is
    what its text calls U.
    """
    name, both = backends.requested(backend), 0 < rule.num_reversed < groups
    if is_fused(x, weights, h0, rows, groups, name, units, added):
        x, h0 = x.contiguous(), None if h0 is None else h0.contiguous()
        weights = Weights(*[None if w is None else w.contiguous() for w in weights])  # type: ignore[arg-type]
        if rows.lengths is not None or rows.resets is not None:
            rows = Rows(*[None if t is None else t.contiguous() for t in rows])
        if units is not None:
            out, h_n = _run_units(x, weights, h0, rows, rule, groups, batch_first, units, added)
        elif torch.is_grad_enabled() and (
            x.requires_grad
            or any(w is not None and w.requires_grad for w in weights)
            or (h0 is not None and h0.requires_grad)
        ):
            out, h_n = _Layer.apply(x, *weights, h0, (rows, rule, groups, batch_first))
        else:
            out, h_n = cpu.layer_forward(x, weights, h0, rows, rule, groups, batch_first)
    else:
        check_weights(weights, x.shape[-1], groups, x.device, u_name)
        pre, u = _project(x, weights, groups)
        h0 = None if h0 is None else h0.to(pre.dtype)
        if units is None:
            out, h_n = ops.recurrence(pre, u, h0, rows, rule, name, batch_first)
        else:
            # Under autocast pre has another dtype than x, in which noise is drawn.
            pre = pre if added is None else pre + added.to(pre.dtype)
            if units.noise is not None:
                units = units._replace(noise=units.noise.to(pre.dtype))
            out, h_n = unit_ops.recurrence(pre, u, h0, rows, rule, units, name, batch_first)
        h_n = h_n.flatten(1)
        if not both:
            return out, torch.stack([h_n])
    return out, torch.stack(h_n.reshape(h_n.shape[-2:]).chunk(2, 1)) if both else h_n


def _run_units(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    groups: int,
    batch_first: bool,
    units: Units,
    added: Tensor | None,
) -> tuple[Tensor, Tensor]:
    skip, gain, noise, added = (None if t is None else t.contiguous() for t in (*units[1:], added))
    form = units.form
    assert skip is not None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights, h0, skip, gain)):
        rest = (rows, rule, groups, batch_first, form, noise, added)
        out, h_n, _ = _UnitLayer.apply(x, *weights, h0, skip, gain, rest)
        return out, h_n
    return cpu.layer_forward(
        x, weights, h0, rows, rule, groups, batch_first, Units(form, skip, gain, noise), added
    )  # fmt: skip


def check_weights(weights: Weights, inputs: int, groups: int, device: torch.device, u_name: str = "weight_hh") -> None:
    """TypeError or RuntimeError for weights whose kinds, shapes, devices or dtypes do not fit each other.

    They may have been exchanged since the module was made. torch's products take some of that in silence (another
    device, in the tensor of a bias), kernels read addresses.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    suffix = u_name.removeprefix("weight_hh")
    for name, matrix in ((f"weight_ih{suffix}", w_ih), (u_name, w_hh)):
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(matrix).__name__}")
    if w_ih.dim() != 2:
        raise RuntimeError(f"weight_ih{suffix} must have 2 dimensions, got {w_ih.dim()}")
    width = w_ih.shape[0]
    for name, w, shape in (
        (f"weight_ih{suffix}", w_ih, (width, inputs)), (u_name, w_hh, (width, width // groups)),
        (f"bias_ih{suffix}", b_ih, (width,)), (f"bias_hh{suffix}", b_hh, (width,)),
    ):  # fmt: skip
        if w is None:
            continue
        if w.shape != shape:
            raise RuntimeError(f"{name} must have shape {tuple(shape)}, got {tuple(w.shape)}")
        if w.device != device:
            raise RuntimeError(f"{name} must be on {device}, got {w.device}")
        if w.dtype != w_ih.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"{name} must have dtype {w_ih.dtype}, got {w.dtype}")


def bias(b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor | None:
    """Their sum, by an operator whose gradients are two tensors: that of a plain sum is one, for both."""
    return b_ih if b_ih is None or b_hh is None else torch.sub(b_ih, b_hh, alpha=-1)


def _project(x: Tensor, weights: Weights, groups: int) -> tuple[Tensor, Tensor]:
    """W x + b [T, B, G * D] and U [G, D, D] of its dtype, by operators: any device, under compilers and autocast."""
    w_ih, w_hh, b_ih, b_hh = weights
    watchers.check_memory(x, *weights)
    pre = F.linear(x, w_ih, bias(b_ih, b_hh))
    if w_hh.dtype != pre.dtype:  # under autocast
        w_hh = w_hh.to(pre.dtype)
    hidden = w_ih.shape[0] // groups
    return pre, w_hh.reshape(groups, hidden, hidden)
