"""Who is looking decides the way of a call; and what no kernel may read is read by none."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fused_rin import RIN, RINCell, cpu, recurrence, watchers
from fused_rin.watchers import DIRECT, OPERATOR, REFERENCE
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("context", "way", "who"),
    [
        (contextlib.nullcontext, DIRECT, None),
        (Dispatch, OPERATOR, "TorchDispatchMode"),
        (Function, OPERATOR, "TorchFunctionMode"),
        (lambda: torch.device("cpu"), DIRECT, None),
        (torch.autograd.forward_ad.dual_level, REFERENCE, "forward-mode"),
    ],
)
def test_modes(context, way, who):
    with context():
        assert watchers.way(torch.ones(2)) == way
        seen = watchers.observer()
        assert (seen is None) if who is None else who in seen[1]


def test_autocast_looks_at_products_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert watchers.way(torch.ones(2)) == DIRECT
        assert watchers.way(torch.ones(2), product=True) == OPERATOR


def test_transforms_tracers_and_compilers():
    seen = []

    def look(x):
        seen.append(watchers.way(x))
        return x * 2

    torch.func.vmap(look)(torch.ones(2))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    torch.jit.trace(look, torch.ones(2), check_trace=False)
    assert seen == [REFERENCE, REFERENCE, OPERATOR]

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return x + {OPERATOR: 1, DIRECT: 2, REFERENCE: 3}[watchers.way(x)]

    assert compiled(torch.zeros(1)) == 1


def test_backwards():
    out = torch.ones(2)
    assert watchers.way_back(out) == REFERENCE  # a graph of it may be asked for
    with torch.no_grad():
        assert watchers.way_back(out, None) == DIRECT


# ---- tensors whose numbers do not lie where they say ----


class Subclass(torch.Tensor):
    pass


def freed(tensor):
    """As sharding leaves a tensor between its uses: all but its memory."""
    tensor = tensor.detach().clone()
    tensor.untyped_storage().resize_(0)
    return tensor


UNREADABLE = {
    "negated": torch._neg_view,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "subclass": lambda t: torch.Tensor._make_subclass(Subclass, t.clone()),
    "functional": torch._to_functional_tensor,
    "meta": lambda t: t.to("meta"),
    "freed": freed,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_not_readable(kind):
    tensor = torch.ones(3, 4)
    assert watchers.is_readable(tensor)
    assert watchers.is_plain(tensor, torch.float32, (3, 4))
    other = UNREADABLE[kind](tensor)
    assert not watchers.is_plain(other, torch.float32, (3, 4))
    if kind != "meta":
        assert not watchers.is_readable(other)
        assert watchers.way(tensor, other) == OPERATOR


def _count(monkeypatch):
    """The native calls of every kind."""
    calls = []

    class Counting:
        def __getattr__(self, name):
            value = getattr(native, name)
            if name not in ("sweep", "layer_forward", "layer_backward", "step"):
                return value
            return lambda *arguments: (calls.append(name), value(*arguments))[1]

    native = cpu._native
    monkeypatch.setattr(cpu, "_native", Counting())
    return calls


def _calls():
    """Every fast way, as a function of its tensors: (name, module or None, tensors)."""
    rin = RIN(3, 4).requires_grad_(False)
    cell = RINCell(3, 4).requires_grad_(False)
    for steps in (1, 2, 20):
        yield f"RIN of {steps} steps", rin, (torch.randn(steps, 2, 3), torch.rand(1, 2, 4))
    yield "RINCell", cell, (torch.randn(2, 3), torch.rand(2, 4))
    yield "recurrence", None, (torch.randn(5, 2, 1, 4), torch.randn(1, 4, 4) * 0.1, torch.rand(2, 1, 4))


@pytest.mark.parametrize("call", list(_calls()), ids=lambda call: call[0])
@pytest.mark.parametrize("kind", ["negated", "zero", "subclass"])
def test_other_tensors_give_what_plain_ones_give(call, kind):
    _, module, tensors = call
    function = recurrence if module is None else module
    for place in range(len(tensors)):
        plain = list(tensors)
        if kind == "zero":
            plain[place] = torch.zeros_like(plain[place])
        changed = list(plain)
        changed[place] = UNREADABLE[kind](plain[place])
        if kind == "negated":  # reads as the negative of what lies there
            plain[place] = -plain[place]
        for got, want in zip(_tuple(function(*changed)), _tuple(function(*plain)), strict=True):
            torch.testing.assert_close(torch.Tensor(got.detach()), want)


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", list(_calls()), ids=lambda call: call[0])
def test_freed_memory_is_refused_before_a_kernel_reads_it(call, grad, monkeypatch):
    _, module, tensors = call
    calls = _count(monkeypatch)
    for place in range(len(tensors)):
        changed = [t.clone().requires_grad_(grad) for t in tensors]
        changed[place] = freed(tensors[place]).requires_grad_(grad)
        with pytest.raises(RuntimeError, match=r"has no memory|storage"):
            (recurrence if module is None else module)(*changed)
    if module is None:
        return
    for name, parameter in module.named_parameters():
        kept = parameter.data
        module.requires_grad_(grad)
        parameter.data = freed(kept)
        with pytest.raises(RuntimeError, match=r"has no memory|storage"):
            module(*tensors)
        parameter.data = kept
        assert name
    module.requires_grad_(False)
    assert not calls


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"num_heads": 2}], ids=str)
def test_freed_memory_behind_an_offset(steps, grad, options, monkeypatch):
    """Parameters as views of one flat tensor whose storage is freed between uses (FSDP): an offset is no address."""
    module, x = RIN(3, 4, **options).requires_grad_(False), torch.randn(steps, 2, 3)
    flat = torch.cat([p.data.flatten() for p in module.parameters()])
    for parameter, part in zip(module.parameters(), flat.split([p.numel() for p in module.parameters()]), strict=True):
        parameter.data = part.view(parameter.shape)
    flat.untyped_storage().resize_(0)
    module.requires_grad_(grad)
    calls = _count(monkeypatch)
    with pytest.raises(RuntimeError, match=r"has no memory|storage"):
        module(x)
    assert not calls


def test_states_without_memory_behind_an_offset():
    """A slice of a zero tensor is one; of a freed state, nothing."""
    module, x = RIN(3, 4, num_layers=2, bidirectional=True), torch.randn(20, 2, 3)
    zero = torch._efficientzerotensor((4, 2, 4))
    for given in (x, torch.nn.utils.rnn.pack_padded_sequence(x, [3, 20], enforce_sorted=False)):
        for a, b in zip(module(given, zero), module(given), strict=True):
            a, b = (t.data if isinstance(t, torch.nn.utils.rnn.PackedSequence) else t for t in (a, b))
            torch.testing.assert_close(a, b)  # the operators' way has another product for W x
        with pytest.raises(RuntimeError, match=r"has no memory|storage"):
            module(given, freed(torch.randn(4, 2, 4)))


def test_memory_freed_between_forward_and_backward():
    rin, x = RIN(3, 4), torch.randn(20, 2, 3)
    out, _ = rin(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"):
        out.sum().backward()


# ---- torch.set_default_device stays on the stack of modes ----


def test_a_default_device_closes_no_fast_way(monkeypatch):
    rin, cell = RIN(3, 4), RINCell(3, 4)
    x, h = torch.randn(20, 2, 3), torch.rand(1, 2, 4)
    pre, weight = torch.randn(5, 2, 1, 4), torch.rand(1, 4, 4)
    calls = _count(monkeypatch)

    def run():
        with torch.no_grad():
            results = [*rin(x[:1], h), *rin(x, h), cell(x[0], h[0]), *recurrence(pre, weight)]
        out, _ = rin(x, h)
        return [*results, *torch.autograd.grad(out.sum(), list(rin.parameters()))]

    plain = run()
    expected, calls[:] = list(calls), []
    assert expected == ["step", "layer_forward", "step", "sweep", "layer_forward", "layer_backward"]
    for device in ("cpu", "meta"):
        with torch.device(device):
            inside = run()
        assert calls == expected
        calls.clear()
        assert all(torch.equal(a, b) for a, b in zip(inside, plain, strict=True))


def test_a_default_device_beside_another_mode_is_one_mode_too_many():
    with torch.device("cpu"), Function():
        assert watchers.way(torch.ones(2)) == OPERATOR
    with Function(), torch.device("cpu"):
        assert not watchers.may_be_passed_by(torch.ones(2))
