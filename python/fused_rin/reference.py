"""The recurrence in plain PyTorch: what every kernel of this package is checked against.

Any dtype, any device, differentiable any number of times, usable under vmap and forward-mode derivatives. Knows of this
package only how a problem is told (problem.py). It is a backend like the others, and the last one: it runs everything.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_rin.problem import ALL_ROWS, FORMS, RIN_RULE, Rows, Rule, Units, directions

name = "reference"

ACTIVATIONS = {
    "none": lambda a: a,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    # Beyond a threshold, 20 by default, torch takes a itself, which is 2e-9 too little there.
    "softplus": lambda a: F.softplus(a, threshold=40.0),
    "leaky_relu": F.leaky_relu,
}

# gradient g of h -> gradient of the activation's argument, from h alone. A stopped ReLU stops NaN too, as torch's does.
SLOPES = {
    "none": lambda g, h: g,
    "relu": lambda g, h: torch.where(h <= 0, 0, g),
    "tanh": lambda g, h: g * (1 - h * h),
    "sigmoid": lambda g, h: g * (h * (1 - h)),
    "softplus": lambda g, h: g * -torch.expm1(-h),
    "leaky_relu": lambda g, h: torch.where(h > 0, g, 0.01 * g),
}

# The same from the argument, for states that are currents.
_SLOPES_AT = {
    "none": lambda g, a: g,
    "relu": SLOPES["relu"],
    "tanh": lambda g, a: SLOPES["tanh"](g, torch.tanh(a)),
    "sigmoid": lambda g, a: SLOPES["sigmoid"](g, torch.sigmoid(a)),
    "softplus": lambda g, a: g * torch.sigmoid(a),
    "leaky_relu": SLOPES["leaky_relu"],
}


activations, forms = frozenset(ACTIVATIONS), frozenset(FORMS)


def unavailable_reason(device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """None: it runs everything."""
    return None


def describe(
    steps: int, batch: int, groups: int, hidden: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> str:
    """The plan for a problem, in words."""
    return f"a loop of PyTorch operations over {steps} steps"


def forward(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    rows: Rows = ALL_ROWS,
    rule: Rule = RIN_RULE,
    out: Tensor | None = None,
    units: Units | None = None,
    aside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = act(pre_t + U h_{t-1} + skip * h_{t-1}) for G independent recurrences (arXiv 1801.06105, eq. 2).

    With `units` the equation is that of their form (problem.py).

    Shapes: `pre` [T, B, G, D] or [T, B, G * D], `weight` (U) [G, D, D], `h0` [B, G, D] or None for zeros,
    `rows.lengths` [B] integers, `rows.resets` [T, B] bool. With `rows.offsets` [T] the batch is packed: `pre` is
    [rows, ...], `resets` [rows], row `offsets[t] + b` belongs to step t of sequence b, and `lengths` is required.

    The last `rule.num_reversed` recurrences run from the last step to the first. A sequence shorter than T keeps its
    state past its end and its outputs there are 0. `resets[t, b]` says that an episode starts at step t: no state
    crosses from t-1 to t, in either direction (at t = 0 it is `h0` that is dropped, for recurrences that run forward).

    Returns `out` in the layout of `pre` (in the tensor given as `out`, where one is, which ends differentiability), and
    `h_n` [B, G, D], the state after the last step each sequence ran. In the form "outside", act(pre_t + U h_{t-1}) is
    what `backward` needs; it is written to `aside`, if that is given.
    """
    states, h_n, values = _forward(pre, weight, h0, rows, rule, units)
    if aside is not None and values is not None:
        aside.copy_(values)
    return states if out is None else out.copy_(states), h_n


