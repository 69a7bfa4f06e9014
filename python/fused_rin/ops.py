"""The two sweeps as registered operators, and the autograd function over them.

`torch.ops.fused_rin.sweep_forward` and `sweep_backward` carry fake kernels, so compilers and exporters see opaque
operators of known shape and no data pointer is asked of a fake tensor. In eager mode the operators are passed by:
the dispatcher costs about 6 us a call, the direct call 1.4. Which way a call takes, watchers.py decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rin import backends, gradients, library, profiling, reference, watchers
from fused_rin.problem import Rows, Rule, check_sweep
from fused_rin.watchers import DIRECT, PLAIN, REFERENCE


def _plain(tensor: Any) -> Any:
    """As a kernel reads it: contiguous, and no view whose numbers are to be read with the other sign."""
    return None if tensor is None else tensor.resolve_neg().contiguous()


def _plain_rows(rows: Rows) -> Rows:
    lengths, offsets, resets = rows
    if lengths is None and resets is None:
        return rows
    return Rows(_plain(lengths), _plain(offsets), _plain(resets))


def sweep_forward(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    backend: str,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """The forward sweep on real tensors: (out, h_n). Shapes as in `reference.forward`; `out` is no view of anything.

    With batch_first, `out` has the shape [B, T, ...] over memory that lies time after time: handing out a transpose
    would make a view of it, and views refuse detach_().
    """
    chosen, _ = backends.select(backend, pre.device, pre.dtype, weight.shape[-1], rows.sizes(pre)[1], rule.activation)
    out = None
    if batch_first:
        steps, batch, width = pre.shape
        out = pre.new_empty_strided((batch, steps, width), (width, batch * width, 1))
    elif chosen is reference and pre.dim() < (4 if rows.offsets is None else 3):
        out = torch.empty_like(pre, memory_format=torch.contiguous_format)
    states, h_n = chosen.forward(
        _plain(pre), _plain(weight), _plain(h0), _plain_rows(rows), rule,
        out=out.transpose(0, 1) if batch_first and out is not None else out,
    )  # fmt: skip
    return states if out is None else out, h_n


def sweep_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    weight: Tensor,
    out: Tensor,
    rows: Rows,
    rule: Rule,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The backward sweep on real tensors: gradients of pre and h0. Shapes as in `reference.backward`."""
    chosen, _ = backends.select(backend, out.device, out.dtype, weight.shape[-1], rows.sizes(out)[1], rule.activation)
    return chosen.backward(
        _plain(grad_out), _plain(grad_h_n), _plain(weight), _plain(out), _plain_rows(rows), rule
    )  # fmt: skip


# Without the dispatcher, which names its ranges itself.
_direct_forward, _direct_backward = profiling.named(sweep_forward), profiling.named(sweep_backward)


def _forward_operator(pre, weight, h0, lengths, offsets, resets, skip, activation, num_reversed, backend):  # type: ignore[no-untyped-def]
    rows, rule = Rows(lengths, offsets, resets), Rule(skip, activation, num_reversed)
    check_sweep(pre, weight, rows, rule, [("h0", h0, True)], "pre")
    return sweep_forward(pre, weight, h0, rows, rule, backend)


def _backward_operator(  # type: ignore[no-untyped-def]
    grad_out, grad_h_n, weight, out, lengths, offsets, resets, skip, activation, num_reversed, backend
):
    rows, rule = Rows(lengths, offsets, resets), Rule(skip, activation, num_reversed)
    check_sweep(out, weight, rows, rule, [("grad_out", grad_out, False), ("grad_h_n", grad_h_n, True)], "out")
    return sweep_backward(grad_out, grad_h_n, weight, out, rows, rule, backend)


library.fragment.impl("sweep_forward", _forward_operator, library.KEY)
library.fragment.impl("sweep_backward", _backward_operator, library.KEY)


