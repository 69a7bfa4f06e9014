"""Layers side by side, their sweeps on CPU fibres: the bits of layers in turn, whatever lane comes first."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fused_rin import RIN, cuda, cuda_plan, wavefront
from fused_rin.problem import ALL_ROWS, Rows, Rule
from torch import Tensor

from tests.conftest import make_case
from tests.cuda_on_cpu.test_shared_tiles import SMALL

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Shuffled:
    """Lanes that do nothing before the end, and then what may be done, in any order that their marks allow."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.lanes: list[list[tuple[Callable[[], None], Any, object]]] = [[] for _ in range(count)]
        self.random = random.Random(seed)

    def __enter__(self) -> Shuffled:
        return self

    def run(self, number: int, work: Callable[[], None], after: Any) -> object:
        self.lanes[number].append((work, after, mark := object()))
        return mark

    def __exit__(self, kind: object, *_: object) -> None:
        done: set[Any] = {None}
        while kind is None and any(self.lanes):
            ready = [lane for lane in self.lanes if lane and lane[0][1] in done]
            assert ready, "every lane waits for another"
            work, _, mark = self.random.choice(ready).pop(0)
            work()
            done.add(mark)


KERNELS = {
    "bf16": (BF16, cuda_plan.Kernel("mma", 64, 8, 4, 4, 8, 8)),
    "fp16": (FP16, cuda_plan.Kernel("mma", 64, 16, 4, 4, 8, 6)),
    "fp32": (FP32, cuda_plan.Kernel("fma", 64, 2, 4, 4, 8, 8)),
    "tf32x3": (FP32, cuda_plan.Kernel("tf32x3", 64, 16, 4, 8, 4, 4)),
    **{name: SMALL[name] for name in ("bf16 of 2", "fp16 grid of 4", "fp32 grid of 8")},
}


