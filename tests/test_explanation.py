"""`explain` names the way that the same call takes: both are asked, native calls counted."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.utils.flop_counter
from fused_rin import RIN, RINCell, cpu, explain, recurrence, use_backend
from torch.nn.utils.rnn import pack_sequence


@pytest.fixture
def calls(monkeypatch):
    """The forward calls of the native module, by name."""
    names = []

    class Counting:
        def __getattr__(self, name):
            value = getattr(native, name)
            if name not in ("sweep", "layer_forward", "step"):
                return value
            return lambda *arguments: (names.append(name), value(*arguments))[1]

    native = cpu._native
    monkeypatch.setattr(cpu, "_native", Counting())
    return names


KERNELS = {"step": "step", "layer": "layer_forward", "sweep": "sweep", "torch": None}


def check(calls, module, *arguments, **options):
    choice = explain(module, *arguments, **options)
    calls.clear()
    module(*arguments, **options)
    expected = KERNELS[choice.kernel]
    assert set(calls) == ({expected} if expected else set()), (choice, calls)
    if not calls:
        assert "PyTorch" in choice.plan or "torch" in choice.plan
    return choice


MODES = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_heads": 2},
    {"batch_first": True},
    {"dropout": 0.5, "num_layers": 2},
]
SHAPES = [(1, 1), (1, 4), (1, 5), (4, 4), (2, 4), (16, 1), (17, 1), (40, 3)]


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_modules(calls, options, dtype, training):
    rin = RIN(6, 8, dtype=dtype, **options).requires_grad_(training)
    for first, second in SHAPES:
        check(calls, rin, torch.randn(first, second, 6, dtype=dtype))
    check(calls, rin, torch.randn(3, 6, dtype=dtype))
    with torch.no_grad():
        for first, second in SHAPES:
            check(calls, rin, torch.randn(first, second, 6, dtype=dtype))
        check(calls, rin, pack_sequence([torch.randn(n, 6, dtype=dtype) for n in (4, 2)]))
        batch = 2 if not options.get("batch_first") else 5
        check(calls, rin, torch.randn(5, 2, 6, dtype=dtype), lengths=[1] * batch)
        resets = torch.zeros(5, 2, dtype=torch.bool)
        check(calls, rin, torch.randn(5, 2, 6, dtype=dtype), resets=resets)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_cells_and_wide_steps(calls, training, skip):
    cell, rin = (cls(6, 80, skip=skip).requires_grad_(training) for cls in (RINCell, RIN))
    for batch in (1, 4, 5, 30):
        check(calls, cell, torch.randn(batch, 6))
        check(calls, cell, torch.randn(batch, 6), torch.randn(batch, 80))
        check(calls, rin, torch.randn(1, batch, 6))
    check(calls, cell, torch.randn(6))
    check(calls, cell.to(torch.bfloat16), torch.randn(5, 6).bfloat16())


def test_under_observers(calls):
    rin, cell = RIN(6, 8).requires_grad_(False), RINCell(6, 8).requires_grad_(False)
    calls_of = [(rin, torch.randn(1, 1, 6)), (rin, torch.randn(20, 2, 6)), (cell, torch.randn(2, 6))]
    for module, x in calls_of:
        with torch.autocast("cpu", torch.bfloat16):
            assert check(calls, module, x).backend == "cpu"
        with use_backend("reference"):
            assert check(calls, module, x).backend == "reference"
        with torch.device("cpu"):
            check(calls, module, x)
        with torch.autograd.forward_ad.dual_level():
            assert "forward-mode" in check(calls, module, x).reason
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            choice = check(calls, module, x)
            if module is rin:
                assert "as operators of torch, since a TorchDispatchMode" in str(choice)


def test_the_bare_recurrence(calls):
    for steps, batch in itertools.product((1, 20), (1, 3)):
        pre, weight = torch.randn(steps, batch, 1, 8), torch.randn(1, 8, 8)
        assert explain(pre).kernel == "sweep"
        calls.clear()
        recurrence(pre, weight)
        assert calls == ["sweep"]


def test_shapes_in_place_of_tensors():
    assert explain((1, 1, 64), input_size=64).kernel == "step"
    assert explain((100, 1, 64), input_size=64).kernel == "layer"
    assert explain((100, 1, 64)).kernel == "sweep"
    rin = RIN(3, 4)
    assert explain(rin, (20, 2, 3)).kernel == "layer"
    with pytest.raises(TypeError, match="explain of a module needs the input"):
        explain(rin)
    with pytest.raises(ValueError, match=r"input must be \(T, B, input_size\)"):
        explain(rin, (1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"input must be \(B, input_size\)"):
        explain(RINCell(3, 4), (1, 2, 3))


def test_many_short_rows_go_to_the_reference(calls):
    """One unit, thousands of sequences: nothing to gain from a sweep, which costs 40 ns a row."""
    pre = torch.randn(2, 5000, 1, 1)
    choice = explain(pre)
    assert choice.backend == "reference"
    assert "over all sequences are faster" in choice.passed_over["cpu"]
    rin, x = RIN(3, 1), torch.randn(2, 5000, 3)
    out, _ = rin(x)
    assert not calls
    assert torch.equal(out, RIN.forward(rin, x)[0])
    rin.backend = "cpu"
    assert explain(rin, x).kernel == "layer"
    torch.testing.assert_close(rin(x)[0], out)
    assert calls
    assert explain(torch.randn(2, 5000, 1, 3)).backend == "cpu"