def _state_like(states: Tensor, weight: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Tensor:
    _, batch = Rows(lengths, offsets).sizes(states)
    return states.new_empty(batch, *weight.shape[:2])


@torch.library.register_fake("fused_rin::sweep_forward")
def _(pre, weight, h0, lengths, offsets, resets, skip, activation, num_reversed, backend):  # type: ignore[no-untyped-def]
    out = torch.empty_like(pre, memory_format=torch.contiguous_format)
    return out, _state_like(pre, weight, lengths, offsets)


@torch.library.register_fake("fused_rin::sweep_backward")
def _(  # type: ignore[no-untyped-def]
    grad_out, grad_h_n, weight, out, lengths, offsets, resets, skip, activation, num_reversed, backend
):
    grad_pre = torch.empty_like(out, memory_format=torch.contiguous_format)
    return grad_pre, _state_like(out, weight, lengths, offsets)


# For exporters: `run_decompositions()` of a program that was exported with backend="reference" takes this apart into
# PyTorch's own operators, step by step, as it does torch.nn.RNN's, for runtimes that know nothing else. An unknown
# number of steps cannot be taken apart, and stays a `sweep_forward`.
library.fragment.define(
    "reference_sweep(Tensor pre, Tensor weight, Tensor? h0, Tensor? lengths, Tensor? offsets, Tensor? resets, "
    "float skip, str activation, int num_reversed) -> (Tensor, Tensor)"
)


def _reference_operator(pre, weight, h0, lengths, offsets, resets, skip, activation, num_reversed):  # type: ignore[no-untyped-def]
    rows, rule = Rows(lengths, offsets, resets), Rule(skip, activation, num_reversed)
    if isinstance(rows.sizes(pre)[0], torch.SymInt):
        return torch.ops.fused_rin.sweep_forward(pre, weight, h0, *rows, *rule, "reference")
    return reference.forward(pre, weight, h0, rows, rule)


library.fragment.impl("reference_sweep", _reference_operator, "CompositeImplicitAutograd")
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 has none


# ---- autograd ----


# Whether there are some, with torch >= 2.7; before, as if there were.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def keep(ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
    """Saves tensors for backward, for `restored`."""
    ctx.save_for_backward(*tensors)
    # Without hooks they come back as they are; to remember and to compare what they were takes 3 us.
    ctx.kinds = [None if t is None else (t.dtype, t.shape) for t in tensors] if _saved_tensors_hooks(True) else None
    ctx.set_materialize_grads(False)


def restored(ctx: Any) -> Sequence[Tensor | None]:
    """What was kept for backward, as it was kept.

    Hooks (torch.autograd.graph.saved_tensors_hooks: offloading, compression) may hand back other strides, which kernels
    read through `contiguous`, a negated view, and another floating point dtype, which are converted. Raises
    RuntimeError for what cannot be what was saved.
    """
    tensors = ctx.saved_tensors
    if ctx.kinds is None:
        return tensors
    for t, kind in zip(tensors, ctx.kinds, strict=True):
        if t is not None and (t.dtype is not kind[0] or t.shape != kind[1] or type(t) not in PLAIN or t.is_neg()):
            return [None if t is None else _as_saved(t, *kind) for t, kind in zip(tensors, ctx.kinds, strict=True)]
    return tensors


def _as_saved(tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return tensor  # no numbers yet
    if tensor.shape != shape or (tensor.dtype != dtype and not tensor.is_floating_point()):
        raise RuntimeError(
            f"a tensor saved for backward came back from saved_tensors_hooks with shape {tuple(tensor.shape)} and "
            f"dtype {tensor.dtype}, expected {tuple(shape)} and {dtype}"
        )
    return tensor.to(dtype).resolve_neg()


def backward(
    grad_out: Tensor | None, grad_h_n: Tensor | None, weight: Tensor, out: Tensor, rows: Rows, rule: Rule, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of pre and of h0, by the way that fits whoever looks."""
    way = watchers.way_back(grad_out, grad_h_n, out)
    if way is REFERENCE:
        # A graph of this backward depends on pre through `out`, which is part of it. Batched gradients are no tensors
        # that a kernel could read.
        return reference.backward(grad_out, grad_h_n, weight, out, rows, rule)
    if way is DIRECT:
        return _direct_backward(grad_out, grad_h_n, weight, out, rows, rule, backend)
    profiling.count_sweeps()
    return torch.ops.fused_rin.sweep_backward(grad_out, grad_h_n, weight, out, *rows, *rule, backend)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of pre, weight and h0."""
    weight, h0, out, *rest = restored(ctx)
    if grad_out is None and grad_h_n is None:
        return None, None, None
    rule, backend, batch_first = ctx.constants
    rows, needs = Rows(*rest), ctx.needs_input_grad
    assert weight is not None
    assert out is not None
    if batch_first:
        out, grad_out = out.transpose(0, 1), None if grad_out is None else grad_out.transpose(0, 1)
    grad_pre, grad_h0 = backward(grad_out, grad_h_n, weight, out, rows, rule, backend)
    grad_weight = None
    if needs[1]:
        groups, hidden = weight.shape[:2]
        split = (*out.shape[: 2 if rows.offsets is None else 1], groups, hidden)
        shaped = grad_pre.view(split), out.reshape(split)
        grad_weight = gradients.weight_gradient(*shaped, h0, rows, rule.num_reversed)
    return grad_pre if needs[0] else None, grad_weight, grad_h0 if needs[2] else None


class Recurrence(torch.autograd.Function):
    """The recurrence with its gradient; keeps the output and nothing else for backward.

    The backward is differentiable again: asked for a graph, it is computed by the reference.
    """

    # The context is an argument of forward: with a setup_context of its own, torch inspects forward's signature at
    # every call, for some 50 us. Transforms that need it never come here (see watchers.py).
    # One object for all that needs no gradient: `apply` looks at every argument, for 0.5 us each.
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, weight: Tensor, h0: Tensor | None, rest: tuple[Rows, Rule, str, bool]
    ) -> tuple[Tensor, Tensor]:
        rows, *ctx.constants = rest
        out, h_n = _direct_forward(pre, weight, h0, *rest)
        keep(ctx, (weight, h0, out, *rows))
        return out, h_n

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad_out, grad_h_n), None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, h0, lengths, offsets, resets, skip, activation, num_reversed, backend = inputs
    ctx.constants = Rule(skip, activation, num_reversed), backend, False
    keep(ctx, (weight, h0, output[0], lengths, offsets, resets))


# The operator itself is differentiable too: for compilers (torch.export of torch 2.6 cannot take an autograd.Function
# over dynamic sizes), for tracers, and so that an exported program can be trained on.
torch.library.register_autograd(
    "fused_rin::sweep_forward",
    lambda ctx, grad_out, grad_h_n: (*_gradients(ctx, grad_out, grad_h_n), *(None,) * 7),
    setup_context=_setup_context,
)


def recurrence(
    pre: Tensor, weight: Tensor, h0: Tensor | None, rows: Rows, rule: Rule, backend: str, batch_first: bool = False
) -> tuple[Tensor, Tensor]:
    """(out, h_n) on checked arguments: direct, through autograd, through the registered operator or the reference.

    pre [T, B, G, D] or [T, B, G * D] (or [rows, ...] of a packed batch); batch_first, for pre [T, B, G * D], gives out
    as [B, T, G * D].
    """
    way = watchers.way(pre, weight, h0, *rows)
    if way is DIRECT:
        if torch.is_grad_enabled() and (
            pre.requires_grad or weight.requires_grad or (h0 is not None and h0.requires_grad)
        ):
            return Recurrence.apply(pre, weight, h0, (rows, rule, backend, batch_first))
        return _direct_forward(pre, weight, h0, rows, rule, backend, batch_first)
    if way is REFERENCE or watchers.exporting_to_onnx():
        out, h_n = reference.forward(pre, weight, h0, rows, rule)
    elif backend == "reference" and _is_exporting():
        out, h_n = torch.ops.fused_rin.reference_sweep(pre, weight, h0, *rows, *rule)
    else:
        profiling.count_sweeps()
        out, h_n = torch.ops.fused_rin.sweep_forward(pre, weight, h0, *rows, *rule, backend)
    return out.transpose(0, 1) if batch_first else out, h_n
