"""The sweeps of units with factors of their own (problem.Units), as registered operators and as an autograd function.

As `ops.py` for the RIN's. Kept for backward: the output and, in the form "outside", the values of the activation. From
the output alone they would follow as z_t = (h_t - s h_{t-1}) / a, which for a small `a` loses as many digits as it has
zeros and in 16 bits leaves none. In the form "current" the activation is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rin import backends, gradients, library, ops, profiling, reference, watchers
from fused_rin.ops import _plain, _plain_rows
from fused_rin.problem import Rows, Rule, Units, check_sweep, sum_dtype
from fused_rin.watchers import DIRECT, REFERENCE


def _plain_units(units: Units) -> Units:
    return Units(units.form, _plain(units.skip), _plain(units.gain), _plain(units.noise))


def sweep_forward(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    units: Units,
    backend: str,
    batch_first: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, h_n, values), as `ops.sweep_forward`. The values, in the layout of pre: outside, if they are to be kept."""
    chosen, _ = backends.select(
        backend, pre.device, pre.dtype, weight.shape[-1], rows.sizes(pre)[1], rule.activation, units.form
    )
    aside = None
    if keep and units.form == "outside":
        aside = torch.empty_like(pre, memory_format=torch.contiguous_format)
    if batch_first:
        steps, batch, width = pre.shape
        out = pre.new_empty_strided((batch, steps, width), (width, batch * width, 1))
    else:
        out = torch.empty_like(pre, memory_format=torch.contiguous_format)
    _, h_n = chosen.forward(
        _plain(pre), _plain(weight), _plain(h0), _plain_rows(rows), rule,
        out=out.transpose(0, 1) if batch_first else out, units=_plain_units(units), aside=aside,
    )  # fmt: skip
    return out, h_n, aside


def sweep_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    weight: Tensor,
    saved: Tensor,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    units: Units,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre, of h0 and of the state; as `reference.backward_of_units`."""
    chosen, _ = backends.select(
        backend, saved.device, saved.dtype, weight.shape[-1], rows.sizes(saved)[1], rule.activation, units.form
    )
    aside = None
    if units.form == "outside":
        aside = torch.empty_like(saved, memory_format=torch.contiguous_format)
    grad_pre, grad_h0 = chosen.backward(
        _plain(grad_out), _plain(grad_h_n), _plain(weight), _plain(saved), _plain_rows(rows), rule,
        units=_plain_units(units), h0=_plain(h0), aside=aside,
    )  # fmt: skip
    return grad_pre, grad_h0, grad_pre if aside is None else aside


_direct_forward, _direct_backward = profiling.named(sweep_forward), profiling.named(sweep_backward)


# ---- operators ----


def _check(states: Tensor, weight: Tensor, units: Units) -> None:
    shape, dtype = list(weight.shape[:2]), sum_dtype(states.dtype)
    for name, factor in (("skip", units.skip), ("gain", units.gain)):
        if factor is None:
            if name == "gain" and units.form == "outside":
                raise RuntimeError("gain must be given in the form 'outside'")
        elif list(factor.shape) != shape or factor.dtype != dtype or factor.device != states.device:
            raise RuntimeError(
                f"{name} must have shape {shape}, dtype {dtype} and device {states.device}, got {list(factor.shape)}, "
                f"{factor.dtype} and {factor.device}"
            )


# What an operator returns may be none of its arguments and no result twice.
def _forward_operator(  # type: ignore[no-untyped-def]
    pre, weight, h0, lengths, offsets, resets, skip, gain, noise, form, activation, num_reversed, backend
):
    rows, rule, units = (
        Rows(lengths, offsets, resets),
        Rule(1.0, activation, num_reversed),
        Units(form, skip, gain, noise),
    )
    check_sweep(pre, weight, rows, rule, [("h0", h0, True), ("noise", noise, False)], "pre")
    _check(pre, weight, units)
    out, h_n, values = sweep_forward(pre, weight, h0, rows, rule, units, backend, keep=True)
    return out, h_n, pre.new_empty(0) if values is None else values


def _backward_operator(  # type: ignore[no-untyped-def]
    grad_out, grad_h_n, weight, saved, h0, lengths, offsets, resets, skip, gain, form, activation, num_reversed, backend
):
    rows, rule, units = Rows(lengths, offsets, resets), Rule(1.0, activation, num_reversed), Units(form, skip, gain)
    others = [("grad_out", grad_out, False), ("grad_h_n", grad_h_n, True), ("h0", h0, True)]
    check_sweep(saved, weight, rows, rule, others, "saved")
    _check(saved, weight, units)
    grad_pre, grad_h0, grad_state = sweep_backward(grad_out, grad_h_n, weight, saved, h0, rows, rule, units, backend)
    return grad_pre, grad_h0, saved.new_empty(0) if grad_state is grad_pre else grad_state


library.fragment.impl("units_forward", _forward_operator, library.KEY)
library.fragment.impl("units_backward", _backward_operator, library.KEY)


def _outside_like(states: Tensor, form: str) -> Tensor:
    if form != "outside":
        return states.new_empty(0)
    return torch.empty_like(states, memory_format=torch.contiguous_format)


@torch.library.register_fake("fused_rin::units_forward")
def _(  # type: ignore[no-untyped-def]
    pre, weight, h0, lengths, offsets, resets, skip, gain, noise, form, activation, num_reversed, backend
):
    out = torch.empty_like(pre, memory_format=torch.contiguous_format)
    return out, ops._state_like(pre, weight, lengths, offsets), _outside_like(pre, form)


@torch.library.register_fake("fused_rin::units_backward")
def _(  # type: ignore[no-untyped-def]
    grad_out, grad_h_n, weight, saved, h0, lengths, offsets, resets, skip, gain, form, activation, num_reversed, backend
):
    grad_pre = torch.empty_like(saved, memory_format=torch.contiguous_format)
    return grad_pre, ops._state_like(saved, weight, lengths, offsets), _outside_like(saved, form)


# ---- autograd ----


def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_values: Tensor | None,
    weight: Tensor,
    saved: Tensor,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    units: Units,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre, of h0 and of the state, by the way that fits whoever looks."""
    way = watchers.way_back(grad_out, grad_h_n, saved, weight, h0, units.skip, units.gain)
    if way is REFERENCE or grad_values is not None:
        return reference.backward_of_units(grad_out, grad_h_n, grad_values, weight, saved, rows, rule, units, h0)
    if way is DIRECT:
        return _direct_backward(grad_out, grad_h_n, weight, saved, h0, rows, rule, units, backend)
    profiling.count_sweeps()
    form, skip, gain, _ = units
    _, activation, num_reversed = rule
    grad_pre, grad_h0, grad_state = torch.ops.fused_rin.units_backward(
        grad_out, grad_h_n, weight, saved, h0, *rows, skip, gain, form, activation, num_reversed, backend
    )
    return grad_pre, grad_h0, grad_state if form == "outside" else grad_pre


