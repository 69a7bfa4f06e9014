"""Layers side by side on a GPU: the numbers of layers in turn, whatever else the streams are at."""

from __future__ import annotations

import copy
from typing import Any

import fused_rin
import pytest
import torch
from fused_rin import RIN, settings
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
STEPS, BATCH = 200, 5


def model(dtype: torch.dtype, hidden: int = 128, layers: int = 3, **options: Any) -> RIN:
    torch.manual_seed(hidden)
    made = RIN(40, hidden, layers, backend="cuda", dtype=torch.float32, device="cuda", **options)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(std=0.2 / hidden**0.5 if name.startswith("weight_hh") else 0.1)
    return made.to(dtype)


def results(module: RIN, x: Tensor, hx: Tensor, monkeypatch: pytest.MonkeyPatch, way: str, **rows: Any) -> list[Tensor]:
    monkeypatch.setattr(settings, "WAVEFRONT", way)
    out, h_n = module(x, hx, **rows)
    leaves = (x, hx, *module.parameters())
    draw = torch.Generator("cuda").manual_seed(1)
    upstream = [torch.randn(t.shape, generator=draw, device="cuda", dtype=t.dtype) for t in (out, h_n)]
    return [out.detach(), h_n.detach(), *torch.autograd.grad((out, h_n), leaves, upstream)]


def inputs(module: RIN) -> tuple[Tensor, Tensor]:
    dtype, layers = module.weight_ih_l0.dtype, module.num_layers
    sizes = (BATCH, STEPS) if module.batch_first else (STEPS, BATCH)
    x = torch.randn(*sizes, 40, device="cuda", dtype=dtype, requires_grad=True)
    return x, torch.randn(layers, BATCH, module.hidden_size, device="cuda", dtype=dtype, requires_grad=True)


ROWS: dict[str, dict[str, Any]] = {
    "all": {},
    "lengths": {"lengths": torch.tensor([200, 0, 77, 3, 199])},
    "resets": {"resets": torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(0)) < 0.02},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [128, 512, 1024])
@pytest.mark.parametrize("rows", ROWS)
def test_layers_side_by_side(monkeypatch, dtype, hidden, rows):
    """As near to float64 as layers in turn, up to the order in which a product adds up."""
    module = model(dtype, hidden, batch_first=rows == "all")
    x, hx = inputs(module)
    given = {name: t.cuda() for name, t in ROWS[rows].items()}
    monkeypatch.setattr(settings, "WAVEFRONT", "on")
    assert "side by side" in fused_rin.explain(module, x, hx, **given).plan
    exact = copy.deepcopy(module).double()
    exact.backend = "reference"
    wide = [t.detach().double().requires_grad_() for t in (x, hx)]
    right = results(exact, *wide, monkeypatch, "off", **given)
    in_turn = results(module, x, hx, monkeypatch, "off", **given)
    for i, (got, by_layer, expected) in enumerate(
        zip(results(module, x, hx, monkeypatch, "on", **given), in_turn, right, strict=True)
    ):
        allowed, size = (by_layer - expected).abs().max(), expected.abs().max()
        assert (got - expected).abs().max() <= 1.5 * allowed + 1e-6 * size, i


def test_the_same_bits_again(monkeypatch):
    """On a stream of its own, beside other work, and while memory is handed round."""
    module = model(torch.bfloat16, layers=4)
    x, hx = inputs(module)
    first = results(module, x, hx, monkeypatch, "on")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        noise = torch.randn(1000, 1000, device="cuda") @ torch.randn(1000, 1000, device="cuda")
        with torch.cuda.stream(stream):
            found = results(module, x, hx, monkeypatch, "on")
        stream.synchronize()
        del noise
        for got, expected in zip(found, first, strict=True):
            assert torch.equal(got, expected)


def test_in_a_graph(monkeypatch):
    """Streams beside the capturing one join it; weights that change between replays count."""
    monkeypatch.setattr(settings, "WAVEFRONT", "on")
    module = model(torch.bfloat16).requires_grad_(False)
    x, hx = (t.detach() for t in inputs(module))
    module(x, hx)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, h_n = module(x, hx)
    for factor in (1.0, 0.5):
        x.mul_(factor)
        module.weight_hh_l1.mul_(factor)
        graph.replay()
        for got, right in zip((out, h_n), module(x, hx), strict=True):
            assert torch.equal(got, right)


def test_a_training_step_in_a_graph(monkeypatch):
    monkeypatch.setattr(settings, "WAVEFRONT", "on")
    module = model(torch.float32)
    x, hx = inputs(module)
    right = results(module, x, hx, monkeypatch, "on")
    samples = tuple(t.detach().clone().requires_grad_() for t in (x, hx))  # as those that it is called with
    run = torch.cuda.make_graphed_callables(copy.deepcopy(module), samples)
    for got, expected in zip(results(run, x, hx, monkeypatch, "on"), right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
