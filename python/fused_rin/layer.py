"""A layer of G recurrences: its input product, the recurrence, and all gradients.

On a CPU, where nobody watches the operators, it is one native call each way (`_Layer`). The general way is a matrix
product over all steps, the sweep, and more products over all steps for the gradients. On a CPU those products are bound
by memory: at B = 128, D = 100, T = 784 each tensor of all steps takes 40 MB, fresh from the operating system. Fused,
they are made in chunks of steps that stay in the caches (csrc/cpu/layer.h), and the gradient of pre is never stored at
all. For backward, the input and the output are kept.

A layer of a single step has nothing to sweep: its weights are read as they lie, not packed for steps to come. Packing
took three quarters of a decoder's training step at D = 1,024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_rin import backends, cpu, gradients, ops, watchers
from fused_rin.problem import DTYPES, Rows, Rule, Weights
from fused_rin.watchers import DIRECT

# How a fused layer is computed.
STEP = "step"  # one step of a few rows, each output a dot product with the weights as they lie
PRODUCTS = "products"  # one step of more rows, by torch's matrix products
CHUNKS = "chunks"  # the sweep, and products in chunks of steps


def kind(steps: int, batch: int, dtype: torch.dtype, rows: Rows, groups: int) -> str:
    """STEP, PRODUCTS or CHUNKS for a fused layer of these sizes."""
    if steps != 1 or rows.offsets is not None or rows.lengths is not None or rows.resets is not None:
        return CHUNKS
    if batch <= cpu.MAX_STEP_ROWS:
        return STEP
    # 16-bit types need float32 sums of both products together.
    return PRODUCTS if groups == 1 and (dtype is torch.float32 or dtype is torch.float64) else CHUNKS


def _activate_(a: Tensor, activation: str) -> Tensor:
    return torch.relu_(a) if activation == "relu" else torch.tanh_(a) if activation == "tanh" else a


def _products_forward(x: Tensor, weights: Weights, h0: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, b_ih, b_hh = weights
    out = F.linear(x, w_ih, b_ih)
    a = out[0]
    if h0 is None:
        if b_hh is not None:
            a.add_(b_hh)
    else:
        h = h0[:, 0]
        a.add_(F.linear(h, w_hh, b_hh))
        if rule.skip:
            a.add_(h, alpha=rule.skip)
    _activate_(a, rule.activation)
    return out, out.clone()


def _products_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor | None,
    out: Tensor,
    rule: Rule,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    grad = grad_out if grad_h_n is None else grad_h_n if grad_out is None else grad_out + grad_h_n
    assert grad is not None
    h, d = out[0], grad[0]
    if rule.activation == "relu":
        d = torch.ops.aten.threshold_backward(d, h, 0)
    elif rule.activation == "tanh":
        d = torch.ops.aten.tanh_backward(d, h)
    grad_x = torch.mm(d, w_ih)[None] if needs[0] else None
    grad_w_ih = torch.mm(d.t(), x[0]) if needs[1] else None
    grad_w_hh = None
    if needs[2]:
        grad_w_hh = torch.zeros_like(w_hh) if h0 is None else torch.mm(d.t(), h0[:, 0])
    grad_b_ih, grad_b_hh = (d.sum(0) if need else None for need in needs[3:5])
    grad_h0 = None
    if needs[5]:
        grad_h0 = torch.addmm(d, d, w_hh, beta=rule.skip)[:, None] if rule.skip else torch.mm(d, w_hh)[:, None]
    return grad_x, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_h0


def _fused(
    x: Tensor, weights: Weights, h0: Tensor | None, rows: Rows, rule: Rule, groups: int, batch_first: bool, how: str
) -> tuple[Tensor, Tensor]:
    if how is STEP:
        out, h_n = cpu.step_forward(x, weights, h0, rule, groups)
    elif how is PRODUCTS:
        out, h_n = _products_forward(x, weights, h0, rule)
    else:
        return cpu.layer_forward(x, weights, h0, rows, rule, groups, batch_first)
    return out.transpose_(0, 1) if batch_first else out, h_n


class _Layer(torch.autograd.Function):
    """Arguments as in `forward`, tensors contiguous. The backward is differentiable again, through the reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        weights, h0, rows, rule = Weights(*inputs[:4]), inputs[4], Rows(*inputs[5:8]), Rule(*inputs[8:11])
        groups, batch_first, how = inputs[11:]
        out, h_n = _fused(x, weights, h0, rows, rule, groups, batch_first, how)
        saved = (x, weights.w_ih, weights.w_hh, h0, out, *rows)
        ctx.save_for_backward(*saved)
        ctx.kinds = ops.kinds_of(saved)
        ctx.constants = rule, groups, batch_first, how
        ctx.set_materialize_grads(False)
        return out, h_n

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        if watchers.may_be_passed_by(grad_out, grad_h_n):
            with torch._C.DisableTorchFunction():
                return _layer_backward(ctx, grad_out, grad_h_n)
        return _layer_backward(ctx, grad_out, grad_h_n)


