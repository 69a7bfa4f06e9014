"""Layers of a GPU side by side, as a wavefront: each is a span of steps behind the one below it.

A recurrence of a few rows leaves most of a GPU idle, and a layer needs no more of the one below than the steps that it
is about to take. So all steps are cut into spans, and while a layer runs through one, the layer above it runs through
the span before; backward the other way round:

    stream of layer 0    span 0   span 1   span 2   span 3
    of layer 1                    span 0   span 1   span 2   span 3
    of layer 2                             span 0   span 1   span 2   span 3

What a span is: the product with W of these steps (torch's), which goes where the states will lie, and the sweep over
it, in place. A state crosses from one span to the next as it is carried, unrounded (`carried_in` in csrc/problem.h), so
the sweeps have the bits that they have over all steps at once. Gradients of the weights are sums over all steps, made
when all sweeps are done.

Whether it gains anything, `choose` says by the planner's model of a step, and by what it takes to start a sweep and,
without a CUDA graph, to call one. Neither has been measured: START and CALL are assumptions.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fused_rin import backends, checkpoint, cuda_plan, gradients, layer, ops, profiling, settings, watchers
from fused_rin.device import Device, NoPlan, aligned, allow_tf32
from fused_rin.problem import ALL_ROWS, Rows, Rule, States, Weights
from fused_rin.recurrent import Recurrent
from fused_rin.watchers import DIRECT

START = 8.0  # microseconds from the launch of a sweep to its first step: the launch, and the load of U
CALL = 30.0  # microseconds of the CPU for a span of a layer: a product, a sweep, two events
CLOCK = 1700.0  # cycles in a microsecond
LEAST_STEPS = 16  # of a span
LEAST_GAIN = 1.2  # by the model, for layers not to run in turn


class Wave(NamedTuple):
    """Layers as a wavefront: steps of a span, and how a sweep of one layer is spread over the device."""

    steps: int
    plan: cuda_plan.SweepPlan
    gain: float  # by the model, against layers in turn


@functools.lru_cache(maxsize=1024)
def choose(
    layers: int,
    steps: int,
    batch: int,
    groups: int,
    hidden: int,
    dtype: torch.dtype,
    device: Device,
    allow_tf32: bool = False,
    least_gain: float = LEAST_GAIN,
) -> Wave | None:
    """The wavefront that gains most by the model, or None where layers had better run in turn. Raises NoPlan."""
    alone = cuda_plan.plan(batch, groups, hidden, dtype, device, allow_tf32=allow_tf32)
    together = cuda_plan.spread(alone.kernel, batch, groups * layers, device)
    in_turn = layers * (steps * alone.estimated_cycles / CLOCK + START)

    def takes(count: int) -> float:
        slots = count + layers - 1
        return max(slots * (-(-steps // count) * together.estimated_cycles / CLOCK + START), count * layers * CALL)

    counts = range(2, min(steps // LEAST_STEPS, 64) + 1)
    best = min(counts, key=takes, default=None)
    if best is None or in_turn < least_gain * takes(best):
        return None
    kernel, tiles = together.kernel, together.blocks // together.kernel.ctas // layers
    workspace = min(together.workspace_bytes, tiles * kernel.workspace_bytes)
    return Wave(-(-steps // best), replace(together, workspace_bytes=workspace), in_turn / takes(best))


class Sweeps(Protocol):
    """Runs a span, queued on the current stream: cuda.Spans."""

    def __call__(
        self, in_: Tensor | None, saved: Tensor | None, states: States, weight: Tensor, out: Tensor, rows: Rows,
        rule: Rule, /,
    ) -> None: ...  # fmt: skip


class Lanes(Protocol):
    """Where layers run side by side. What a lane is given it does in turn, lane 0 after all that went before."""

    def __enter__(self) -> Lanes: ...

    def __exit__(self, *_: object) -> None:
        """What is done from now on comes after all that the lanes were given."""

    def run(self, number: int, work: Callable[[], None], after: Any) -> Any:
        """Gives a lane something to do after the mark of another's (lane 0: None); the mark of its end."""