def forced(kernel: cuda_plan.Kernel, rows: int = 0) -> cuda_plan.SweepPlan:
    return cuda_plan.SweepPlan(kernel, "forced", 1, 1, 1, 0.0, rows, kernel.workspace_bytes)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_spans_have_the_numbers_of_the_whole(native, force, kernel, activation):
    """11 steps in spans of 1 to 10, some beyond every length; in place, as the wavefront has it."""
    dtype, chosen = KERNELS[kernel]
    general = activation == "tanh"
    force(chosen)
    case = make_case(
        11, chosen.rows + 1, chosen.hidden - 16, 1 if chosen.ctas > 1 else 2, dtype=dtype, activation=activation,
        layout="lengths" if general else "full", resets=general, skip=0.9, seed=5,
    )  # fmt: skip
    if case.lengths is not None:
        case.lengths.clamp_(max=9)
    draw = torch.Generator().manual_seed(1)
    grad_out, grad_h_n = (torch.randn(t.shape, generator=draw).to(dtype) for t in (case.pre, case.h0))
    out, h_n = cuda.forward(*case.arguments)
    grad_pre, grad_h0 = cuda.backward(grad_out, grad_h_n, case.weight, out, case.rows, case.rule)
    sweeps = cuda.Spans(forced(chosen))
    for steps in (1, 4, 10):
        spans = wavefront.Call(case.rows, case.rule, 1, False, steps, sweeps, Shuffled, "reference").spans(11)
        for in_, saved, first, right, right_last in (
            (case.pre, None, case.h0, out, h_n), (grad_out, out, grad_h_n, grad_pre, grad_h0),
        ):  # fmt: skip
            found, last = in_.clone(), torch.full_like(first, torch.nan)
            states = wavefront._States(first, last, len(spans))
            for number, (place, rows) in enumerate(spans if saved is None else spans[::-1]):
                here, was = found[place], None if saved is None else saved[place]
                sweeps(here, was, states.of(number), case.weight, here, rows, case.rule)
            for got, expected in ((found, right), (last, right_last)):
                if saved is None:
                    assert torch.equal(got, expected)
                else:  # what is carried over is rounded to float32 in another order
                    assert (got - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
                    assert dtype == FP32 or (got != expected).float().mean() < 0.05


def test_a_state_that_crosses_rounded_is_seen(native, force):
    """So that the test above can fail: without what is carried, a good part of the numbers are others."""
    dtype, chosen = KERNELS["bf16"]
    force(chosen)
    case = make_case(8, 2, 64, dtype=dtype, skip=0.9)
    out, h_n = cuda.forward(*case.arguments)
    grad_pre, _ = cuda.backward(case.pre, h_n, case.weight, out, ALL_ROWS, case.rule)
    for saved, right, order in ((None, out, (0, 4)), (out, grad_pre, (4, 0))):
        found, sweeps = case.pre.clone(), cuda.Spans(forced(chosen))
        states = wavefront._States(h_n if saved is not None else case.h0, torch.empty_like(h_n), 2)
        for number, begin in enumerate(order):
            place = slice(begin, begin + 4)
            here, was = found[place], None if saved is None else saved[place]
            sweeps(here, was, states.of(number)._replace(carried=None), case.weight, here, ALL_ROWS, case.rule)
        assert torch.equal(found[order[0] : order[0] + 4], right[order[0] : order[0] + 4])
        assert (found != right).float().mean() > 0.05


RULE = Rule(0.9, "tanh")  # a ReLU that is on in one and off in the other would be more than rounding


class Layers:
    """Three layers and a call of them, in some dtype; their results and gradients, side by side and in turn."""

    def __init__(
        self,
        dtype: torch.dtype,
        rows: Rows = ALL_ROWS,
        *,
        batch_first: bool = False,
        heads: int = 1,
        bias: bool = True,
        h0: bool = True,
        span: int = 3,
    ) -> None:
        steps, batch = 10, 5
        torch.manual_seed(3)
        self.module = RIN(20, 64, 3, bias=bias, num_heads=heads, dtype=torch.float64)
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                p.copy_(torch.randn(p.shape) * (0.3 / 8 if name.startswith("weight_hh") else 1 / 8))
        self.module = self.module.to(dtype)
        self.x = torch.randn(batch, steps, 20).to(dtype).transpose(0, 1).requires_grad_()
        self.hx = torch.randn(batch, 3, 64).to(dtype).transpose(0, 1).requires_grad_() if h0 else None
        self.upstream = torch.randn(steps, batch, 64).to(dtype), torch.randn(3, batch, 64).to(dtype)
        self.rows, self.heads, self.batch_first, self.span = rows, heads, batch_first, span

    def call(self, seed: int = 0) -> wavefront.Call:
        dtype, kernel = KERNELS["fp32" if self.x.dtype == FP32 else "bf16"]
        assert self.x.dtype == dtype
        sweeps = cuda.Spans(forced(kernel))
        rule, lanes = RULE, partial(Shuffled, seed=seed)
        return wavefront.Call(self.rows, rule, self.heads, self.batch_first, self.span, sweeps, lanes, "reference")

    def to(self, dtype: torch.dtype) -> Layers:
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module).to(dtype)
        other.x, other.hx = (t if t is None else t.detach().to(dtype).requires_grad_() for t in (self.x, self.hx))
        other.upstream = tuple(t.to(dtype) for t in self.upstream)
        return other

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.hx, *self.module.parameters()) if t is not None]

    def side_by_side(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        weights = [self.module._layer_weights(number) for number in range(3)]
        found = wavefront.apply(self.call(seed), self.x, self.hx, weights)
        assert found is not None
        return found

    def in_turn(self) -> tuple[Tensor, Tensor]:
        flat = [w for number in range(3) for w in self.module._layer_weights(number)]
        call = wavefront.Call(self.rows, RULE, self.heads, self.batch_first, 1, None, None, "reference")  # type: ignore
        return call.in_turn(self.x, self.hx, *flat)

    def results(self, run: Callable[[], tuple[Tensor, Tensor]]) -> list[Tensor]:
        out, h_n = run()
        grad_out, grad_h_n = self.upstream
        upstream = (grad_out.transpose(0, 1) if self.batch_first else grad_out, grad_h_n)
        return [out.detach(), h_n.detach(), *torch.autograd.grad((out, h_n), self.leaves, upstream)]


def check(layers: Layers) -> None:
    """The tolerance rule of all results and gradients."""
    exact = layers.to(torch.float64)
    right, plain = exact.results(exact.in_turn), layers.results(layers.in_turn)
    found = layers.results(layers.side_by_side)
    for i, (got, by_torch, expected) in enumerate(zip(found, plain, right, strict=True)):
        assert got.shape == expected.shape
        allowed, size = (by_torch - expected).abs().max(), expected.abs().max()
        assert (got - expected).abs().max() <= (3 if i > 1 else 2) * allowed + 1e-6 * size, i


LENGTHS = torch.tensor([10, 0, 4, 6, 9])
RESETS = torch.rand(10, 5, generator=torch.Generator().manual_seed(0)) < 0.2
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"rows": Rows(LENGTHS)},
    "resets": {"rows": Rows(None, None, RESETS)},
    "lengths and resets, batch first": {"rows": Rows(LENGTHS, None, RESETS), "batch_first": True},
    "two heads": {"heads": 2},
    "no bias, no first state": {"bias": False, "h0": False},
    "batch first": {"batch_first": True},
    "a span of all steps": {"span": 10},
    "spans of one": {"span": 1},
}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_side_by_side(native, dtype, kind):
    layers = Layers(dtype, **KINDS[kind])
    out, _ = layers.side_by_side()
    assert not out._is_view()  # code for torch.nn.RNN calls detach_()
    check(layers)


