"""The recurrence in plain PyTorch: what every kernel of this package is checked against.

Any dtype, any device, differentiable any number of times, usable under vmap and forward-mode derivatives.
Imports nothing of this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = {"none": lambda a: a, "relu": torch.relu, "tanh": torch.tanh}


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
        steps, batch = offsets.numel(), lengths.numel()
        t, b = torch.arange(steps, device=pre.device)[:, None], torch.arange(batch, device=pre.device)
        row = torch.where(t < lengths, offsets[:, None] + b, 0)  # padding reads row 0; its result is dropped
        padded = pre[row] if pre.shape[0] else pre.new_zeros(steps, batch, *pre.shape[1:])
        padded_resets = None if resets is None else resets[row]
        out, h_n = recurrence(
            padded, weight, h0, lengths, None, padded_resets,
            skip=skip, activation=activation, num_reversed=num_reversed,
        )  # fmt: skip
        return out[t < lengths], h_n

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
    batch = out.shape[1] if offsets is None else lengths.numel()  # type: ignore[union-attr]
    c = out.new_zeros(batch, *out.shape[-2:]) if grad_h_n is None else grad_h_n
    if activation == "relu":
        slope = (out > 0).to(out.dtype)
    elif activation == "tanh":
        slope = 1 - out * out
    else:
        slope = torch.ones_like(out)
    raise NotImplementedError
