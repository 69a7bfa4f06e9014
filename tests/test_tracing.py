"""Tracers of every kind: what they record of a RIN computes what the RIN computes."""

from __future__ import annotations

import pickle

import pytest
import torch
from fused_rin import RIN, RINCell, recurrence
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.rin, self.cell = RIN(5, 8, **options), RINCell(8, 8)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        out, h_n = self.rin(x)
        return self.cell(out[-1], h_n[0]), h_n


OPTIONS = [{}, {"num_layers": 2, "num_heads": 2, "nonlinearity": "tanh"}]


def _assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("options", OPTIONS)
def test_jit_trace(options, steps, grad):
    model = Model(**options)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, torch.randn(steps, 3, 5))
        for shape in ((steps, 3, 5), (steps + 2, 2, 5)):
            x = torch.randn(shape)
            _assert_same(traced(x), model(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("options", OPTIONS)
def test_make_fx_on_real_tensors(options, steps, grad):
    model = Model(**options)
    with torch.set_grad_enabled(grad):
        traced = make_fx(model)(torch.randn(steps, 3, 5))
        x = torch.randn(steps, 3, 5)
        _assert_same(traced(x), model(x))


def test_make_fx_of_a_gradient():
    model = Model()

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x)[0].sum(), x)

    traced = make_fx(gradient)(torch.randn(6, 3, 5))
    x = torch.randn(6, 3, 5)
    _assert_same(traced(x), gradient(x))


def test_double_backward_under_a_mode_that_watches():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model, x = Model().double(), torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)

    def second():
        (first,) = torch.autograd.grad(model(x)[0].sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *model.rin.parameters()])

    expected = second()
    with Watch():
        _assert_same(second(), expected)


def test_symbolic_trace_keeps_the_modules_whole():
    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["rin", "cell"]
    for module in (traced, pickle.loads(pickle.dumps(traced))):
        for shape in ((1, 1, 5), (6, 3, 5)):
            x = torch.randn(shape)
            _assert_same(module(x), model(x))


def test_a_traced_sweep_refuses_tensors_that_it_was_not_made_for():
    """A graph calls the operator with what it is given; kernels read addresses."""
    pre, w, h = torch.randn(5, 4, 1, 8), torch.zeros(1, 8, 8), torch.randn(4, 1, 8)
    lengths, resets = torch.tensor([5, 3, 2, 1]), torch.zeros(5, 4, dtype=torch.bool)
    traced = torch.jit.trace(
        lambda pre, w, h, lengths, resets: recurrence(pre, w, h, lengths=lengths, resets=resets),
        (pre, w, h, lengths, resets),
        check_trace=False,
    )
    for place, wrong, text in (
        (1, w.bfloat16(), "weight must have dtype torch.float32, got torch.bfloat16"),
        (1, torch.zeros(1, 16, 16), "pre must have shape"),
        (2, h.double(), "h0 must have dtype torch.float32, got torch.float64"),
        (2, h[:2], r"h0 must have shape \[4, 1, 8\], got \[2, 1, 8\]"),
        (3, lengths[:1], r"lengths must have shape \[4\], got \[1\]"),
        (4, resets[:4], r"resets must have shape \[5, 4\], got \[4, 4\]"),
    ):
        args = [pre, w, h, lengths, resets]
        args[place] = wrong
        with pytest.raises(RuntimeError, match=text):
            traced(*args)
    with pytest.raises(RuntimeError, match=r"num_reversed must be in \[0, 1\], got 5"):
        torch.ops.fused_rin.sweep_forward(pre, w, None, None, None, None, 1.0, "relu", 5, "auto")
