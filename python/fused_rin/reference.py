"""The recurrence in plain PyTorch: what every kernel of this package is checked against.

Any dtype, any device, differentiable any number of times, usable under vmap and forward-mode derivatives.
Imports nothing of this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = {"none": lambda a: a, "relu": torch.relu, "tanh": torch.tanh}

# gradient g of h -> gradient of the activation's argument, from h alone. A stopped ReLU stops NaN too, as torch's does.
SLOPES = {
    "none": lambda g, h: g,
    "relu": lambda g, h: torch.where(h <= 0, 0, g),
    "tanh": lambda g, h: g * (1 - h * h),
}


def recurrence(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    skip: float = 1.0,
    activation: str = "relu",
    num_reversed: int = 0,
) -> tuple[Tensor, Tensor]:
    """h_t = act(pre_t + U h_{t-1} + skip * h_{t-1}) for G independent recurrences (arXiv 1801.06105, eq. 2).

    Shapes: `pre` [T, B, G, D], `weight` (U) [G, D, D], `h0` [B, G, D] or None for zeros, `lengths` [B] integers,
    `resets` [T, B] bool. With `offsets` [T] the batch is packed: `pre` is [rows, G, D], `resets` [rows], row
    `offsets[t] + b` belongs to step t of sequence b, and `lengths` is required.

    The last `num_reversed` recurrences run from the last step to the first. A sequence shorter than T keeps its
    state past its end and its outputs there are 0. `resets[t, b]` says that an episode starts at step t: no state
    crosses from t-1 to t, in either direction (at t = 0 it is `h0` that is dropped, for recurrences that run forward).

    Returns `out` in the layout of `pre`, and `h_n` [B, G, D], the state after the last step each sequence ran.
    """
    if offsets is not None:
        assert lengths is not None
        row, valid = _padded_rows(lengths, offsets)
        out, h_n = recurrence(
            _pad(pre, row), weight, h0, lengths, None, None if resets is None else _pad(resets, row),
            skip=skip, activation=activation, num_reversed=num_reversed,
        )  # fmt: skip
        return out[valid], h_n

    if h0 is None:
        h0 = pre.new_zeros(pre.shape[1:])
    forward = pre.shape[2] - num_reversed
    parts = [
        _scan(pre[:, :, g], weight[g], h0[:, g], lengths, resets, skip, activation, reverse)
        for g, reverse in ((slice(None, forward), False), (slice(forward, None), True))
        if weight[g].shape[0]
    ]
    if not parts:
        return torch.empty_like(pre), torch.empty_like(h0)
    return torch.cat([out for out, _ in parts], 2), torch.cat([h for _, h in parts], 1)


def _padded_rows(lengths: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed row of each (step, sequence) [T, B], and which of them exist; the others point at row 0."""
    steps = torch.arange(offsets.numel(), device=offsets.device)[:, None]
    batch = torch.arange(lengths.numel(), device=offsets.device)
    valid = steps < lengths
    return torch.where(valid, offsets[:, None] + batch, 0), valid


def _pad(rows: Tensor, row: Tensor) -> Tensor:
    return rows[row] if rows.shape[0] else rows.new_zeros(*row.shape, *rows.shape[1:])


def _scan(
    pre: Tensor,
    weight: Tensor,
    h: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    skip: float,
    activation: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    act = ACTIVATIONS[activation]
    steps = pre.shape[0]
    out = []
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        start = t + 1 if reverse else t  # the boundary that is crossed lies before this step
        if resets is not None and start < steps:
            crossed = resets[start] if lengths is None else resets[start] & (start < lengths)
            h = h.masked_fill(crossed[:, None, None], 0)
        a = pre[t] + torch.einsum("bgj,gij->bgi", h, weight)
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
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    skip: float = 1.0,
    activation: str = "relu",
    num_reversed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The backward sweep: gradients of `pre` (layout of `out`) and of `h0` [B, G, D].

    With x_t the gradient of pre_t and time running against the recurrence's own direction,
    x_t = (grad_out_t + c) * act'(h_t), c = x_t U + skip * x_t, c starting as `grad_h_n` and ending as grad h0.
    act' comes from `out` alone, so nothing else has to be kept. Differentiable itself, through `out` too.
    """
    if offsets is not None:
        assert lengths is not None
        row, valid = _padded_rows(lengths, offsets)
        grad_pre, grad_h0 = backward(
            None if grad_out is None else _pad(grad_out, row), grad_h_n, weight, _pad(out, row), lengths,
            None, None if resets is None else _pad(resets, row),
            skip=skip, activation=activation, num_reversed=num_reversed,
        )  # fmt: skip
        return grad_pre[valid], grad_h0

    if grad_h_n is None:
        grad_h_n = out.new_zeros(out.shape[1:])
    forward = out.shape[2] - num_reversed
    parts = [
        _scan_back(
            None if grad_out is None else grad_out[:, :, g], grad_h_n[:, g], weight[g], out[:, :, g], lengths,
            resets, skip, activation, reverse,
        )
        for g, reverse in ((slice(None, forward), False), (slice(forward, None), True))
        if weight[g].shape[0]
    ]  # fmt: skip
    if not parts:
        return torch.empty_like(out), torch.empty_like(grad_h_n)
    return torch.cat([grad for grad, _ in parts], 2), torch.cat([c for _, c in parts], 1)


def _scan_back(
    grad_out: Tensor | None,
    c: Tensor,
    weight: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    skip: float,
    activation: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    slope = SLOPES[activation]
    steps = out.shape[0]
    grad_pre = []
    for t in range(steps) if reverse else range(steps - 1, -1, -1):
        x = slope(c if grad_out is None else grad_out[t] + c, out[t])
        carry = torch.einsum("bgi,gij->bgj", x, weight)
        carry = carry + skip * x if skip else carry
        start = t + 1 if reverse else t
        if resets is not None and start < steps:
            crossed = resets[start] if lengths is None else resets[start] & (start < lengths)
            carry = carry.masked_fill(crossed[:, None, None], 0)
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