def test_no_order_of_the_lanes_matters(native):
    layers = Layers(BF16)
    first = layers.results(layers.side_by_side)
    for seed in range(1, 6):
        for got, right in zip(layers.results(partial(layers.side_by_side, seed)), first, strict=True):
            assert torch.equal(got, right)


def test_a_lane_that_does_not_wait_is_seen(native, monkeypatch):
    """So that the test above can fail: NaN of what was not there yet."""
    run = Shuffled.run
    monkeypatch.setattr(Shuffled, "run", lambda self, number, work, after: run(self, number, work, None))
    layers = Layers(BF16)
    assert any(not layers.side_by_side(seed)[0].isfinite().all() for seed in range(5))


def test_gradients_of_some(native):
    """What needs none has none: frozen weights, one of two results, no gradient of the input."""
    layers = Layers(FP32)
    expected = dict(zip(map(id, layers.leaves), layers.results(layers.side_by_side)[2:], strict=True))
    frozen = [layers.module.weight_hh_l1, layers.module.bias_ih_l0, layers.module.bias_hh_l2, layers.x]
    for t in frozen:
        t.requires_grad_(False)
    out, h_n = layers.side_by_side()
    torch.autograd.backward((out, h_n), layers.upstream)
    for leaf in layers.leaves:
        if any(leaf is t for t in frozen):
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, expected[id(leaf)])
    by_h_n = Layers(FP32)
    (of_all,) = torch.autograd.grad(by_h_n.side_by_side()[1][1].sum(), by_h_n.hx)
    (right,) = torch.autograd.grad(by_h_n.in_turn()[1][1].sum(), by_h_n.hx)
    assert (of_all - right).abs().max() <= 1e-4 * right.abs().max()
    with torch.no_grad():
        assert not layers.side_by_side()[0].requires_grad


def test_biases_have_gradients_of_their_own(native):
    layers = Layers(FP32)
    torch.autograd.backward(layers.side_by_side(), layers.upstream)
    own = layers.module
    assert own.bias_ih_l1.grad.data_ptr() != own.bias_hh_l1.grad.data_ptr()


def test_gradients_of_gradients(native):
    found = []
    layers = Layers(FP32)
    for run in (layers.side_by_side, layers.in_turn):
        out, _ = run()
        first = torch.autograd.grad(out.pow(2).sum(), layers.leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), layers.leaves)
        found.append((*first, *second))
    for got, right in zip(*found, strict=True):
        assert (got - right).abs().max() <= 1e-4 * right.abs().max()


def test_hooks_on_what_is_kept(native):
    layers = Layers(BF16)
    right = layers.results(layers.side_by_side)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone().t() if t.dim() == 2 else t.clone(),
                                                  lambda t: t.t() if t.dim() == 2 else t):  # fmt: skip
        for got, expected in zip(layers.results(layers.side_by_side), right, strict=True):
            assert torch.equal(got, expected)


def test_who_looks_has_layers_in_turn(native):
    layers = Layers(FP32)
    weights = [layers.module._layer_weights(number) for number in range(3)]
    with torch.autocast("cpu", dtype=BF16):
        assert wavefront.apply(layers.call(), layers.x, layers.hx, weights) is None
    other = [w._replace(w_hh=w.w_hh.to(BF16)) for w in weights]
    assert wavefront.apply(layers.call(), layers.x, layers.hx, other) is None


def test_gradients_batched_by_vmap(native):
    layers = Layers(FP32)
    out, _ = layers.side_by_side()
    upstream = torch.randn(2, *out.shape)
    (batched,) = torch.autograd.grad(out, layers.hx, upstream, retain_graph=True, is_grads_batched=True)
    for one, given in zip(batched, upstream, strict=True):
        (right,) = torch.autograd.grad(out, layers.hx, given, retain_graph=True)
        assert (one - right).abs().max() <= 1e-4 * right.abs().max()
