"""torch.compile, torch.export and autocast."""

from __future__ import annotations

import pytest
import torch
from fused_rin import RIN, RINCell
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import rnn as rnn_utils

WIDE = {"num_layers": 2, "bidirectional": True, "batch_first": True, "num_heads": 2, "nonlinearity": "tanh"}


def _rin(options=None, **extra):
    torch.manual_seed(0)
    module = RIN(5, 8, **(options or {}), **extra)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _assert_compiled_equals_eager(compiled, module, *args, **kwargs):
    leaves = [a for a in args if a.requires_grad] + list(module.parameters())
    results = []
    for call in (compiled, module):
        out, h_n = call(*args, **kwargs)
        results.append((out, h_n, *torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, WIDE])
def test_compile_forward_backward_and_one_recompilation_over_ten_shapes(options):
    module = _rin(options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for steps, batch in [(11, 3), (6, 4), (7, 4), (9, 2), (4, 8), (12, 5), (3, 3), (20, 6), (2, 9), (31, 2)]:
        x = torch.randn(steps, batch, 5, requires_grad=True)
        _assert_compiled_equals_eager(compiled, module, x)
    assert counter.frame_count <= 2


def test_compile_with_dynamic_shapes_asked_for_compiles_once():
    module = _rin()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for steps, batch in [(11, 3), (6, 4), (2, 9)]:
            x = torch.randn(steps, batch, 5)
            torch.testing.assert_close(compiled(x)[0], module(x)[0])
    assert counter.frame_count == 1


def test_compile_of_lengths_resets_and_state():
    module = _rin({"num_layers": 2, "bidirectional": True})
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, hx = torch.randn(6, 3, 5, requires_grad=True), torch.randn(4, 3, 8, requires_grad=True)
    _assert_compiled_equals_eager(compiled, module, x, hx, lengths=torch.tensor([6, 1, 4]))
    _assert_compiled_equals_eager(compiled, module, x, hx, resets=torch.rand(6, 3) < 0.3)


def test_compile_of_a_packed_sequence_works_with_graph_breaks():
    module = _rin()
    compiled = torch.compile(module, backend="eager")
    packed = rnn_utils.pack_sequence([torch.randn(n, 5) for n in (4, 2)])
    torch.testing.assert_close(compiled(packed)[0].data, module(packed)[0].data)


def test_inductor_compiles_a_model_around_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rin, self.cell, self.head = _rin(), RINCell(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            out, h_n = self.rin(x)
            return self.head(self.cell(out[-1], h_n[0])), h_n

    torch.manual_seed(0)
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    _assert_compiled_equals_eager(compiled, model, torch.randn(7, 3, 5, requires_grad=True))


def test_inference_under_compile_with_one_step():
    module, cell = _rin(), RINCell(5, 8)
    with torch.no_grad():
        x, h = torch.randn(1, 1, 5), torch.randn(1, 1, 8)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, h)[0], module(x, h)[0])
        compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x[0], h[0]), cell(x[0], h[0]))


@pytest.mark.parametrize("options", [{}, WIDE])
def test_export_with_dynamic_dimensions(options):
    # In float64: the exported program sums in another order than the eager layer, and these states grow.
    module, dtype = _rin(options, dtype=torch.float64).eval(), torch.float64
    time, batch = (1, 0) if module.batch_first else (0, 1)
    states = module.num_layers * (2 if module.bidirectional else 1)
    dim = {time: torch.export.Dim("time", min=2), batch: torch.export.Dim("batch", min=2)}
    program = torch.export.export(
        module,
        (torch.randn(6, 4, 5, dtype=dtype), torch.zeros(states, 6 if module.batch_first else 4, 8, dtype=dtype)),
        dynamic_shapes=(dim, {1: dim[batch]}),
    )
    again = program.module()
    for shape in ((9, 3), (2, 7)):
        x = torch.randn(*shape, 5, dtype=dtype, requires_grad=True)
        hx = torch.randn(states, shape[batch], 8, dtype=dtype)
        out, expected = again(x, hx), module(x, hx)
        torch.testing.assert_close(out[0], expected[0])
        torch.testing.assert_close(out[1], expected[1])
        grads = [torch.autograd.grad(o[0].square().sum(), x)[0] for o in (out, expected)]
        torch.testing.assert_close(*grads)


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "nonlinearity": "tanh"}])
def test_autocast_is_torchs(options, dtype):
    """dtypes of results and gradients as torch.nn.RNN's, errors against float64 no larger (times 2, 3)."""
    torch.manual_seed(0)
    ours = RIN(5, 8, skip=0, **options)
    theirs = ours.to_rnn()
    exact = ours.to_rnn().double()
    states = ours.num_layers * (2 if ours.bidirectional else 1)
    for parameter, other, third in zip(ours.parameters(), theirs.parameters(), exact.parameters(), strict=True):
        nn.init.normal_(parameter, std=0.3)
        other.data.copy_(parameter.data)
        third.data.copy_(parameter.data)
    x, hx = torch.randn(7, 3, 5), torch.randn(states, 3, 8)
    wanted = exact(x.double(), hx.double())
    wanted = [*wanted, *torch.autograd.grad(wanted[0].sum() + wanted[1].sum(), list(exact.parameters()))]
    results = []
    for module in (ours, theirs):
        with torch.autocast("cpu", dtype):
            out, h_n = module(x, hx)
        grads = torch.autograd.grad(out.float().sum() + h_n.float().sum(), list(module.parameters()))
        results.append([out, h_n, *grads])
    for index, (a, b, c) in enumerate(zip(*results, wanted, strict=True)):
        assert a.dtype == b.dtype
        factor = 2 if index < 2 else 3
        atol = 4 * torch.finfo(dtype).eps * c.abs().max()
        assert (a.double() - c).abs().max() <= factor * (b.double() - c).abs().max() + atol


@pytest.mark.parametrize("state", ["none", "same", "other"])
def test_autocast_of_the_cell_and_of_one_step(state):
    cell, theirs = RINCell(5, 8), nn.RNNCell(5, 8)
    x = torch.randn(3, 5)
    h = {"none": None, "same": torch.randn(3, 8), "other": torch.randn(3, 8).bfloat16()}[state]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert cell(x, h).dtype == theirs(x, h).dtype == torch.bfloat16
        assert RIN(5, 8)(x[:1, None], None if h is None else h[None, :1])[0].dtype == torch.bfloat16


def test_autocast_inside_compile():
    module = _rin()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(x)[0], module(x)[0]
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_autocast_leaves_float64_alone():
    module = _rin(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(6, 3, 5, dtype=torch.float64))[0].dtype == torch.float64