def _layer_backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
    rest: tuple[None, ...] = (None,) * 9
    if grad_out is None and grad_h_n is None:
        return (None,) * 6 + rest
    x, w_ih, w_hh, h0, out, *saved_rows = ops.restored(ctx)
    rule, groups, batch_first, how = ctx.constants
    rows, needs = Rows(*saved_rows), ctx.needs_input_grad
    if batch_first:
        out, grad_out = out.transpose(0, 1), None if grad_out is None else grad_out.transpose(0, 1)
    direct = watchers.way_back(grad_out, grad_h_n, x, w_ih, w_hh, h0, out, *rows) is DIRECT
    if direct and (groups == 1 or how is STEP):
        tensors = [None if t is None else t.contiguous() for t in (grad_out, grad_h_n, x, w_ih, w_hh, h0, out)]
        if how is STEP:
            return cpu.step_backward(*tensors, rule, groups, needs[:6]) + rest  # type: ignore[arg-type]
        if how is PRODUCTS:
            return _products_backward(*tensors, rule, needs) + rest  # type: ignore[arg-type]
        grad_x, grad_w_ih, grad_w_hh, grad_bias, grad_h0 = cpu.layer_backward(
            *tensors,
            rows,
            rule,
            needs[0],
            any(needs[1:5]),  # type: ignore[arg-type]
        )
    else:
        # Gradients arrive and are kept in the shapes of the layer, the recurrence's have [G, D].
        blocks = w_hh.view(groups, -1, w_ih.shape[0] // groups)
        split = (*x.shape[:-1], groups, blocks.shape[1])
        grads = None if grad_out is None else grad_out.reshape(split)
        grad_h_n = None if grad_h_n is None else grad_h_n.reshape(-1, *blocks.shape[:2])
        states = out.reshape(split)
        grad_pre, grad_h0 = ops.backward(grads, grad_h_n, blocks, states, rows, rule, "auto")
        flat = grad_pre.reshape(-1, w_ih.shape[0])
        grad_w_hh = gradients.weight_gradient(grad_pre, states, h0, rows, rule.num_reversed).view(w_hh.shape)
        grad_x = (flat @ w_ih).view(x.shape) if needs[0] else None
        grad_w_ih = flat.t() @ x.reshape(-1, x.shape[-1])
        grad_bias = flat.sum(0)
    # Each bias gets a tensor of its own: who scales gradients in place would scale a shared one twice.
    grad_b_hh = grad_bias.clone() if needs[3] and needs[4] and grad_bias is not None else grad_bias
    found = (grad_x, grad_w_ih, grad_w_hh, grad_bias, grad_b_hh, grad_h0)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=False)) + rest