class Streams:
    """Lanes as streams of a GPU, lane 0 the current one."""

    _own = threading.local()  # a capture on one thread's streams is nobody else's

    def __init__(self, count: int, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        kept: dict[int, list[torch.cuda.Stream]] = self._own.__dict__.setdefault("streams", {})
        beside = kept.setdefault(index, [])
        beside += [torch.cuda.Stream(index) for _ in range(count - 1 - len(beside))]
        self._opener, self._beside = torch.cuda.current_stream(index), beside[: count - 1]

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._beside:  # whatever was raised: tensors that they use are about to go
            self._opener.wait_stream(stream)

    def run(self, number: int, work: Callable[[], None], after: torch.cuda.Event | None) -> torch.cuda.Event:
        if not number:
            work()
            return self._opener.record_event()
        stream = self._beside[number - 1]
        assert after is not None
        stream.wait_event(after)
        with torch.cuda.stream(stream):
            work()
        return stream.record_event()


class Call(NamedTuple):
    """A call of all layers beside its tensors."""

    rows: Rows
    rule: Rule
    groups: int
    batch_first: bool
    steps: int  # of a span
    sweeps: Sweeps
    lanes: Callable[[int], Lanes]  # so many
    backend: str  # that runs the layers in turn

    def in_turn(self, x: Tensor, hx: Tensor | None, *flat: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same, layer by layer."""
        last, states = len(flat) // 4 - 1, []
        for number, own in enumerate(_weights(flat)):
            h0 = None if hx is None else hx[number].reshape(-1, self.groups, own.w_hh.shape[1])
            x, h_n = layer.forward(
                x, own, h0, self.rows, self.rule, self.groups, self.backend, self.batch_first and number == last
            )
            states.append(h_n)
        return x, torch.cat(states)

    def spans(self, steps: int) -> list[tuple[slice, Rows]]:
        lengths, _, resets = self.rows
        places = [slice(i, min(i + self.steps, steps)) for i in range(0, steps, self.steps)]
        if self.rows is ALL_ROWS:
            return [(place, ALL_ROWS) for place in places]
        left: list[Tensor | None] = [None] * len(places)
        if lengths is not None:  # kernels clamp them to the steps of the span
            begins = torch.arange(0, steps, self.steps, device=lengths.device)
            left = list((lengths - begins[:, None]).unbind())
        return [
            (place, Rows(own, None, None if resets is None else resets[place]))
            for place, own in zip(places, left, strict=True)
        ]


class _States:
    """Of one layer between its spans: two of each kind, in turn what a span is given and what it leaves."""

    def __init__(self, first: Tensor | None, last: Tensor, spans: int) -> None:
        self.first, self.last, self.spans = first, last, spans
        self.rounded = last.new_empty(2, *last.shape)
        self.carried = last.new_empty(2, *last.shape, dtype=torch.float32) if last.dtype != torch.float32 else None

    def of(self, number: int) -> States:
        """Of the span that is run as the `number`-th."""
        ends, carried = number + 1 == self.spans, self.carried
        return States(
            self.rounded[number % 2] if number else self.first,
            carried[number % 2] if number and carried is not None else None,
            self.last if ends else self.rounded[(number + 1) % 2],
            None if ends or carried is None else carried[(number + 1) % 2],
        )


def _all_states(first: Tensor | None, last: Tensor, groups: int, spans: int) -> list[_States]:
    """Of all layers; first and last [layers, B, G * D]."""
    split = (*last.shape[:2], groups, last.shape[2] // groups)
    given = [None] * len(last) if first is None else aligned(first.contiguous(), 16).view(split)  # type: ignore[union-attr]
    return [_States(f, left, spans) for f, left in zip(given, last.view(split), strict=True)]


def _side_by_side(lanes: Lanes, layers: int, spans: int, work: Callable[[int, int], None]) -> None:
    """work(layer, span) for all of them, as they come in time, each after the same span of the layer before."""
    marks: list[Any] = [None] * layers
    with lanes:
        for moment in range(layers + spans - 1):
            # From the last: it waits for what the one before it did a moment ago.
            for number in range(min(moment, layers - 1), max(-1, moment - spans), -1):
                marks[number] = lanes.run(
                    number, functools.partial(work, number, moment - number), marks[number - 1] if number else None
                )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x W^T + b to `out`, with rows of any number of axes."""
    x, out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _matrix(w_hh: Tensor, groups: int) -> Tensor:
    """U [G, D, D] as a kernel reads it."""
    return aligned(w_hh.contiguous(), 16).view(groups, -1, w_hh.shape[1])  # type: ignore[union-attr]


@profiling.named
def wavefront_forward(
    call: Call, x: Tensor, hx: Tensor | None, weights: Sequence[Weights]
) -> tuple[list[Tensor], Tensor]:
    """States of each layer, [T, B, G * D], and the last ones [layers, B, G * D]; those of the last in call's order."""
    (steps, batch), groups, layers = x.shape[:2], call.groups, len(weights)
    width, hidden = weights[0].w_ih.shape[0], weights[0].w_hh.shape[1]
    outs = [x.new_empty(steps, batch, width) for _ in weights[1:]]
    if call.batch_first:  # over memory that lies time after time, and no view of anything
        last = x.new_empty_strided((batch, steps, width), (width, batch * width, 1))
    else:
        last = x.new_empty(steps, batch, width)
    outs.append(_in_time(last, call.batch_first))
    h_n = x.new_empty(layers, batch, width)
    spans, matrices = call.spans(steps), [_matrix(w.w_hh, groups) for w in weights]
    states = _all_states(hx, h_n, groups, len(spans))
    biases = [layer.bias(w.b_ih, w.b_hh) for w in weights]
    _product(x, weights[0].w_ih, biases[0], outs[0])

    def work(number: int, span: int) -> None:
        place, rows = spans[span]
        out = outs[number][place]
        if number:
            _product(outs[number - 1][place], weights[number].w_ih, biases[number], out)
        out = out.view(*out.shape[:2], groups, hidden)
        call.sweeps(out, None, states[number].of(span), matrices[number], out, rows, call.rule)

    _side_by_side(call.lanes(layers), layers, len(spans), work)
    return [*outs[:-1], last], h_n


@profiling.named
def wavefront_backward(
    call: Call,
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    hx: Tensor | None,
    weights: Sequence[Weights],
    outs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, hx and of each layer's four weights, where they are needed. outs, grad_out: [T, B, G * D]."""
    (steps, batch), groups, layers = x.shape[:2], call.groups, len(weights)
    width = weights[0].w_ih.shape[0]
    split = (steps, batch, groups, width // groups)
    grads = [x.new_empty(steps, batch, width) for _ in weights]  # of pre
    grad_hx = x.new_empty(layers, batch, width)
    spans, matrices = call.spans(steps), [_matrix(w.w_hh, groups) for w in weights]
    states = _all_states(grad_h_n, grad_hx, groups, len(spans))
    grad_out = None if grad_out is None else aligned(grad_out.contiguous(), 16)

    def work(lane: int, number: int) -> None:
        top, (place, rows) = layers - 1 - lane, spans[-1 - number]
        out = grads[top][place]
        if lane:
            _product(grads[top + 1][place], weights[top + 1].w_ih.t(), None, out)
        given = out if lane else None if grad_out is None else grad_out[place]
        here = (-1, *split[1:])
        call.sweeps(
            None if given is None else given.view(here), outs[top][place].view(here), states[top].of(number),
            matrices[top], out.view(here), rows, call.rule,
        )  # fmt: skip

    _side_by_side(call.lanes(layers), layers, len(spans), work)
    found: list[Tensor | None] = [grads[0] @ weights[0].w_ih if needs[0] else None, grad_hx if needs[1] else None]
    first = [None] * layers if hx is None else hx.reshape(layers, *split[1:])
    for i, (w, grad) in enumerate(zip(weights, grads, strict=True)):
        need, below, flat = needs[2 + 4 * i :], outs[i - 1] if i else x, grad.view(-1, width)
        grad_w_hh = bias = None
        if need[1]:
            by_group = grad.view(split), outs[i].view(split)
            grad_w_hh = gradients.weight_gradient(*by_group, first[i], call.rows, 0).view(w.w_hh.shape)
        if need[2] or need[3]:
            bias = flat.sum(0)
        found += [
            flat.t() @ below.reshape(-1, below.shape[-1]) if need[0] else None,
            grad_w_hh,
            bias if need[2] else None,
            bias.clone() if need[3] and bias is not None else None,  # .grad of either may be written to
        ]
    return found


def _weights(flat: Sequence[Any]) -> list[Weights]:
    return [Weights(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


def _in_time(out: Tensor, batch_first: bool) -> Tensor:
    return out.transpose(0, 1) if batch_first else out


class _Wavefront(torch.autograd.Function):
    """All layers; keeps their states. The backward is differentiable again, through the layers in turn."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, hx: Tensor | None, *flat: Tensor | None) -> tuple[Tensor, Tensor]:
        outs, h_n = wavefront_forward(call, x, hx, _weights(flat))
        ctx.call, ctx.all_rows = call._replace(rows=ALL_ROWS), call.rows is ALL_ROWS
        ops.keep(ctx, (x, hx, *flat, *outs, *call.rows))
        return outs[-1], h_n

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if grad_out is None and grad_h_n is None:
            return (None,) * (1 + len(needs))
        saved, count = ops.restored(ctx), len(needs)
        tensors, outs, rows = saved[:count], saved[count:-3], saved[-3:]
        call: Call = ctx.call
        if not ctx.all_rows:
            call = call._replace(rows=Rows(*[None if t is None else t.contiguous() for t in rows]))
        if watchers.way_back(grad_out, grad_h_n) is not DIRECT:  # to be differentiated again, or watched by somebody
            return None, *checkpoint.gradients_of(call.in_turn, tensors, (grad_out, grad_h_n), needs)
        x, hx, *flat = tensors
        assert x is not None
        *below, last = cast("list[Tensor]", outs)
        states = [t.contiguous() for t in (*below, _in_time(last, call.batch_first))]
        if grad_out is not None:
            grad_out = _in_time(grad_out, call.batch_first)
        return None, *wavefront_backward(call, grad_out, grad_h_n, x, hx, _weights(flat), states, needs)


def plan_of(
    module: Recurrent, activation: str, rows: Rows, steps: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Wave | None:
    """The wavefront of a call of a RIN that nobody watches, by its sizes, or None: its layers run in turn."""
    layers, hidden = module.num_layers, module.hidden_size // module.num_heads
    if settings.WAVEFRONT == "off" or layers == 1 or not batch or device.type != "cuda" or rows.offsets is not None:
        return None
    if module.bidirectional or (module.dropout and module.training) or hidden % (16 // dtype.itemsize):
        return None
    if module._span_steps(steps, steps * batch, dtype, module.return_sequences) is not None:  # checkpoints
        return None
    name = backends.requested(module.backend)
    chosen, _ = backends.select(name, device, dtype, hidden, batch, activation)
    if chosen.name != "cuda":
        return None
    from fused_rin import cuda  # not before a GPU is asked about

    try:
        return choose(
            layers, steps, batch, module.num_heads, hidden, dtype, cuda.runnable_device(device), allow_tf32(),
            0.0 if settings.WAVEFRONT == "on" else LEAST_GAIN,
        )  # fmt: skip
    except NoPlan:
        return None


def run(
    module: Recurrent, rule: Rule, x: Tensor, hx: Tensor | None, rows: Rows, batch_first: bool
) -> tuple[Tensor, Tensor] | None:
    """Output and last states of all layers, or None where they had better run in turn. x [T, B, I] on a GPU."""
    wave = plan_of(module, rule.activation, rows, x.shape[0], x.shape[1], x.dtype, x.device)
    if wave is None:
        return None
    from fused_rin import cuda

    call = Call(
        rows, rule, module.num_heads, batch_first, wave.steps, cuda.Spans(wave.plan),
        functools.partial(Streams, device=x.device), module.backend,
    )  # fmt: skip
    weights, names = [], [names[1] for names in module._all_weights]
    for number, name in enumerate(names):
        own = module._layer_weights(number)
        layer.check_weights(own, x.shape[-1] if not number else module.hidden_size, module.num_heads, x.device, name)
        weights.append(own)
    return apply(call, x, hx, weights)


def apply(call: Call, x: Tensor, hx: Tensor | None, weights: Sequence[Weights]) -> tuple[Tensor, Tensor] | None:
    """All layers by `call`, with their gradients; None where somebody looks, for whom they run in turn."""
    flat = [w for own in weights for w in own]
    if watchers.way(x, hx, *flat, *call.rows, product=True) is not DIRECT:
        return None
    if any(w is not None and w.dtype != x.dtype for w in flat):
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, hx, *flat)):
        return cast("tuple[Tensor, Tensor]", _Wavefront.apply(call, x, hx, *flat))
    outs, h_n = wavefront_forward(call, x, hx, weights)
    return outs[-1], h_n
