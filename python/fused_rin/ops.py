"""The two sweeps as registered operators, and the autograd function over them.

`torch.ops.fused_rin.sweep_forward` and `sweep_backward` carry fake kernels, so compilers and exporters see opaque
operators of known shape and no data pointer is asked of a fake tensor. In eager mode the operators are passed by:
the dispatcher costs about 6 us a call, the direct call 1.4, and a streaming model makes one per step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rin import backends, reference

_library = torch.library.Library("fused_rin", "DEF")
_library.define(
    "sweep_forward(Tensor pre, Tensor weight, Tensor? h0, Tensor? lengths, Tensor? offsets, Tensor? resets, "
    "float skip, str activation, int num_reversed, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "sweep_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor weight, Tensor out, Tensor? lengths, Tensor? offsets, "
    "Tensor? resets, float skip, str activation, int num_reversed, str backend) -> (Tensor, Tensor)"
)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def sweep_forward(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    skip: float,
    activation: str,
    num_reversed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The forward sweep on real tensors: (out, h_n). Arguments as in `reference.recurrence`."""
    module, _ = backends.select(backend, pre.device, pre.dtype, pre.shape[-1])
    return module.forward(
        pre.contiguous(), weight.contiguous(), _contiguous(h0), _contiguous(lengths), _contiguous(offsets),
        _contiguous(resets), skip=skip, activation=activation, num_reversed=num_reversed,
    )  # fmt: skip


