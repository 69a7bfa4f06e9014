"""The recurrence in plain PyTorch: what every kernel of this package is checked against.

Any dtype, any device, differentiable any number of times, usable under vmap and forward-mode derivatives. Knows of this
package only how a problem is told (problem.py). It is a backend like the others, and the last one: it runs everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_rin.problem import ALL_ROWS, RIN_RULE, Rows, Rule, directions

name = "reference"

ACTIVATIONS = {"none": lambda a: a, "relu": torch.relu, "tanh": torch.tanh}

# gradient g of h -> gradient of the activation's argument, from h alone. A stopped ReLU stops NaN too, as torch's does.
SLOPES = {
    "none": lambda g, h: g,
    "relu": lambda g, h: torch.where(h <= 0, 0, g),
    "tanh": lambda g, h: g * (1 - h * h),
}


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
) -> tuple[Tensor, Tensor]:
    """h_t = act(pre_t + U h_{t-1} + skip * h_{t-1}) for G independent recurrences (arXiv 1801.06105, eq. 2).

    Shapes: `pre` [T, B, G, D] or [T, B, G * D], `weight` (U) [G, D, D], `h0` [B, G, D] or None for zeros,
    `rows.lengths` [B] integers, `rows.resets` [T, B] bool. With `rows.offsets` [T] the batch is packed: `pre` is
    [rows, ...], `resets` [rows], row `offsets[t] + b` belongs to step t of sequence b, and `lengths` is required.

    The last `rule.num_reversed` recurrences run from the last step to the first. A sequence shorter than T keeps its
    state past its end and its outputs there are 0. `resets[t, b]` says that an episode starts at step t: no state
    crosses from t-1 to t, in either direction (at t = 0 it is `h0` that is dropped, for recurrences that run forward).

    Returns `out` in the layout of `pre` (in the tensor given as `out`, where one is, which ends differentiability), and
    `h_n` [B, G, D], the state after the last step each sequence ran.
    """
    lengths, offsets, resets = rows
    if out is not None:
        states, h_n = forward(pre, weight, h0, rows, rule)
        return out.copy_(states), h_n
    if offsets is not None:
        assert lengths is not None
        row, valid = _padded_rows(lengths, offsets)
        padded = Rows(lengths, None, None if resets is None else _pad(resets, row))
        out, h_n = forward(_pad(pre, row), weight, h0, padded, rule)
        return out[valid], h_n

    groups, hidden = weight.shape[:2]
    shape = pre.shape
    pre = _in_shape(pre, torch.Size((*shape[:2], groups, hidden)))
    if h0 is None:
        h0 = pre.new_zeros(pre.shape[1:])
    parts = [
        _scan(_take(pre, 2, g), _take(weight, 0, g), _take(h0, 1, g), rows, rule, reverse)
        for g, reverse in directions(groups, rule.num_reversed)
    ]
    if not parts:
        return torch.empty_like(pre).reshape(shape), torch.empty_like(h0)
    return _in_shape(_join([out for out, _ in parts], 2), shape), _join([h for _, h in parts], 1)


# Batched gradients of the older kind (is_grads_batched) refuse views that change nothing.


def _take(tensor: Tensor, dim: int, part: slice | None) -> Tensor:
    """Some recurrences of a tensor that has them at `dim`; itself for all."""
    return tensor if part is None else tensor[(slice(None),) * dim + (part,)]


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


def _scan(pre: Tensor, weight: Tensor, h: Tensor, rows: Rows, rule: Rule, reverse: bool) -> tuple[Tensor, Tensor]:
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
        return torch.empty_like(pre), h.clone()
    return torch.stack(out[::-1] if reverse else out), h


def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    weight: Tensor,
    out: Tensor,
    rows: Rows = ALL_ROWS,
    rule: Rule = RIN_RULE,
) -> tuple[Tensor, Tensor]:
    """The backward sweep: gradients of `pre` (layout of `out`) and of `h0` [B, G, D].

    With x_t the gradient of pre_t and time running against the recurrence's own direction,
    x_t = (grad_out_t + c) * act'(h_t), c = x_t U + skip * x_t, c starting as `grad_h_n` and ending as grad h0.
    act' comes from `out` alone, so nothing else has to be kept. Differentiable itself, through `out` too.
    """
    lengths, offsets, resets = rows
    if offsets is not None:
        assert lengths is not None
        row, valid = _padded_rows(lengths, offsets)
        padded = Rows(lengths, None, None if resets is None else _pad(resets, row))
        grads = None if grad_out is None else _pad(grad_out, row)
        grad_pre, grad_h0 = backward(grads, grad_h_n, weight, _pad(out, row), padded, rule)
        return grad_pre[valid], grad_h0

    groups, hidden = weight.shape[:2]
    shape = out.shape
    out = _in_shape(out, torch.Size((*shape[:2], groups, hidden)))
    if grad_out is not None:
        grad_out = _in_shape(grad_out, out.shape)
    if grad_h_n is None:
        grad_h_n = out.new_zeros(out.shape[1:])
    parts = [
        _scan_back(
            None if grad_out is None else _take(grad_out, 2, g), _take(grad_h_n, 1, g), _take(weight, 0, g),
            _take(out, 2, g), rows, rule, reverse,
        )
        for g, reverse in directions(groups, rule.num_reversed)
    ]  # fmt: skip
    if not parts:
        return torch.empty_like(out).reshape(shape), torch.empty_like(grad_h_n)
    return _in_shape(_join([grad for grad, _ in parts], 2), shape), _join([c for _, c in parts], 1)


def _scan_back(
    grad_out: Tensor | None, c: Tensor, weight: Tensor, out: Tensor, rows: Rows, rule: Rule, reverse: bool
) -> tuple[Tensor, Tensor]:
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
        return torch.empty_like(out), c.clone()
    return torch.stack(grad_pre if reverse else grad_pre[::-1]), c