def _fits(x: Tensor, weights: Weights, h0: Tensor | None, batch: int, groups: int) -> bool:
    """Whether these are the tensors of one layer, in one dtype of the kernels, which read them unchecked."""
    dtype, (w_ih, w_hh, b_ih, b_hh) = x.dtype, weights
    if dtype not in DTYPES or not x.is_cpu or w_ih.dim() != 2 or not x.numel():
        return False
    width = w_ih.shape[0]
    hidden = width // groups
    for tensor, shape in (
        (w_ih, (width, x.shape[-1])),
        (w_hh, (width, hidden)),
        (b_ih, (width,)),
        (b_hh, (width,)),
        (h0, (batch, groups, hidden)),
    ):
        if tensor is not None and not (tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu):
            return False
    return True


def is_fused(x: Tensor, weights: Weights, h0: Tensor | None, rows: Rows, groups: int, name: str) -> bool:
    """Whether a layer is one native call: on a CPU, where nobody watches (`name`: of the backend, requested)."""
    return (
        not torch.compiler.is_compiling()
        and (name == "auto" or name == "cpu")
        and cpu._native is not None
        and watchers.way(x, *weights, h0, *rows, product=True) is DIRECT
        and _fits(x, weights, h0, rows.sizes(x)[1], groups)
    )


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
) -> tuple[Tensor, Tensor]:
    """A layer of G recurrences, on checked arguments.

    x [T, B, I] (or [rows, I] of a packed batch), h0 [B, G, D], `backend` as the caller named it. Returns out
    [T, B, G * D], with batch_first [B, T, G * D], and h_n [directions, B, heads * D]: no views where nobody watches,
    since code for torch.nn.RNN calls detach_() on them. Raises RuntimeError for weights that do not fit x; `u_name` is
    what its text calls U.
    """
    name = backends.requested(backend)
    if is_fused(x, weights, h0, rows, groups, name):
        steps, batch = rows.sizes(x)
        how = kind(steps, batch, x.dtype, rows, groups)
        x, h0 = x.contiguous(), None if h0 is None else h0.contiguous()
        weights = Weights(*[None if w is None else w.contiguous() for w in weights])  # type: ignore[arg-type]
        if rows.lengths is not None or rows.resets is not None:
            rows = Rows(*[None if t is None else t.contiguous() for t in rows])
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights, h0)):
            out, h_n = _Layer.apply(x, *weights, h0, *rows, *rule, groups, batch_first, how)
        else:
            out, h_n = _fused(x, weights, h0, rows, rule, groups, batch_first, how)
    else:
        out, h_n = _composed(x, weights, h0, rows, rule, groups, name, batch_first, u_name)
        if not rule.num_reversed:
            return out, h_n.reshape(1, h_n.shape[0], -1).clone()
    if rule.num_reversed:
        h_n = h_n.reshape(-1, 2, weights.w_ih.shape[0] // 2).transpose(0, 1)
        h_n = h_n.clone(memory_format=torch.contiguous_format)
    return out, h_n


def _composed(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    groups: int,
    name: str,
    batch_first: bool,
    u_name: str,
) -> tuple[Tensor, Tensor]:
    """As a matrix product and the recurrence, by operators: any device, under compilers and autocast."""
    w_ih, w_hh, b_ih, b_hh = weights
    # Times one: a sum would hand the same tensor to both biases as their gradient.
    pre = F.linear(x, w_ih, b_ih if b_ih is None or b_hh is None else b_ih + b_hh * 1)
    if w_hh.dtype != pre.dtype:
        if not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"{u_name} must have dtype {pre.dtype}, got {w_hh.dtype}")
        w_hh = w_hh.to(pre.dtype)
    if w_hh.device != pre.device:
        raise RuntimeError(f"{u_name} must be on {pre.device}, got {w_hh.device}")
    hidden = w_ih.shape[0] // groups
    h0 = None if h0 is None else h0.to(pre.dtype)
    return ops.recurrence(pre, w_hh.reshape(groups, hidden, hidden), h0, rows, rule, name, batch_first)
