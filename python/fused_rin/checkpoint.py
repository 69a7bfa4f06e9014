"""Long sequences in little memory: a layer keeps every k-th state, and its backward computes the others once more.

On a CPU, where a layer of one recurrence is one native call (layer.py), it becomes a call for each span of steps. A
state crosses from one to the next as it is carried, unrounded, and the sums of the weight gradients live on from call
to call, so that nothing of it shows in a result: outputs and gradients have the bits that they have without. For that a
span ends where the backward sweep has a chunk behind it (csrc/cpu/spans.cpp), a little later than it was asked to.

Elsewhere each span is a function of its own that is computed again for its gradients. In 16 bits the state is then
rounded between two of them, and gradients are added up in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fused_rin import backends, cpu, cpu_layers, layer, ops, watchers
from fused_rin.problem import ALL_ROWS, Rows, Rule, Units, Weights, sum_dtype
from fused_rin.watchers import DIRECT

AUTO_BYTES = 32 << 20  # states of a layer that "auto" keeps as ever


def check_steps(value: int | str | None) -> int | str | None:
    """`checkpoint_steps` as given; TypeError or ValueError unless it is None, "auto" or a positive integer."""
    if value is None or value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"checkpoint_steps must be an int, 'auto' or None, got {value!r}")
    if value < 1:
        raise ValueError(f"checkpoint_steps must be at least 1, got {value}")
    return value


def span_steps(asked: int | str | None, steps: int, states: int, dtype: torch.dtype) -> int | None:
    """Steps from one kept state to the next in a layer of `states` numbers in all, or None: all are kept.

    "auto" is the square root of the steps, which makes what is kept and what is computed at a time equally large.
    """
    if asked == "auto":
        asked = math.isqrt(steps) if states * dtype.itemsize > AUTO_BYTES else None
    return cast("int | None", asked if asked is None or int(asked) < steps else None)


class Span(NamedTuple):
    """Some steps: where their rows lie, on the first axis of x and of the states, and which run."""

    place: slice
    rows: Rows
    cut: Tensor | None  # [B, 1, 1], where an episode starts between this span and the one before, if rows do not say it

    def of(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[self.place].contiguous()


def spans(ends: Sequence[int], x: Tensor, rows: Rows, is_reversed: bool) -> list[Span]:
    """Spans that end at these steps, in the order in which the recurrence runs through them."""
    begins = [0, *ends[:-1]]
    firsts = [*begins, ends[-1]]  # of rows
    if rows.offsets is not None:
        firsts = [*rows.offsets[torch.tensor(begins, device=rows.offsets.device)].tolist(), x.shape[0]]
    made = [
        _span(begin, end, slice(firsts[i], firsts[i + 1]), x, rows, is_reversed)
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    return made[::-1] if is_reversed else made


def _span(begin: int, end: int, place: slice, x: Tensor, rows: Rows, is_reversed: bool) -> Span:
    if rows is ALL_ROWS:
        return Span(place, rows, None)
    lengths, offsets, resets = rows
    steps, batch = rows.sizes(x)
    # Kernels clamp lengths; clamped here, longer sequences would lie among shorter ones.
    own = Rows(
        None if lengths is None else lengths - begin,
        None if offsets is None else offsets[begin:end] - place.start,
        None if resets is None else resets[place],
    )
    cut = None
    if resets is not None and is_reversed and end < steps:
        after = batch if offsets is None or lengths is None else int((lengths > end).sum())
        cut = resets.new_zeros(batch)
        cut[:after] = resets[end] if offsets is None else resets[place.stop : place.stop + after]
        if lengths is not None:
            cut &= lengths > end
        cut = cut.view(batch, 1, 1)
    return Span(place, own, cut)


class _Layer(NamedTuple):
    """A layer's call beside its tensors; see `layer.forward`."""

    rows: Rows
    rule: Rule
    batch_first: bool
    form: str | None
    noise: Tensor | None
    added: Tensor | None
    least: int  # steps of a span
    wants_output: bool

    def units(self, skip: Tensor | None, gain: Tensor | None, span: Span | None = None) -> Units | None:
        if self.form is None or skip is None:
            return None
        return Units(self.form, skip, gain, None if span is None else span.of(self.noise))

    def whole(self, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh, h0, skip, gain = rest
        units = None if self.form is None else Units(self.form, skip, gain, self.noise)  # type: ignore[arg-type]
        return layer.forward(
            x, Weights(w_ih, w_hh, b_ih, b_hh), h0, self.rows, self.rule, 1, "auto", self.batch_first, units=units,  # type: ignore[arg-type]
            added=self.added,
        )  # fmt: skip

    def spans(self, x: Tensor) -> list[Span]:
        """x: [T, B, I], or [rows, I] of a packed batch."""
        steps, batch = self.rows.sizes(x)
        ends = cpu_layers.spans(steps, batch, self.rows, self.rule.num_reversed, self.least)
        if not self.rule.num_reversed:  # the backward sweep goes down from the last step
            ends = [steps - end for end in reversed(ends[:-1])] + [steps]
        return spans(ends, x, self.rows, self.rule.num_reversed > 0)


class _Checkpointed(torch.autograd.Function):
    """As `layer._Layer` and `layer._UnitLayer`, of one recurrence."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        h0: Tensor | None,
        skip: Tensor | None,
        gain: Tensor | None,
        call: _Layer,
    ) -> tuple[Tensor | None, Tensor]:
        out, h_n, kept = _run(x, Weights(w_ih, w_hh, b_ih, b_hh), h0, skip, gain, call)
        ctx.call = call._replace(rows=ALL_ROWS, noise=None, added=None)
        ops.keep(ctx, (x, w_ih, w_hh, b_ih, b_hh, h0, skip, gain, kept, *call.rows, call.noise, call.added))
        return out, h_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if watchers.may_be_passed_by(*grads):
            with watchers.without_function_modes():
                return _backward(ctx, *grads)
        return _backward(ctx, *grads)


def _rows_of(spans: Sequence[Span]) -> int:
    return max(span.place.stop - span.place.start for span in spans)


def _run(
    x: Tensor, weights: Weights, h0: Tensor | None, skip: Tensor | None, gain: Tensor | None, call: _Layer
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Output, or None if it is not wanted, last states [1, B, D], and the states [spans, B, 1, D] that enter spans."""
    width = weights.w_ih.shape[0]
    _, batch = call.rows.sizes(x)
    all_spans = call.spans(x)
    kept = x.new_empty(len(all_spans) + 1, batch, 1, width, dtype=sum_dtype(x.dtype))
    kept[0] = 0 if h0 is None else h0
    out = None
    if call.wants_output and call.batch_first:
        out = x.new_empty_strided((batch, x.shape[0], width), (width, batch * width, 1))
    elif call.wants_output:
        out = x.new_empty(*x.shape[:-1], width)
    if out is None:
        scratch = x.new_empty(_rows_of(all_spans), *x.shape[1:-1], width)
    else:
        states = cpu.advised(out).transpose(0, 1) if call.batch_first else out
    for i, span in enumerate(all_spans):
        place = span.place
        if i and span.cut is not None:
            kept[i].masked_fill_(span.cut, 0)
        cpu_layers.forward_of_span(
            x[place].contiguous(), weights, kept[i] if i or h0 is not None else None, span.rows, call.rule,
            call.units(skip, gain, span), span.of(call.added),
            out=scratch[: place.stop - place.start] if out is None else states[place], state_out=kept[i + 1],
        )  # fmt: skip
    return out, kept[-1].view(1, batch, width).to(x.dtype, copy=True), kept[:-1]


def _backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_h_n is None:
        return (None,) * 9
    x, w_ih, w_hh, b_ih, b_hh, h0, skip, gain, kept, *rest = cast(list[Any], ops.restored(ctx))
    *rows, noise, added = [None if t is None else t.contiguous() for t in rest]
    own_rows = ALL_ROWS if all(t is None for t in rows) else Rows(*rows)
    call = ctx.call._replace(rows=own_rows, noise=noise, added=added)
    weights, needs = Weights(w_ih, w_hh, b_ih, b_hh), ctx.needs_input_grad
    if watchers.way_back(grad_out, grad_h_n) is not DIRECT:
        # To be differentiated again, or watched by somebody: those of the layer as a whole.
        tensors = (x, *weights, h0, skip, gain)
        return *gradients_of(call.whole, tensors, (grad_out, grad_h_n), needs[:8]), None
    weights = Weights(*[None if w is None else w.contiguous() for w in weights])  # type: ignore[arg-type]
    skip, gain = (None if t is None else t.contiguous() for t in (skip, gain))
    kept = kept.contiguous()
    if grad_out is not None and call.batch_first:
        grad_out = grad_out.transpose(0, 1)
    all_spans, last = call.spans(x), len(kept) - 1
    scratch = x.new_empty(2 if call.form == "outside" else 1, _rows_of(all_spans), *x.shape[1:-1], w_ih.shape[0])
    grad_x = cpu.advised(x.new_empty(x.shape)) if needs[0] else None
    biases, grads = needs[3] or needs[4], cast(list[Tensor | None], [None] * 6)
    if needs[1] or needs[2] or biases:
        grads[:2] = torch.empty_like(weights.w_ih), torch.empty_like(weights.w_hh)
    if biases:
        grads[2:4] = w_ih.new_empty(w_ih.shape[0]), w_ih.new_empty(w_ih.shape[0])
    of_units = zip((skip, gain), needs[6:8], strict=True)
    grads[4:] = (torch.empty_like(t) if need and t is not None else None for t, need in of_units)
    grad_state = None
    if grad_h_n is not None:  # written to
        grad_state = grad_h_n.reshape(kept.shape[1:]).to(kept.dtype).clone(memory_format=torch.contiguous_format)
    sums, other = cpu_layers.Sums(w_ih, kept.dtype), torch.empty_like(kept[0])
    for i in range(last, -1, -1):
        span, units = all_spans[i], call.units(skip, gain, all_spans[i])
        state = kept[i] if i or h0 is not None else None
        x_here, place = x[span.place].contiguous(), span.place
        out, *values = scratch[:, : place.stop - place.start]
        aside = values[0] if values else None
        cpu_layers.forward_of_span(
            x_here, weights, state, span.rows, call.rule, units, span.of(added), out=out, aside=aside
        )  # fmt: skip
        cpu_layers.backward_of_span(
            span.of(grad_out), grad_state, x_here, weights.w_ih, weights.w_hh,
            None if state is None else state.to(x.dtype), out, span.rows, call.rule,
            None if units is None else units._replace(noise=None), aside,
            None if grad_x is None else grad_x[place], grads, other, sums, continues=i < last, goes_on=i > 0,
        )  # fmt: skip
        grad_state, other = other, torch.empty_like(other) if grad_state is None else grad_state
        if i and span.cut is not None:
            grad_state.masked_fill_(span.cut, 0)
    grad_h0 = grad_state.to(x.dtype) if needs[5] and grad_state is not None else None
    return grad_x, *grads[:4], grad_h0, *grads[4:], None


def forward(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    groups: int,
    backend: str,
    batch_first: bool,
    u_name: str,
    units: Units | None,
    added: Tensor | None,
    least: int,
    wants_output: bool,
) -> tuple[Tensor | None, Tensor]:
    """As `layer.forward`, a state kept every `least` steps; without `wants_output` None is returned in its place."""
    name = backends.requested(backend)
    if groups == 1 and layer.is_fused(x, weights, h0, rows, groups, name, units, added):
        plain = Weights(*[None if w is None else w.contiguous() for w in weights])  # type: ignore[arg-type]
        rows = rows if rows is ALL_ROWS else Rows(*[None if t is None else t.contiguous() for t in rows])
        form, skip, gain, noise = (None,) * 4 if units is None else units
        skip, gain, h0 = (None if t is None else t.contiguous() for t in (skip, gain, h0))
        call = _Layer(rows, rule, batch_first, form, noise, added, least, wants_output)
        tensors = (x, *plain, h0, skip, gain)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return cast("tuple[Tensor | None, Tensor]", _Checkpointed.apply(*tensors, call))
        return _run(x, plain, h0, skip, gain, call)[:2]
    return _span_by_span(
        x, weights, h0, rows, rule, groups, backend, batch_first, u_name, units, added, least, wants_output
    )


def _span_by_span(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    groups: int,
    backend: str,
    batch_first: bool,
    u_name: str,
    units: Units | None,
    added: Tensor | None,
    least: int,
    wants_output: bool,
) -> tuple[Tensor | None, Tensor]:
    """On any backend, a direction at a time."""
    if 0 < rule.num_reversed < groups:
        return _both_directions(
            x, weights, h0, rows, rule, groups, backend, batch_first, u_name, units, added, least, wants_output
        )
    layer.check_weights(weights, x.shape[-1], groups, x.device, u_name)
    steps, batch = rows.sizes(x)
    all_spans = spans([*range(least, steps, least), steps], x, rows, rule.num_reversed > 0)
    form, skip, gain, noise = (None,) * 4 if units is None else units

    def run(span: Span, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, w_ih, w_hh, b_ih, b_hh, h0, skip, gain, noise, added = tensors
        own = None if form is None else Units(form, skip, gain, noise)  # type: ignore[arg-type]
        lengths = None if span.rows.lengths is None else span.rows.lengths.clamp(0, span.rows.sizes(x)[0])  # type: ignore[arg-type]
        return layer.forward(
            x, Weights(w_ih, w_hh, b_ih, b_hh), h0, span.rows._replace(lengths=lengths), rule, groups, backend, False,  # type: ignore[arg-type]
            u_name, own, added,
        )  # fmt: skip

    # In one operation, whose gradient is one, too.
    sizes = [span.place.stop - span.place.start for span in (all_spans[::-1] if rule.num_reversed else all_spans)]
    order = slice(None, None, -1) if rule.num_reversed else slice(None)
    per_step = [[None] * len(sizes) if t is None else t.split(sizes)[order] for t in (x, noise, added)]
    outs: list[Tensor | None] = []
    state, h_n = h0, x
    for span, x_here, noise_here, added_here in zip(all_spans, *per_step, strict=True):
        if state is not None and span.cut is not None and outs:
            state = state.masked_fill(span.cut, 0)
        tensors = (x_here, *weights, state, skip, gain, noise_here, added_here)
        out, h_n = cast("tuple[Tensor, Tensor]", _Again.apply(partial(run, span), *tensors))
        state = h_n.view(batch, groups, weights.w_hh.shape[1])
        outs.append(out if wants_output else None)
    if not wants_output:
        return None, h_n
    outs = [o if not batch_first or o is None else o.transpose(0, 1) for o in outs[order]]
    return torch.cat(cast("list[Tensor]", outs), 1 if batch_first else 0), h_n


class _Again(torch.autograd.Function):
    """A function of tensors that keeps them alone, and is computed again for its gradients.

    torch.utils.checkpoint asks that the same tensors be saved both times; who watches the first one (a mode, a
    compiler: another way, watchers.py) need not watch the second.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.run, ctx.device = run, next(t for t in tensors if t is not None).device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ops.keep(ctx, tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        enabled, dtype = ctx.autocast
        with torch.autocast(ctx.device, dtype=dtype, enabled=enabled, cache_enabled=False):
            found = gradients_of(ctx.run, ops.restored(ctx), grads, ctx.needs_input_grad[1:])
        return None, *found


def gradients_of(
    run: Callable[..., tuple[Tensor, Tensor]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Of the `tensors` that need one, given those of the results of `run`; a graph of them if one is asked for."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Not of these themselves, of which one may come from another: bias_hh = bias_ih, say. What a hook on saved
        # tensors handed back has no graph, and if none is asked for, needs none.
        own = [
            t if t is None or not need else t.view_as(t) if again else t.detach().requires_grad_()
            for t, need in zip(tensors, needs, strict=True)
        ]
        pairs = [(r, g) for r, g in zip(run(*own), grads, strict=True) if g is not None and r.requires_grad]
        wanted = [t for t, need in zip(own, needs, strict=True) if need and t is not None]
        if not pairs:
            return [None] * len(own)
        results, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(results, wanted, given, create_graph=again, allow_unused=True))
    return [next(found) if need and t is not None else None for t, need in zip(own, needs, strict=True)]


def _both_directions(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    groups: int,
    backend: str,
    batch_first: bool,
    u_name: str,
    units: Units | None,
    added: Tensor | None,
    least: int,
    wants_output: bool,
) -> tuple[Tensor | None, Tensor]:
    """Each as a layer of its own, since they go through the spans against each other."""
    heads, outs, states = groups // 2, [], []
    width = weights.w_ih.shape[0] // 2
    for number in range(2):
        mine, wide = slice(number * heads, (number + 1) * heads), slice(number * width, (number + 1) * width)
        own = Weights(*[None if w is None else w[wide] for w in weights])  # type: ignore[arg-type]
        part = None
        if units is not None:
            noise = None if units.noise is None else units.noise[..., wide]
            part = Units(units.form, units.skip[mine], None if units.gain is None else units.gain[mine], noise)
        out, h_n = forward(
            x, own, None if h0 is None else h0[:, mine], rows, rule._replace(num_reversed=heads * number), heads,
            backend, batch_first, u_name, part, None if added is None else added[..., wide], least, wants_output,
        )  # fmt: skip
        outs.append(out)
        states.append(h_n)
    out = torch.cat(cast("list[Tensor]", outs), -1) if wants_output else None
    return out, torch.cat(states)


def forward_past_compilers(*arguments: Any) -> tuple[Tensor | None, Tensor]:
    """`forward`, called by compiled code as it is: traced, each span would be a piece of the graph."""
    return torch.compiler.disable(forward)(*arguments)  # not at import: it loads a compiler, for seconds