def gradients_of(
    ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None, grad_values: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of pre, weight, h0, skip, gain and noise."""
    weight, h0, out, values, skip, gain, *rest = ops.restored(ctx)
    if grad_out is None and grad_h_n is None and grad_values is None:
        return (None,) * 6
    rule, form, backend, batch_first, needs = ctx.constants
    rows = Rows(*rest)
    assert weight is not None
    assert out is not None
    assert skip is not None
    units = Units(form, skip, gain)
    if batch_first:
        out, grad_out = out.transpose(0, 1), None if grad_out is None else grad_out.transpose(0, 1)
    saved = out if values is None else values
    grad_pre, grad_h0, grad_state = backward(
        grad_out, grad_h_n, grad_values, weight, saved, h0, rows, rule, units, backend
    )
    grad_weight = grad_skip = grad_gain = None
    shape = (*out.shape[: 2 if rows.offsets is None else 1], *weight.shape[:2])
    states = out.reshape(shape)
    if needs[1]:
        act = reference.ACTIVATIONS[rule.activation]
        grad_weight = gradients.weight_gradient_of_units(
            grad_pre.view(shape), states, h0, rows, rule.num_reversed, units, act
        )
    if needs[3] or needs[4]:
        split = None if values is None else values.reshape(shape)
        grad_skip, grad_gain = gradients.unit_gradients(
            grad_state.view(shape), states, split, h0, rows, rule.num_reversed
        )
    return (
        grad_pre if needs[0] else None, grad_weight, grad_h0 if needs[2] else None, grad_skip if needs[3] else None,
        grad_gain if needs[4] else None, grad_state if needs[5] else None,
    )  # fmt: skip


class Recurrence(torch.autograd.Function):
    """(out, h_n, values), the last None but outside; what is kept, the module's docstring says."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        weight: Tensor,
        h0: Tensor | None,
        skip: Tensor,
        gain: Tensor | None,
        noise: Tensor | None,
        rest: tuple[Rows, Rule, str, str, bool],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, rule, form, backend, batch_first = rest
        ctx.constants = rule, form, backend, batch_first, ctx.needs_input_grad
        out, h_n, values = _direct_forward(
            pre, weight, h0, rows, rule, Units(form, skip, gain, noise), backend, batch_first, True
        )
        ops.keep(ctx, (weight, h0, out, values, skip, gain, *rows))
        return out, h_n, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *gradients_of(ctx, *grads), None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, h0, lengths, offsets, resets, skip, gain, _, form, activation, num_reversed, backend = inputs
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 6, 7, 8)]
    ctx.constants = Rule(1.0, activation, num_reversed), form, backend, False, needs
    values = output[2] if form == "outside" else None
    ops.keep(ctx, (weight, h0, output[0], values, skip, gain, lengths, offsets, resets))


def _operator_gradients(
    ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None, grad_values: Tensor | None
) -> tuple[Tensor | None, ...]:
    pre, weight, h0, *factors = gradients_of(
        ctx, grad_out, grad_h_n, None if ctx.constants[1] != "outside" else grad_values
    )
    return pre, weight, h0, None, None, None, *factors, None, None, None, None


torch.library.register_autograd("fused_rin::units_forward", _operator_gradients, setup_context=_setup_context)


def recurrence(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    units: Units,
    backend: str,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, h_n) on checked arguments, as `ops.recurrence`."""
    form, skip, gain, noise = units
    way = watchers.way(pre, weight, h0, *rows, skip, gain, noise)
    if way is DIRECT:
        inputs = (pre, weight, h0, skip, gain, noise)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            out, h_n, _ = Recurrence.apply(*inputs, (rows, rule, form, backend, batch_first))
        else:
            out, h_n, _ = _direct_forward(pre, weight, h0, rows, rule, units, backend, batch_first)
        return out, h_n
    if way is REFERENCE or watchers.exporting_to_onnx() or (backend == "reference" and ops._is_exporting()):
        out, h_n = reference.forward(pre, weight, h0, rows, rule, units=units)
    else:
        profiling.count_sweeps()
        out, h_n, _ = torch.ops.fused_rin.units_forward(
            pre, weight, h0, *rows, skip, gain, noise, form, rule.activation, rule.num_reversed, backend
        )
    return out.transpose(0, 1) if batch_first else out, h_n