def _forward(
    pre: Tensor, weight: Tensor, h0: Tensor | None, rows: Rows, rule: Rule, units: Units | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The states, the last ones, and in the form "outside" the values of the activation."""
    lengths, offsets, resets = rows
    if offsets is not None:
        assert lengths is not None
        row, valid = _padded_rows(lengths, offsets)
        padded = Rows(lengths, None, None if resets is None else _pad(resets, row))
        if units is not None and units.noise is not None:
            units = units._replace(noise=_pad(units.noise, row))
        out, h_n, values = _forward(_pad(pre, row), weight, h0, padded, rule, units)
        return out[valid], h_n, None if values is None else values[valid]

    groups, hidden = weight.shape[:2]
    shape = pre.shape
    pre = _in_shape(pre, torch.Size((*shape[:2], groups, hidden)))
    if h0 is None:
        h0 = pre.new_zeros(pre.shape[1:])
    scan = _scan if units is None else _scan_of_units
    parts = [
        scan(_take(pre, 2, g), _take(weight, 0, g), _take(h0, 1, g), rows, rule, reverse, _take_units(units, pre, g))
        for g, reverse in directions(groups, rule.num_reversed)
    ]
    outside = units is not None and units.form == "outside"
    if not parts:
        nothing = torch.empty_like(pre).reshape(shape)
        return nothing, torch.empty_like(h0), torch.empty_like(nothing) if outside else None
    states, last, kept = ([part[i] for part in parts] for i in range(3))
    values = _in_shape(_join(kept, 2), shape) if outside else None
    return _in_shape(_join(states, 2), shape), _join(last, 1), values


# Batched gradients of the older kind (is_grads_batched) refuse views that change nothing.


def _take(tensor: Tensor, dim: int, part: slice | None) -> Tensor:
    """Some recurrences of a tensor that has them at `dim`; itself for all."""
    return tensor if part is None else tensor[(slice(None),) * dim + (part,)]


def _take_units(units: Units | None, states: Tensor, part: slice | None) -> Units:
    """Of some recurrences: factors in the dtype of the states, as autograd promotes nothing, noise in their shape."""
    if units is None:
        return Units("inside", states)
    form, skip, gain, noise = units
    return Units(
        form,
        _take(skip, 0, part).to(states.dtype),
        None if gain is None else _take(gain, 0, part).to(states.dtype),
        None if noise is None else _take(_in_shape(noise, states.shape), 2, part),
    )


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _in_shape(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def _padded_rows(lengths: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed row of each (step, sequence) [T, B], and which of them exist; the others point at row 0."""
    steps = torch.arange(offsets.numel(), device=offsets.device)[:, None]
    batch = torch.arange(lengths.numel(), device=offsets.device)
    valid = steps < lengths
    return torch.where(valid, offsets[:, None] + batch, 0), valid


def _pad(rows: Tensor, row: Tensor) -> Tensor:
    return rows[row] if rows.shape[0] else rows.new_zeros(*row.shape, *rows.shape[1:])


def _reset(h: Tensor, rows: Rows, start: int) -> Tensor:
    """h [B, G, D] as it crosses the boundary before step `start`."""
    lengths, _, resets = rows
    if resets is None or start >= resets.shape[0]:
        return h
    crossed = resets[start] if lengths is None else resets[start] & (start < lengths)
    return h.masked_fill(crossed[:, None, None], 0)


def _scan(
    pre: Tensor, weight: Tensor, h: Tensor, rows: Rows, rule: Rule, reverse: bool, units: Units
) -> tuple[Tensor, Tensor, Tensor]:
    act, skip, lengths = ACTIVATIONS[rule.activation], rule.skip, rows.lengths
    steps = pre.shape[0]
    out = []
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        h = _reset(h, rows, t + 1 if reverse else t)  # the boundary that is crossed lies before this step
        a = pre[t] + (h.transpose(0, 1) @ weight.transpose(1, 2)).transpose(0, 1)
        new = act(a + skip * h if skip else a)
        if lengths is None:
            h = new
            out.append(new)
        else:
            active = (t < lengths)[:, None, None]
            h = torch.where(active, new, h)
            out.append(torch.where(active, new, 0))
    if not out:
        return torch.empty_like(pre), h.clone(), pre
    return torch.stack(out[::-1] if reverse else out), h, pre


def _scan_of_units(
    pre: Tensor, weight: Tensor, h: Tensor, rows: Rows, rule: Rule, reverse: bool, units: Units
) -> tuple[Tensor, Tensor, Tensor]:
    act, lengths, (form, skip, gain, noise) = ACTIVATIONS[rule.activation], rows.lengths, units
    steps = pre.shape[0]
    out, values = [], []
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        h = _reset(h, rows, t + 1 if reverse else t)
        factor = act(h) if form == "current" else h
        a = pre[t] + (factor.transpose(0, 1) @ weight.transpose(1, 2)).transpose(0, 1)
        if form != "outside":
            a = a + skip * h
        value = new = a if form == "current" else act(a)
        if form == "outside":
            assert gain is not None
            new = skip * h + gain * value
            new = new if noise is None else new + noise[t]
        if lengths is None:
            h = new
        else:
            active = (t < lengths)[:, None, None]
            h = torch.where(active, new, h)
            new, value = torch.where(active, new, 0), torch.where(active, value, 0)
        out.append(new)
        values.append(value)
    if not out:
        return torch.empty_like(pre), h.clone(), torch.empty_like(pre)
    if reverse:
        out, values = out[::-1], values[::-1]
    return torch.stack(out), h, torch.stack(values) if form == "outside" else pre


def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    weight: Tensor,
    saved: Tensor,
    rows: Rows = ALL_ROWS,
    rule: Rule = RIN_RULE,
    units: Units | None = None,
    h0: Tensor | None = None,
    aside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The backward sweep: gradients of `pre` (layout of `saved`) and of `h0` [B, G, D].

    With x_t the gradient of pre_t and time running against the recurrence's own direction,
    x_t = (grad_out_t + c) * act'(h_t), c = x_t U + skip * x_t, c starting as `grad_h_n` and ending as grad h0.
    act' comes from `saved` alone, the output, so nothing else has to be kept. Differentiable itself, through `saved`
    too. With `units`, as `backward_of_units`, the gradient of the state being written to `aside`.
    """
    if units is not None:
        grad_pre, grad_h0, grad_state = backward_of_units(
            grad_out, grad_h_n, None, weight, saved, rows, rule, units, h0
        )
        if aside is not None:
            aside.copy_(grad_state)
        return grad_pre, grad_h0
    grad_pre, grad_h0, _ = _backward(grad_out, grad_h_n, None, weight, saved, rows, rule, None, None)
    return grad_pre, grad_h0


def backward_of_units(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_values: Tensor | None,
    weight: Tensor,
    saved: Tensor,
    rows: Rows,
    rule: Rule,
    units: Units,
    h0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre and of h0 as `backward`, and of the state: g_t, whose skip reaches the state before.

        inside    saved: out                  x_t = g_t = (grad_out_t + c) act'(h_t)            c = x_t U + s x_t
        outside   saved: the values z         g_t = grad_out_t + c    x_t = a g_t act'(z_t)     c = x_t U + s g_t
        current   saved: out; h0 is needed    x_t = g_t = grad_out_t + c         c = act'(h_{t-1}) (x_t U) + s x_t

    `grad_values` is a gradient of z itself, which is one where a gradient of gradients is asked for.
    """
    return _backward(grad_out, grad_h_n, grad_values, weight, saved, rows, rule, units._replace(noise=None), h0)


def _backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_values: Tensor | None,
    weight: Tensor,
    saved: Tensor,
    rows: Rows,
    rule: Rule,
    units: Units | None,
    h0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths, offsets, resets = rows
    if offsets is not None:
        assert lengths is not None
        row, valid = _padded_rows(lengths, offsets)
        padded = Rows(lengths, None, None if resets is None else _pad(resets, row))
        grads = [None if grad is None else _pad(grad, row) for grad in (grad_out, grad_values)]
        grad_pre, grad_h0, grad_state = _backward(
            grads[0], grad_h_n, grads[1], weight, _pad(saved, row), padded, rule, units, h0
        )
        return grad_pre[valid], grad_h0, grad_state[valid]

    groups, hidden = weight.shape[:2]
    shape = saved.shape
    saved = _in_shape(saved, torch.Size((*shape[:2], groups, hidden)))
    grad_out, grad_values = (None if grad is None else _in_shape(grad, saved.shape) for grad in (grad_out, grad_values))
    if grad_h_n is None:
        grad_h_n = saved.new_zeros(saved.shape[1:])
    parts = []
    for g, reverse in directions(groups, rule.num_reversed):
        grad = None if grad_out is None else _take(grad_out, 2, g)
        c, u, kept = _take(grad_h_n, 1, g), _take(weight, 0, g), _take(saved, 2, g)
        if units is None:
            parts.append(_scan_back(grad, c, u, kept, rows, rule, reverse))
        else:
            values = None if grad_values is None else _take(grad_values, 2, g)
            initial = None if h0 is None else _take(h0, 1, g)
            own = _take_units(units, saved, g)
            parts.append(_scan_units_back(grad, c, values, u, kept, rows, rule, reverse, own, initial))
    if not parts:
        nothing = torch.empty_like(saved).reshape(shape)
        return nothing, torch.empty_like(grad_h_n), nothing
    grads_pre, carries, grads_state = ([part[i] for part in parts] for i in range(3))
    return (
        _in_shape(_join(grads_pre, 2), shape), _join(carries, 1), _in_shape(_join(grads_state, 2), shape),
    )  # fmt: skip


def _scan_back(
    grad_out: Tensor | None, c: Tensor, weight: Tensor, out: Tensor, rows: Rows, rule: Rule, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    slope, skip, lengths = SLOPES[rule.activation], rule.skip, rows.lengths
    steps = out.shape[0]
    grad_pre = []
    for t in range(steps) if reverse else range(steps - 1, -1, -1):
        x = slope(c if grad_out is None else grad_out[t] + c, out[t])
        carry = (x.transpose(0, 1) @ weight).transpose(0, 1)
        carry = carry + skip * x if skip else carry
        carry = _reset(carry, rows, t + 1 if reverse else t)
        if lengths is None:
            c = carry
        else:
            active = (t < lengths)[:, None, None]
            c = torch.where(active, carry, c)
            x = torch.where(active, x, 0)
        grad_pre.append(x)
    if not grad_pre:
        return torch.empty_like(out), c.clone(), out
    return torch.stack(grad_pre if reverse else grad_pre[::-1]), c, out


def _scan_units_back(
    grad_out: Tensor | None,
    c: Tensor,
    grad_values: Tensor | None,
    weight: Tensor,
    saved: Tensor,
    rows: Rows,
    rule: Rule,
    reverse: bool,
    units: Units,
    h0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    slope, lengths, (form, skip, gain, _) = SLOPES[rule.activation], rows.lengths, units
    slope_at = _SLOPES_AT[rule.activation]
    steps = saved.shape[0]
    grad_pre, grad_state = [], []
    for t in range(steps) if reverse else range(steps - 1, -1, -1):
        g = c if grad_out is None else grad_out[t] + c
        x = g
        if form == "inside":
            x = g = slope(g, saved[t])
        elif form == "outside":
            assert gain is not None
            x = gain * g
            x = slope(x if grad_values is None else x + grad_values[t], saved[t])
        carry = (x.transpose(0, 1) @ weight).transpose(0, 1)
        if form == "current":
            carry = slope_at(carry, _entered(t, saved, h0, rows, reverse))
        carry = _reset(carry + skip * g, rows, t + 1 if reverse else t)
        if lengths is None:
            c = carry
        else:
            active = (t < lengths)[:, None, None]
            c = torch.where(active, carry, c)
            x, g = torch.where(active, x, 0), torch.where(active, g, 0)
        grad_pre.append(x)
        grad_state.append(g)
    if not grad_pre:
        return torch.empty_like(saved), c.clone(), torch.empty_like(saved)
    if not reverse:
        grad_pre, grad_state = grad_pre[::-1], grad_state[::-1]
    return torch.stack(grad_pre), c, torch.stack(grad_state)


def _entered(t: int, states: Tensor, h0: Tensor | None, rows: Rows, reverse: bool) -> Tensor:
    """The states that step t starts from, resets apart."""
    first = torch.zeros_like(states[t]) if h0 is None else h0
    other = t + 1 if reverse else t - 1
    if not 0 <= other < states.shape[0]:
        return first
    if reverse and rows.lengths is not None:
        return torch.where((other < rows.lengths)[:, None, None], states[other], first)
    return states[other]