def sweep_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    weight: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    skip: float,
    activation: str,
    num_reversed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The backward sweep on real tensors: gradients of pre and h0. Arguments as in `reference.backward`."""
    module, _ = backends.select(backend, out.device, out.dtype, out.shape[-1])
    return module.backward(
        _contiguous(grad_out), _contiguous(grad_h_n), weight.contiguous(), out.contiguous(), _contiguous(lengths),
        _contiguous(offsets), _contiguous(resets), skip=skip, activation=activation, num_reversed=num_reversed,
    )  # fmt: skip


_library.impl("sweep_forward", sweep_forward, "CompositeExplicitAutograd")
_library.impl("sweep_backward", sweep_backward, "CompositeExplicitAutograd")


def _batch(rows: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Any:
    return rows.shape[1] if offsets is None else lengths.shape[0]  # type: ignore[union-attr]


@torch.library.register_fake("fused_rin::sweep_forward")
def _(pre, weight, h0, lengths, offsets, resets, skip, activation, num_reversed, backend):  # type: ignore[no-untyped-def]
    out = torch.empty_like(pre, memory_format=torch.contiguous_format)
    return out, pre.new_empty(_batch(pre, lengths, offsets), *pre.shape[-2:])


@torch.library.register_fake("fused_rin::sweep_backward")
def _(  # type: ignore[no-untyped-def]
    grad_out, grad_h_n, weight, out, lengths, offsets, resets, skip, activation, num_reversed, backend
):
    grad_pre = torch.empty_like(out, memory_format=torch.contiguous_format)
    return grad_pre, out.new_empty(_batch(out, lengths, offsets), *out.shape[-2:])


def weight_gradient(
    grad_pre: Tensor,
    out: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    num_reversed: int,
) -> Tensor:
    """dU [G, D, D]: the sum over steps and batch of (gradient of pre_t) x (state that entered step t).

    One GEMM per direction: the states that enter are `out` shifted by a step, so no copy of them is made unless the
    batch is packed. Differentiable.
    """
    groups, forward = out.shape[-2], out.shape[-2] - num_reversed
    parts = [
        _weight_gradient(
            grad_pre[..., g, :],
            out[..., g, :],
            None if h0 is None else h0[:, g],
            lengths,
            offsets,
            resets,
            reverse,
        )
        for g, reverse in ((slice(0, forward), False), (slice(forward, groups), True))
        if g.start < g.stop
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weight_gradient(
    grad_pre: Tensor,
    out: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> Tensor:
    if offsets is not None:
        assert lengths is not None
        return _packed_weight_gradient(grad_pre, out, h0, lengths, offsets, resets, reverse)
    steps = out.shape[0]
    # Shifted as rows, not as steps: a tensor of T - 1 steps would have compilers tell T = 2 from all other T.
    batch = out.shape[1]
    rows, states = grad_pre.flatten(0, 1), out.flatten(0, 1)
    kept = (steps - 1) * batch
    moved, entered = (rows[:kept], states[batch:]) if reverse else (rows[batch:], states[:kept])
    if resets is not None:
        moved = moved.masked_fill(resets.flatten()[batch:, None, None], 0)
    total = _outer(moved, entered)
    if h0 is None or not steps:
        return total
    if not reverse:
        first = grad_pre[0] if resets is None else grad_pre[0].masked_fill(resets[0, :, None, None], 0)
    elif lengths is None:
        first = grad_pre[-1]
    else:  # a reversed sequence starts at its own last step; an empty one nowhere
        last = (lengths - 1).clamp(min=0)
        first = grad_pre[last, torch.arange(lengths.numel(), device=last.device)]
        first = first.masked_fill((lengths < 1)[:, None, None], 0)
    return total + _outer(first, h0)


def _packed_weight_gradient(
    grad_pre: Tensor,
    out: Tensor,
    h0: Tensor | None,
    lengths: Tensor,
    offsets: Tensor,
    resets: Tensor | None,
    reverse: bool,
) -> Tensor:
    # For every row, which of the rows [h0; out] entered it.
    steps = torch.arange(offsets.numel(), device=out.device)[:, None]
    valid = steps < lengths
    row = offsets[:, None] + torch.arange(lengths.numel(), device=out.device)
    row = (row + lengths.numel()).masked_fill(~valid, 0)  # [T, B], after the B rows of h0
    initial = torch.arange(lengths.numel(), device=out.device).expand(1, -1)
    entered = torch.cat([row[1:], initial] if reverse else [initial, row[:-1]])
    if reverse:
        entered = torch.where(steps == lengths - 1, initial, entered)
    if h0 is None:
        h0 = out.new_zeros(lengths.numel(), *out.shape[1:])
    states = torch.cat([h0, out])[entered[valid]]
    if resets is not None:
        if reverse:  # the boundary that a step is entered over lies after it
            after = torch.cat([resets.new_zeros(lengths.numel()), resets])[entered[valid]]
            states = states.masked_fill(after[:, None, None], 0)
        else:
            states = states.masked_fill(resets[:, None, None], 0)
    return _outer(grad_pre, states)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Sum over rows of a x b: [rows, G, D], [rows, G, D] -> [G, D, D]."""
    if a.shape[1] == 1:
        return (a[:, 0].t() @ b[:, 0])[None]
    return a.permute(1, 2, 0) @ b.transpose(0, 1)


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read it: fake, functional and other wrapped tensors have no data to point at."""
    return type(tensor) is Tensor or type(tensor) is torch.nn.Parameter


_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def is_observed() -> bool:
    """Whether somebody records operators from plain tensors: torch.jit.trace, make_fx, any TorchDispatchMode.

    What a kernel writes behind its back would be missing from the record, silently.
    """
    return _dispatch_modes() > 0 or _tracing_state() is not None


def _backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
    weight, h0, out, lengths, offsets, resets = ctx.saved_tensors
    skip, activation, num_reversed, backend = ctx.constants
    arguments = (grad_out, grad_h_n, weight, out, lengths, offsets, resets)
    if grad_out is None and grad_h_n is None:
        return (None,) * 10
    if torch.compiler.is_compiling() or not is_plain(out):
        sweep = torch.ops.fused_rin.sweep_backward
        grad_pre, grad_h0 = sweep(*arguments, skip, activation, num_reversed, backend)
    elif torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        # A graph of this backward is asked for (it depends on pre through `out` alone, which is part of the graph), or
        # gradients are batched.
        grad_pre, grad_h0 = reference.backward(*arguments, skip=skip, activation=activation, num_reversed=num_reversed)
    else:
        direct = torch.ops.fused_rin.sweep_backward if is_observed() else sweep_backward
        grad_pre, grad_h0 = direct(*arguments, skip, activation, num_reversed, backend)
    needs = ctx.needs_input_grad
    grad_weight = weight_gradient(grad_pre, out, h0, lengths, offsets, resets, num_reversed) if needs[1] else None
    return grad_pre if needs[0] else None, grad_weight, grad_h0 if needs[2] else None, *(None,) * 7


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, h0, lengths, offsets, resets, *constants = inputs
    ctx.save_for_backward(weight, h0, output[0], lengths, offsets, resets)
    ctx.constants = constants
    ctx.set_materialize_grads(False)


class Recurrence(torch.autograd.Function):
    """The recurrence with its gradient; keeps the output and nothing else for backward.

    The backward is differentiable again: asked for a graph, it is computed by the reference.
    """

    # The context is an argument of forward: with a setup_context of its own, torch inspects forward's signature at
    # every call, for some 50 us. Transforms that need it never come here (see recurrence below).
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = sweep_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


# The operator itself is differentiable too: for compilers (torch.export of torch 2.6 cannot take an autograd.Function
# over dynamic sizes), for tracers, and so that an exported program can be trained on.
torch.library.register_autograd("fused_rin::sweep_forward", _backward, setup_context=_setup_context)


def recurrence(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    skip: float,
    activation: str,
    num_reversed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, h_n) by the shortest way that fits: direct, through autograd, or through the registered operator."""
    arguments = (pre, weight, h0, lengths, offsets, resets, skip, activation, num_reversed, backend)
    if torch.compiler.is_compiling():
        return torch.ops.fused_rin.sweep_forward(*arguments)
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        # vmap, per-sample gradients, forward-mode derivatives: no kernel has them, the reference does.
        return reference.recurrence(
            pre,
            weight,
            h0,
            lengths,
            offsets,
            resets,
            skip=skip,
            activation=activation,
            num_reversed=num_reversed,
        )
    if not (is_plain(pre) and is_plain(weight)) or is_observed():
        return torch.ops.fused_rin.sweep_forward(*arguments)
    if torch.is_grad_enabled() and (pre.requires_grad or weight.requires_grad or (h0 is not None and h0.requires_grad)):
        return Recurrence.apply(*arguments)
    return sweep_forward(*arguments)
