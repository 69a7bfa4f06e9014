"""Layers on the CPU in other than one plain call: a span of steps at a time, and several transitions a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rin import cpu
from fused_rin.cpu import _address, _native, _row_addresses, _rule, _units
from fused_rin.problem import DTYPES, FORMS, Rows, Rule, Units, Weights

# ---- spans (checkpoint.py): states come and go as they are carried, in the dtype of sums ----


def spans(steps: int, batch: int, rows: Rows, num_reversed: int, least: int) -> list[int]:
    """Where a layer of one recurrence may be cut without a trace in its gradients: the ends of spans of at least
    `least` steps, but for the last, counted from where its backward sweep begins."""
    return _native.spans((steps, batch, 1, 1), (0, 0, True, 1.0, num_reversed), _row_addresses(rows), least)


def forward_of_span(
    x: Tensor,
    weights: Weights,
    state: Tensor | None,
    rows: Rows,
    rule: Rule,
    units: Units | None,
    added: Tensor | None,
    *,
    out: Tensor,
    state_out: Tensor | None = None,
    aside: Tensor | None = None,
) -> None:
    """As `layer_forward` of one recurrence, into `out` and `state_out`; states [B, 1, D]."""
    w_ih, w_hh, b_ih, b_hh = weights
    hidden, inputs = w_ih.shape
    _native.layer_forward_of_span(
        (*rows.sizes(x), 1, hidden), _rule(x.dtype, rule, False), _row_addresses(rows),
        (_address(w_hh), _address(added), 0, _address(state), _address(out), _address(state_out)),
        _NO_UNITS if units is None else _units(units, aside=aside),
        (inputs, _address(x), _address(w_ih), _address(b_ih), _address(b_hh)), torch.get_num_threads(), cpu._isa,
    )  # fmt: skip


_NO_UNITS = (FORMS["inside"], 0, 0, 0, 0, 0)


class Sums:
    """What the weight gradients of a layer are added up in, over backward sweeps of several spans."""

    def __init__(self, w_ih: Tensor, dtype: torch.dtype) -> None:
        hidden, inputs = w_ih.shape
        self.isa = cpu._isa  # of all spans: the sums lie as its vectors want them
        size = _native.sums_of_spans((0, 0, 1, hidden), inputs, DTYPES[w_ih.dtype], self.isa)
        self.memory, self.blocks = w_ih.new_empty(size, dtype=dtype), torch.zeros(1, dtype=torch.int64, device="cpu")


def backward_of_span(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor | None,
    out: Tensor,
    rows: Rows,
    rule: Rule,
    units: Units | None,
    values: Tensor | None,
    grad_x: Tensor | None,
    grads: Sequence[Tensor | None],
    state_out: Tensor,
    sums: Sums,
    *,
    continues: bool,
    goes_on: bool,
) -> None:
    """As `layer_backward`: into grad_x, state_out and, unless it goes on, `grads`, those of w_ih, w_hh, b_ih, b_hh,
    skip and gain. h0, in the dtype of x, is what entered the span."""
    hidden, inputs = w_ih.shape
    grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_skip, grad_gain = map(_address, grads)
    _native.layer_backward_of_span(
        (*rows.sizes(x), 1, hidden), _rule(x.dtype, rule, True), _row_addresses(rows),
        (_address(w_hh), _address(grad_out), _address(out if values is None else values), _address(grad_state), 0,
         _address(state_out)),
        _NO_UNITS if units is None else _units(units, h0), (inputs, _address(x), _address(w_ih), 0, 0), _address(h0),
        _address(out), (_address(grad_x), grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh), grad_skip, grad_gain,
        (_address(sums.memory), _address(sums.blocks), continues, goes_on), torch.get_num_threads(), sums.isa,
    )  # fmt: skip


# ---- deep transitions (deep.py) ----


def deep_forward(
    x: Tensor,
    w_ih: Tensor,
    u: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    b_deep: Tensor | None,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    batch_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `cpu.layer_forward` with u [K, D, D] and b_deep [K - 1, D]: (out, h_n, states).

    The states of all transitions but the last are [K - 1, T, B, D] or [K - 1, rows, D], or None: not to be kept.
    """
    (hidden, inputs), deep = w_ih.shape, u.shape[0]
    steps, batch = rows.sizes(x)
    if batch_first:
        out = x.new_empty_strided((batch, steps, hidden), (hidden, batch * hidden, 1))
    else:
        out = x.new_empty(*x.shape[:-1], hidden)
    inner = cpu.advised(x.new_empty(deep - 1, *x.shape[:-1], hidden)) if keep else None
    h_n = x.new_empty(1, batch, hidden)
    _native.layer_forward_deep(
        (steps, batch, 1, hidden), _rule(x.dtype, rule, False), _row_addresses(rows),
        (_address(u), 0, 0, _address(h0), _address(cpu.advised(out)), _address(h_n)),
        (inputs, _address(x), _address(w_ih), _address(b_ih), _address(b_hh)),
        (deep, x.numel() // inputs, _address(inner), _address(b_deep)), torch.get_num_threads(), cpu._isa,
    )  # fmt: skip
    return out, h_n, inner


def deep_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    u: Tensor,
    h0: Tensor | None,
    out: Tensor,
    inner: Tensor,
    rows: Rows,
    rule: Rule,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_ih, u, b_ih, b_hh, b_deep and h0, None where not needed; as `cpu.layer_backward`."""
    (hidden, inputs), deep = w_ih.shape, u.shape[0]
    steps, batch = rows.sizes(x)
    grad_x = cpu.advised(torch.empty_like(x)) if needs[0] else None
    grad_w_ih = grad_u = grad_b_ih = grad_b_hh = grad_b_deep = None
    biases = any(needs[3:6])
    if needs[1] or needs[2] or biases:
        grad_w_ih, grad_u = torch.empty_like(w_ih), torch.empty_like(u)
    if biases:
        grad_b_ih, grad_b_hh = w_ih.new_empty(hidden), w_ih.new_empty(hidden)
        grad_b_deep = w_ih.new_empty(deep - 1, hidden) if deep > 1 else None
    grad_h0 = x.new_empty(batch, 1, hidden) if needs[6] else None
    _native.layer_backward_deep(
        (steps, batch, 1, hidden), _rule(x.dtype, rule, True), _row_addresses(rows),
        (_address(u), _address(grad_out), _address(out), _address(grad_h_n), 0, _address(grad_h0)),
        (inputs, _address(x), _address(w_ih), 0, 0), _address(h0),
        (_address(grad_x), _address(grad_w_ih), _address(grad_u), _address(grad_b_ih), _address(grad_b_hh)),
        (deep, x.numel() // inputs, _address(inner), _address(grad_b_deep)), torch.get_num_threads(), cpu._isa,
    )  # fmt: skip
    return grad_x, grad_w_ih, grad_u, grad_b_ih, grad_b_hh, grad_b_deep, grad_h0
