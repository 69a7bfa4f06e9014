"""The recurrence of a contracting network in parallel over time: chunks of the sequence run side by side.

A chunk needs the state that it starts from. A contracting network forgets where it started, so a short warm-up over the
steps before the chunk, from a state of zeros, gives it nearly; and backward, a warm-up over the steps behind the chunk
gives the gradient that comes from there. Whether it does is seen when the chunks have run: what one ended with is what
the next one should have started with. Where they differ by more than was asked for, the chunks run once more from what
is known now (as the relaxation of Lelarasmee et al. 1982, doi 10.1109/TCAD.1982.1270004, does with its windows), and at
last the steps run one after the other.

All of it is calls of `recurrence` whose batch rows are chunks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rin import checkpoint, ops, watchers
from fused_rin.functional import check_tensor, recurrence
from fused_rin.problem import check_lengths, check_resets
from fused_rin.watchers import DIRECT


def parallel_recurrence(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    chunks: int,
    tolerance: float = 1e-5,
    warm_up: int | None = None,
    max_sweeps: int = 2,
    skip: float | Tensor = 1.0,
    activation: str = "relu",
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
    form: str = "inside",
    gain: float | Tensor = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`recurrence`, up to a tolerance, in T / chunks + warm_up sequential steps: for networks that forget their state.

    That is a leaky network, or a plain one whose weights are small; a trained RIN remembers, and gains nothing. The
    work becomes a little more, and a batch `chunks` times as large does it. docs/parallel-in-time.md says where that
    is faster, and how much.

    Args:
        chunks: how many, at least 1; no more than there are steps are made.
        tolerance: how far the state that a chunk starts from may be from the one that the chunk before ended with, as a
            share of the largest state; the gradients that cross from chunk to chunk likewise. Errors within a chunk are
            no larger, as long as the network contracts. In 16 bits not below what the type can tell, its eps.
        warm_up: steps that a chunk runs before its own ones, to find its first state; a quarter of a chunk if None.
        max_sweeps: how often all chunks run at most, until their states fit, and in backward their gradients. Where
            they do not, the steps run one after the other, with an exact result and a RuntimeWarning.

    Under a compiler, a tracer or a transform of functorch the steps run one after the other; so do those of one chunk.
    The other arguments, the result and what is raised are those of `recurrence`. pre is [T, B, G, D]; the recurrence
    runs forward in time. Second derivatives are those of `recurrence`, step by step.

    Raises:
        TypeError, ValueError: chunks, warm_up, max_sweeps or tolerance of a wrong type or out of range.
    """
    for name, value, least in (("chunks", chunks, 1), ("max_sweeps", max_sweeps, 1), ("warm_up", warm_up or 0, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"tolerance must be positive and finite, got {tolerance}")
    rest: dict[str, Any] = {"activation": activation, "backend": backend, "form": form}
    watched = watchers.way(pre, weight, h0, lengths if isinstance(lengths, Tensor) else None, resets) is not DIRECT
    # Nothing to divide, or nothing that could be.
    if watched or pre.dim() != 4 or min(chunks, pre.shape[0]) < 2 or not pre.numel():
        return recurrence(pre, weight, h0, skip=skip, gain=gain, noise=noise, lengths=lengths, resets=resets, **rest)
    steps, batch = pre.shape[:2]
    recurrence(  # of no steps: says what is wrong
        pre[:0], weight, h0, skip=skip, gain=gain, noise=None if noise is None else noise[:0], **rest
    )
    if noise is not None:
        check_tensor("noise", noise, tuple(pre.shape), pre)
    if resets is not None:
        check_resets(resets, (steps, batch), pre.device, "pre")
    if lengths is not None:
        lengths = check_lengths(lengths, steps, batch, pre.device)
    length = -(-steps // chunks)
    warm_up = -(-length // 4) if warm_up is None else min(warm_up, length)
    call = _Call(-(-steps // length), length, warm_up, tolerance, max_sweeps, lengths, resets, rest)
    return _Chunks.apply(call, pre, weight, h0, skip, gain, noise)


class _Call(NamedTuple):
    """What has no gradient."""

    chunks: int
    length: int  # steps of a chunk; the last one may have fewer
    warm_up: int
    tolerance: float
    max_sweeps: int
    lengths: Tensor | None  # [B]
    resets: Tensor | None  # [T, B]
    rest: dict[str, Any]  # of `recurrence`

    def rows(self, tensor: Tensor | None) -> Tensor | None:
        """[T, B, ...] -> [length, chunks * B, ...]; the last rows are filled up with zeros."""
        if tensor is None:
            return None
        if missing := self.chunks * self.length - tensor.shape[0]:
            tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        return tensor.unflatten(0, (self.chunks, self.length)).transpose(0, 1).flatten(1, 2)

    def in_time(self, rows: Tensor, steps: int) -> Tensor:
        """The reverse of `rows`."""
        return rows.unflatten(1, (self.chunks, -1)).transpose(0, 1).flatten(0, 1)[:steps]

    def do_not_fit(self, what: str, gap: float) -> None:
        warnings.warn(
            f"parallel_recurrence: after {self.max_sweeps} sweeps of {self.chunks} chunks {what} still differ by "
            f"{gap:.2g} of the largest where two of them meet, the tolerance is {self.tolerance:.2g}; the steps ran "
            "one after the other",
            RuntimeWarning,
            stacklevel=2,
        )


class _Tensors(NamedTuple):
    """What may have a gradient."""

    pre: Tensor
    weight: Tensor
    h0: Tensor | None
    skip: float | Tensor
    gain: float | Tensor
    noise: Tensor | None

    def run(self, call: _Call, lengths: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        return recurrence(
            self.pre, self.weight, self.h0, skip=self.skip, gain=self.gain,
            noise=self.noise, lengths=lengths, resets=resets, **call.rest,
        )  # fmt: skip


class _Rows:
    """The chunks as rows of a batch."""

    def __init__(self, call: _Call, whole: _Tensors):
        self.call, (self.steps, self.batch) = call, whole.pre.shape[:2]
        pre, noise, self.resets = (call.rows(t) for t in (whole.pre, whole.noise, call.resets))
        assert pre is not None
        self.tensors = whole._replace(pre=pre, noise=noise)
        self.lengths = self.ends = None
        device = whole.pre.device
        # Of chunks' states, [chunks * B, G, D]: all but the first, and all but the last.
        self.later, self.earlier = slice(self.batch, None), slice(None, -self.batch)
        # Whether a state crosses from one row into the next.
        self.follows = torch.ones((call.chunks - 1) * self.batch, 1, 1, dtype=torch.bool, device=device)
        if call.lengths is not None or self.steps < call.chunks * call.length:
            lengths = torch.full((self.batch,), self.steps, device=device) if call.lengths is None else call.lengths
            begins = call.length * torch.arange(call.chunks, device=device)
            self.lengths = (lengths - begins[:, None]).clamp(0, call.length).flatten()
            self.follows = self.lengths[self.later, None, None] > 0
            last = (lengths - 1).clamp_min(0) // call.length
            self.ends = last * self.batch + torch.arange(self.batch, device=device)  # the rows with the last steps
        if self.resets is not None:
            self.follows = self.follows & ~self.resets[0, self.later, None, None]

    def run(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.tensors._replace(h0=states).run(self.call, self.lengths, self.resets)

    def run_part(self, first: int, steps: int, rows: slice, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """So many steps of some rows."""
        here = slice(first, first + steps)
        pre, noise, resets = (
            None if t is None else t[here, rows] for t in (self.tensors.pre, self.tensors.noise, self.resets)
        )
        lengths = None if self.lengths is None else (self.lengths[rows] - first).clamp(0, steps)
        return self.tensors._replace(pre=pre, noise=noise, h0=states).run(self.call, lengths, resets)  # type: ignore[arg-type]

    def gap(self, found: Tensor, used: Tensor, largest: Tensor) -> float:
        """How far neighbours are from fitting, as a share of the largest; NaN if anything is."""
        apart = torch.where(self.follows, (found - used).abs(), 0)
        return (apart.amax() / largest.clamp_min(torch.finfo(largest.dtype).tiny)).item() if apart.numel() else 0.0


class _Graph(NamedTuple):
    """A call with its graph: of the chunks, or of all steps in turn."""

    whole: _Tensors
    out: Tensor
    h_n: Tensor
    rows: _Rows | None = None
    states: Tensor | None = None  # of the chunks, first ones and last ones
    end: Tensor | None = None


def _run(call: _Call, whole: _Tensors) -> _Graph:
    """Where the states of the chunks do not fit, all steps in turn."""
    rows = _Rows(call, whole)
    pre, h0, batch = whole.pre, whole.h0, rows.batch
    with torch.no_grad():
        states = pre.new_zeros(call.chunks * batch, *pre.shape[2:])
        if h0 is not None:
            states[:batch] = h0
        if call.warm_up:
            _, warm = rows.run_part(call.length - call.warm_up, call.warm_up, rows.earlier, None)
            states[rows.later] = warm
    gap = 0.0
    for _ in range(call.max_sweeps):
        states = states.detach().requires_grad_(torch.is_grad_enabled())
        out, end = rows.run(states)
        with torch.no_grad():
            gap = rows.gap(end[rows.earlier], states[rows.later], out.abs().amax())
        if gap <= call.tolerance:
            return _Graph(whole, call.in_time(out, rows.steps), _last(rows, end), rows, states, end)
        states = torch.cat([states[:batch], end[rows.earlier]])
    call.do_not_fit("the states", gap)
    return _in_turn(call, whole)


def _in_turn(call: _Call, whole: _Tensors) -> _Graph:
    return _Graph(whole, *whole.run(call, call.lengths, call.resets))


def _last(rows: _Rows, end: Tensor) -> Tensor:
    """h_n from the states that the chunks end with."""
    if rows.ends is None:
        return end[-rows.batch :]
    return end[rows.ends]


def _gradients(
    call: _Call, graph: _Graph, wanted: Sequence[Tensor], grad_out: Tensor | None, grad_h_n: Tensor | None
) -> Sequence[Tensor | None]:
    """Of what is `wanted`. Where the chunks' gradients do not fit, once more through all steps in turn."""
    outer = [(graph.out, grad_out), (graph.h_n, grad_h_n)]
    if graph.rows is None:
        return _grad(outer, wanted)
    rows, states, end = graph.rows, graph.states, graph.end
    assert states is not None
    assert end is not None
    largest = torch.stack([g.abs().amax() for _, g in outer if g is not None and g.numel()]).amax()
    gap, carried = 0.0, _warm_up_back(call, rows, states, grad_out, grad_h_n)
    for _ in range(call.max_sweeps):
        # What follows a chunk gives a gradient to the state that it ends with.
        entering = torch.cat([carried, torch.zeros_like(states[: rows.batch])])
        *found, of_states = _grad([*outer, (end, entering)], [*wanted, states])
        assert of_states is not None
        gap = rows.gap(of_states[rows.later], carried, largest)
        if gap <= call.tolerance:
            return [of_states[: rows.batch] if t is graph.whole.h0 else g for t, g in zip(wanted, found, strict=True)]
        carried = torch.where(rows.follows, of_states[rows.later], 0)
    call.do_not_fit("the gradients", gap)
    with torch.enable_grad():
        graph = _in_turn(call, graph.whole)
    return _grad([(graph.out, grad_out), (graph.h_n, grad_h_n)], wanted)


def _grad(pairs: Sequence[tuple[Tensor, Tensor | None]], wanted: Sequence[Tensor]) -> Sequence[Tensor | None]:
    outputs, grads = zip(*[(t, g) for t, g in pairs if g is not None and t.requires_grad], strict=True)
    return torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True)


def _warm_up_back(call: _Call, rows: _Rows, states: Tensor, grad_out: Tensor | None, grad_h_n: Tensor | None) -> Tensor:
    """The gradients of the later chunks' first states, by their first steps alone."""
    first, steps = states.detach()[rows.later].requires_grad_(), call.warm_up
    if not steps:
        return torch.zeros_like(first)
    with torch.enable_grad():
        out, end = rows.run_part(0, steps, rows.later, first)
    pairs = []
    if grad_out is not None:
        grad = call.rows(grad_out)
        assert grad is not None
        pairs.append((out, grad[:steps, rows.later]))
    if grad_h_n is not None:  # of sequences that end within these steps
        at_ends = torch.zeros_like(states)
        if rows.ends is None:
            at_ends[-rows.batch :] = grad_h_n
        else:
            at_ends[rows.ends] = grad_h_n
        at_ends = at_ends[rows.later]
        if rows.lengths is not None:
            at_ends.masked_fill_(rows.lengths[rows.later, None, None] > steps, 0)
        if rows.lengths is not None or steps == call.length:
            pairs.append((end, at_ends))
    if not pairs:
        return torch.zeros_like(first)
    (carried,) = _grad(pairs, [first])
    assert carried is not None
    return torch.where(rows.follows, carried, 0)


class _Chunks(torch.autograd.Function):
    """Keeps the graph of the call that gave the result, and in its backward finds what to give to the chunks' ends."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[1:]
        with torch.set_grad_enabled(any(needs)):
            pairs = zip(tensors, needs, strict=True)
            whole = _Tensors(*(t.detach().requires_grad_(n) if isinstance(t, Tensor) else t for t, n in pairs))
            graph = _run(call, whole)
        if any(needs):
            ctx.call, ctx.graph, ctx.numbers = call, graph, [None if isinstance(t, Tensor) else t for t in tensors]
            ops.keep(ctx, tuple(t if isinstance(t, Tensor) else None for t in tensors))
        return graph.out.detach(), graph.h_n.detach()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        if grad_out is None and grad_h_n is None:
            return (None,) * (1 + len(needs))
        if watchers.way_back(grad_out, grad_h_n) is not DIRECT:  # to be differentiated again, or watched by somebody

            def run(*tensors: Any) -> tuple[Tensor, Tensor]:
                given = [n if t is None else t for t, n in zip(tensors, ctx.numbers, strict=True)]
                return _Tensors(*given).run(call, call.lengths, call.resets)

            return None, *checkpoint.gradients_of(run, ops.restored(ctx), (grad_out, grad_h_n), needs)
        wanted = [t for t, need in zip(ctx.graph.whole, needs, strict=True) if need]
        found = iter(_gradients(call, ctx.graph, wanted, grad_out, grad_h_n))
        return None, *(next(found) if need else None for need in needs)
