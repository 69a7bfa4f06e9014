"""A layer in eager mode on a CPU: input product, recurrence and all gradients in one native call each way.

The general way of a layer is a matrix product over all steps, the sweep, and more products over all steps for the
gradients. On a CPU those products are bound by memory: at B = 128, D = 100, T = 784 each tensor of all steps takes
40 MB, fresh from the operating system. Here they are made in chunks of steps that stay in the caches
(csrc/cpu/layer.h), and the gradient of pre is never stored at all. For backward, the input and the output are kept.

`run` returns None where this way does not fit (see `step.unobserved`); the general one then runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rin import cpu, ops, reference, step


class _Layer(torch.autograd.Function):
    """Arguments as in `run`, tensors contiguous. The backward is differentiable again, through the reference."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, resets, groups, skip, activation, num_reversed = inputs
        out, h_n = cpu.layer_forward(
            x, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, resets,
            groups=groups, skip=skip, activation=activation, num_reversed=num_reversed,
        )  # fmt: skip
        ctx.save_for_backward(x, w_ih, w_hh, h0, out, lengths, offsets, resets)
        ctx.constants = groups, skip, activation, num_reversed
        ctx.set_materialize_grads(False)
        return out, h_n

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_h_n is None:
            return (None,) * 13
        x, w_ih, w_hh, h0, out, lengths, offsets, resets = ctx.saved_tensors
        groups, skip, activation, num_reversed = ctx.constants
        needs = ctx.needs_input_grad
        grad_out = None if grad_out is None else grad_out.contiguous()
        grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
        sweep = {"skip": skip, "activation": activation, "num_reversed": num_reversed}
        # A graph of this backward depends on pre through `out`, which is part of it. Batched gradients are no tensors
        # that a kernel could read. Both are the reference's.
        plain = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        if groups == 1 and not plain and not ops.is_observed():
            grad_x, grad_w_ih, grad_w_hh, grad_bias, grad_h0 = cpu.layer_backward(
                grad_out, grad_h_n, x, w_ih, w_hh, h0, out, lengths, offsets, resets, **sweep,
                needs_x=needs[0], needs_weights=any(needs[1:5]),
            )  # fmt: skip
        else:
            blocks = w_hh.view(groups, -1, w_ih.shape[0] // groups)
            split = (*x.shape[:-1], groups, blocks.shape[1])
            grads = None if grad_out is None else grad_out.view(split)
            grad_h_n = None if grad_h_n is None else grad_h_n.view(-1, *blocks.shape[:2])
            arguments = (grads, grad_h_n, blocks, out.view(split), lengths, offsets, resets)
            if plain:
                grad_pre, grad_h0 = reference.backward(*arguments, **sweep)
            else:
                grad_pre, grad_h0 = torch.ops.fused_rin.sweep_backward(*arguments, *sweep.values(), "auto")
            rows = grad_pre.reshape(-1, w_ih.shape[0])
            grad_w_hh = ops.weight_gradient(grad_pre, out.view(split), h0, lengths, offsets, resets, num_reversed)
            grad_w_hh = grad_w_hh.view(w_hh.shape)
            grad_x = (rows @ w_ih).view(x.shape) if needs[0] else None
            grad_w_ih = rows.t() @ x.reshape(-1, x.shape[-1])
            grad_bias = rows.sum(0)
        found = (grad_x, grad_w_ih, grad_w_hh, grad_bias, grad_bias, grad_h0)
        return *(grad if need else None for grad, need in zip(found, needs, strict=False)), *(None,) * 7


def _fits(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return tensor is None or (
        ops.is_plain(tensor)
        and tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.is_cpu
        and not tensor.is_neg()
    )


def run(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    *,
    groups: int,
    skip: float,
    activation: str,
    num_reversed: int,
    backend: str,
) -> tuple[Tensor, Tensor] | None:
    """(out [T, B, G * D], h_n [1, B, G * D]) of a layer of G recurrences on checked arguments, or None.

    Shapes as in `cpu.layer_forward`.
    """
    dtype, inputs = x.dtype, x.shape[-1]
    width = w_ih.shape[0]
    hidden, bias = width // groups, (width,)
    if not (
        dtype in cpu.DTYPES
        and x.numel()
        and step.unobserved(backend)
        and _fits(x, dtype, x.shape)
        and _fits(w_ih, dtype, (width, inputs))
        and _fits(w_hh, dtype, (width, hidden))
        and _fits(b_ih, dtype, bias)
        and _fits(b_hh, dtype, bias)
        and _fits(h0, dtype, (x.shape[1] if lengths is None else lengths.shape[0], groups, hidden))
    ):
        return None
    tensors = [None if t is None else t.contiguous() for t in (x, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, resets)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:6]):
        return _Layer.apply(*tensors, groups, skip, activation, num_reversed)
    return cpu.layer_forward(*tensors, groups=groups, skip=skip, activation=activation, num_reversed=num_reversed)  # type: ignore[arg-type]
