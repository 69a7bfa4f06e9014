"""The gradients of U and of the units' own factors, sums over all steps of products of a gradient and a state.

All of them differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_rin.problem import Rows, Units, directions, sum_dtype

_Sum = Callable[[Tensor, Tensor], Tensor]  # over rows of products: [rows, G, D], [rows, G, D] -> [G, ...]


def weight_gradient(grad_pre: Tensor, out: Tensor, h0: Tensor | None, rows: Rows, num_reversed: int) -> Tensor:
    """dU [G, D, D]: the sum over steps and batch of (gradient of pre_t) x (state that entered step t).

    grad_pre and out [T, B, G, D], or [rows, G, D] of a packed batch. One GEMM per direction: the states that enter are
    `out` shifted by a step, so no copy of them is made unless the batch is packed.
    """
    return _sum_over_steps(_outer, grad_pre, out, h0, rows, num_reversed)


def _sum_over_steps(
    product: _Sum, grad_pre: Tensor, out: Tensor, h0: Tensor | None, rows: Rows, num_reversed: int
) -> Tensor:
    one = _weight_gradient if rows.offsets is None else _packed_weight_gradient
    parts = [
        one(product, grad_pre, out, h0, rows, reverse)
        if g is None  # no view: batched gradients of the older kind refuse one that changes nothing
        else one(product, grad_pre[..., g, :], out[..., g, :], None if h0 is None else h0[:, g], rows, reverse)
        for g, reverse in directions(out.shape[-2], num_reversed)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weight_gradient(
    product: _Sum, grad_pre: Tensor, out: Tensor, h0: Tensor | None, rows: Rows, reverse: bool
) -> Tensor:
    lengths, _, resets = rows
    # Shifted as rows, not as steps: a tensor of T - 1 steps would have compilers tell T = 2 from all other T.
    steps, batch = out.shape[:2]
    moved, entered = (t.reshape(steps * batch, *out.shape[2:]) for t in (grad_pre, out))
    kept = (steps - 1) * batch
    moved, entered = (moved[:kept], entered[batch:]) if reverse else (moved[batch:], entered[:kept])
    if resets is not None:
        moved = moved.masked_fill(resets.reshape(steps * batch)[batch:, None, None], 0)
    total = product(moved, entered)
    if h0 is None or not steps:
        return total
    if not reverse:
        first = grad_pre[0] if resets is None else grad_pre[0].masked_fill(resets[0, :, None, None], 0)
    elif lengths is None:
        first = grad_pre[-1]
    else:  # a reversed sequence starts at its own last step; an empty one nowhere
        last = (lengths - 1).clamp(min=0)
        first = grad_pre[last, torch.arange(lengths.shape[0], device=last.device)]
        first = first.masked_fill((lengths < 1)[:, None, None], 0)
    return total + product(first, h0)


def _packed_weight_gradient(
    product: _Sum, grad_pre: Tensor, out: Tensor, h0: Tensor | None, rows: Rows, reverse: bool
) -> Tensor:
    lengths, offsets, resets = rows
    assert lengths is not None
    assert offsets is not None
    # For every row, which of the rows [h0; out] entered it. From its step and its sequence, so as many numbers as there
    # are rows: a table of all steps and all sequences would be T * B, for one long sequence among short ones too.
    count, steps = out.shape[0], offsets.shape[0]
    sizes = torch.diff(offsets, append=offsets.new_full((1,), count))
    step = torch.repeat_interleave(sizes, output_size=count)
    sequence = torch.arange(count, device=out.device) - offsets[step]
    other = step + 1 if reverse else step - 1
    inside = (other < lengths[sequence]) if reverse else (other >= 0)
    entered = offsets[other.clamp(0, steps - 1)] + sequence  # in `out`, where `inside`
    start = sequence if h0 is not None else sequence.new_zeros(())
    initial = h0 if h0 is not None else out.new_zeros(1, *out.shape[1:])
    states = torch.cat([initial, out])[torch.where(inside, entered + initial.shape[0], start)]
    if resets is not None:
        # The boundary that a step is entered over lies before it, or after it in a reversed recurrence.
        crossed = resets if not reverse else inside & resets[torch.where(inside, entered, 0)]
        states = states.masked_fill(crossed[:, None, None], 0)
    return product(grad_pre, states)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Sum over rows of a x b: [rows, G, D], [rows, G, D] -> [G, D, D]."""
    if a.shape[1] == 1:
        return (a[:, 0].t() @ b[:, 0])[None]
    return a.permute(1, 2, 0) @ b.transpose(0, 1)


def weight_gradient_of_units(
    grad_pre: Tensor, out: Tensor, h0: Tensor | None, rows: Rows, num_reversed: int, units: Units, act: Callable
) -> Tensor:
    """dU as `weight_gradient`, of what U multiplies: in the form "current" act(h), which need not be 0 where h is."""
    if units.form != "current":
        return weight_gradient(grad_pre, out, h0, rows, num_reversed)
    rest = act(out.new_zeros(()))
    h0 = None if h0 is None else act(h0) - rest
    above = weight_gradient(grad_pre, act(out) - rest, h0, rows, num_reversed)
    total = _by_row(grad_pre).sum(0)
    return above + (total * rest)[..., None].expand_as(above)


def unit_gradients(
    grad_state: Tensor, out: Tensor, values: Tensor | None, h0: Tensor | None, rows: Rows, num_reversed: int
) -> tuple[Tensor, Tensor | None]:
    """Of skip and gain [G, D]: sums of g_t h_{t-1} and of g_t z_t, from g [..., G, D] as `backward_of_units` has it."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        dtype = sum_dtype(a.dtype)
        return (a.to(dtype) * b.to(dtype)).sum(0)

    skip = _sum_over_steps(product, grad_state, out, h0, rows, num_reversed)
    return skip, None if values is None else product(_by_row(grad_state), _by_row(values))


def _by_row(states: Tensor) -> Tensor:
    """[..., G, D] as [rows, G, D]; by `reshape`, since batched gradients have no `flatten`."""
    return states.reshape(-1, *states.shape[-2:])
