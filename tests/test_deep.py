"""DeepTransitionRIN: several transitions a step, against its equations and against a state K times as large."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import fused_rin
import pytest
import torch
from fused_rin import RIN, DeepTransitionRIN, cpu, cpu_layers, identity_prior
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.conftest import assert_within, use_threads

BATCHES = ("full", "first", "lengths", "resets", "packed", "packed resets")


def make(inputs: int, hidden: int, dtype: torch.dtype = torch.float64, **more: Any) -> DeepTransitionRIN:
    torch.manual_seed(hidden)
    module = DeepTransitionRIN(inputs, hidden, dtype=dtype, **more)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 0.2 / hidden**0.5 if name.startswith(("weight_hh", "weight_deep")) else 0.3
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * scale)
    return module


def loop(module: DeepTransitionRIN, x: Tensor, h: Tensor, lengths: Tensor, resets: Tensor | None, suffix: str) -> Any:
    """One direction of one layer from the equations of its docstring; x [T, B, I], h [B, D]."""
    act = torch.relu if module.nonlinearity == "relu" else torch.tanh
    of = {name.removesuffix(suffix): p for name, p in module.named_parameters() if name.endswith(suffix)}
    steps, skip, is_reversed = len(x), module.skip_factor, suffix.endswith("reverse")
    outs: list[Any] = [None] * steps
    for t in range(steps)[:: -1 if is_reversed else 1]:
        boundary = t + 1 if is_reversed else t
        if resets is not None and boundary < steps:
            crossed = resets[boundary] & (lengths > boundary)
            h = torch.where(crossed[:, None], 0, h)
        new = act(x[t] @ of["weight_ih"].T + of["bias_ih"] + h @ of["weight_hh"].T + of["bias_hh"] + skip * h)
        for u, b in zip(of["weight_deep"], of["bias_deep"], strict=True):
            new = act(new @ u.T + b + skip * new)
        runs = (lengths > t)[:, None]
        h = torch.where(runs, new, h)
        outs[t] = torch.where(runs, new, 0)
    return torch.stack(outs), h


def by_loop(module: DeepTransitionRIN, x: Any, h0: Tensor, lengths: Any = None, resets: Any = None) -> Any:
    packed = isinstance(x, PackedSequence)
    if packed:
        is_there = (x.batch_sizes[:, None] > torch.arange(int(x.batch_sizes[0]))).nonzero(as_tuple=True)
        h0 = h0 if x.sorted_indices is None else h0[:, x.sorted_indices]
        if resets is not None:
            resets = torch.zeros(len(x.batch_sizes), h0.shape[1], dtype=torch.bool).index_put(is_there, resets)
        lengths = (x.batch_sizes[:, None] > torch.arange(h0.shape[1])).sum(0)
        data = x.data
        x = torch.zeros(len(x.batch_sizes), h0.shape[1], data.shape[1], dtype=data.dtype).index_put(is_there, data)
    elif module.batch_first:
        x, resets = x.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
    lengths = torch.full((x.shape[1],), len(x)) if lengths is None else lengths
    states = []
    directions = ["", "_reverse"] if module.bidirectional else [""]
    for layer in range(module.num_layers):
        outs = []
        for i, direction in enumerate(directions):
            h = h0[layer * len(directions) + i]
            out, h = loop(module, x, h, lengths, resets, f"_l{layer}{direction}")
            outs.append(out)
            states.append(h)
        x = torch.cat(outs, -1)
    return (x[is_there] if packed else x.transpose(0, 1) if module.batch_first else x), torch.stack(states)


class Call:
    def __init__(self, module: DeepTransitionRIN, steps: int, batch: int, kind: str) -> None:
        draw = torch.Generator().manual_seed(steps)
        normal = lambda *s: torch.randn(*s, generator=draw, dtype=torch.float64).to(module.weight_ih_l0.dtype)  # noqa: E731
        layers = module.num_layers * (2 if module.bidirectional else 1)
        sizes = (batch, steps) if module.batch_first else (steps, batch)
        self.h, self.options = normal(layers, batch, module.hidden_size).requires_grad_(), {}
        self.x: Any = normal(*sizes, module.input_size).requires_grad_()
        self.leaf, rows = self.x, sizes
        lengths = torch.randint(0, steps + 1, (batch,), generator=draw)
        if kind.startswith("packed"):
            # Sorted, so that h0 is in the order of the rows.
            lengths = lengths.clamp(min=1).sort(descending=True).values
            packed = pack_padded_sequence(self.x.detach(), lengths)
            self.leaf = packed.data.clone().requires_grad_()
            self.x, rows = PackedSequence(self.leaf, packed.batch_sizes), (len(packed.data),)
        elif kind == "lengths":
            self.options["lengths"] = lengths
        if "resets" in kind:
            self.options["resets"] = torch.rand(rows, generator=draw) < 0.15

    def results(self, module: DeepTransitionRIN, run: Any = None) -> list[Tensor]:
        out, h_n = (module if run is None else run)(self.x, self.h, **self.options)
        out = out.data if isinstance(out, PackedSequence) else out
        draw = torch.Generator().manual_seed(1)
        loss = sum((t.double() * torch.randn(t.shape, generator=draw, dtype=torch.float64)).sum() for t in (out, h_n))
        wanted = [p for p in module.parameters() if p.numel()]
        return [out.detach(), h_n.detach(), *torch.autograd.grad(loss, [*wanted, self.leaf, self.h])]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for name in ("deep_forward", "deep_backward"):
        function = getattr(cpu_layers, name)
        monkeypatch.setattr(
            cpu_layers, name, lambda *a, name=name, function=function, **k: (calls.append(name), function(*a, **k))[1]
        )
    return calls


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
@pytest.mark.parametrize(
    "options",
    [{"transitions": 2}, {"transitions": 3, "skip": 0.0}, {"bidirectional": True}, {"num_layers": 2, "skip": 0.7}],
    ids=str,
)
def test_is_its_equations(monkeypatch, options, nonlinearity, batch):
    for steps, rows, inputs, hidden in ((12, 5, 3, 7), (30, 23, 2, 33)):
        module = make(inputs, hidden, nonlinearity=nonlinearity, batch_first=batch == "first", **options)
        call = Call(module, steps, rows, batch)
        want = call.results(module, lambda *a, m=module, **k: by_loop(m, *a, **k))
        assert float(want[0].abs().max()) > 0.1
        calls = counted(monkeypatch)
        for backend in ("auto", "reference"):
            module.backend = backend
            for got, exact in zip(call.results(module), want, strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10 * (1 + float(exact.abs().max())))
        layers = module.num_layers * (2 if module.bidirectional else 1)
        assert calls == ["deep_forward"] * layers + ["deep_backward"] * layers, "the reference is another way"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tolerance_rule(dtype):
    """Sizes whose rows and units fill no vector, whole ones, and one sequence whose outputs are cut."""
    for steps, rows, inputs, hidden in ((9, 1, 4, 300), (14, 37, 5, 45), (8, 64, 16, 128), (6, 33, 40, 50)):
        for deep in (2, 3):
            module = make(inputs, hidden, dtype, transitions=deep)
            call = Call(module, steps, rows, "lengths")
            got = call.results(module)
            plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
            plain.backend = exact.backend = "reference"
            wide = Call(exact, steps, rows, "lengths")
            wide.x, wide.h = (t.detach().double().requires_grad_() for t in (call.x, call.h))
            wide.leaf = wide.x
            for i, three in enumerate(zip(got, call.results(plain), wide.results(exact), strict=True)):
                assert_within(f"result {i}", *three, 2 if i < 2 else 3, deep * (hidden + inputs + steps * rows))


def test_one_transition_is_a_rin():
    rin = RIN(5, 37)
    torch.nn.init.normal_(rin.weight_hh_l0, std=0.05)
    torch.nn.init.normal_(rin.weight_ih_l0)
    module = DeepTransitionRIN(5, 37, transitions=1)
    module.load_state_dict(rin.state_dict())
    call = Call(module, 20, 30, "lengths")
    ours, theirs = call.results(module), call.results(rin)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("isa", cpu.instruction_sets())
def test_bits_do_not_depend_on_threads(isa):
    for steps, rows, hidden in ((40, 1, 300), (30, 50, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            module = make(5, hidden, dtype, transitions=3)
            call = Call(module, steps, rows, "lengths" if rows > 1 else "resets")
            with cpu.use_instruction_set(isa):
                want = call.results(module)
                for threads in (2, 3):
                    with use_threads(threads):
                        got = call.results(module)
                        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (dtype, threads)
                        # Without gradients the states in between are not stored.
                        with torch.no_grad():
                            assert torch.equal(module(call.x, call.h, **call.options)[0], want[0])


def test_bits_when_a_team_ends_under_way():
    module = make(3, 300, torch.float32)
    call = Call(module, 40, 1, "full")
    want = call.results(module)
    try:
        with use_threads(2):
            for meeting in (1, 4, 5, 37, 120):
                cpu._native.end_teams_at(meeting)
                assert all(torch.equal(a, b) for a, b in zip(call.results(module), want, strict=True)), meeting
                cpu._native.forget_crowds()
    finally:
        cpu._native.end_teams_at(0)
        cpu._native.forget_crowds()


def test_gradients_of_gradients_and_watchers():
    module = make(3, 6)
    x = torch.randn(7, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z, u: torch.func.functional_call(module, {"weight_deep_l0": u}, (z,))[0],
                                        (x, module.weight_deep_l0))  # fmt: skip
    rows = torch.autograd.functional.jacobian(lambda z: module(z)[1], x, vectorize=True)
    torch.testing.assert_close(rows, torch.autograd.functional.jacobian(lambda z: module(z)[1], x))
    want = module(x)[0]
    torch.testing.assert_close(torch.func.vmap(lambda z: module(z)[0])(x[None])[0], want)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x)[0], want)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], want)
    single = copy.deepcopy(module).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = single(x.detach().float())[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, rtol=0.05, atol=0.05)
    packed = pack_padded_sequence(x.detach()[:, :3], torch.tensor([7, 5, 1]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out, lengths = pad_packed_sequence(module(packed)[0])
    torch.testing.assert_close(out, module(x[:, :3], lengths=lengths)[0])
    module.return_sequences = False
    assert module(x)[0] is None


def test_explain():
    module = DeepTransitionRIN(8, 64, transitions=3)
    choice = fused_rin.explain(module, (30, 16, 8))
    assert (choice.backend, choice.kernel) == ("cpu", "layer")
    assert choice.plan.endswith("; 3 transitions a step")
    with torch.autocast("cpu"):
        assert fused_rin.explain(module, (30, 16, 8)).kernel == "sweep"
    module.backend = "reference"
    assert "a loop of PyTorch operations over 90 steps" in fused_rin.explain(module, (30, 16, 8)).plan


def test_arguments_states_and_the_identity():
    for wrong, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="transitions"):
            DeepTransitionRIN(2, 3, transitions=wrong)  # type: ignore[arg-type]
    module = DeepTransitionRIN(4, 8, transitions=3, bidirectional=True, bias=False)
    assert "transitions=3" in repr(module)
    assert module.bias_deep_l0 is None
    assert 0 < float(module.weight_deep_l0_reverse.detach().std()) < 3e-3
    state = module.state_dict()
    assert float(state["skip"]) == 1
    again = pickle.loads(pickle.dumps(module))
    again.load_state_dict(state)
    x = torch.randn(5, 2, 4)
    assert torch.equal(again(x)[0], module(x)[0])
    groups = identity_prior.param_groups(module, identity_decay=0.1)
    assert sorted(tuple(p.shape) for p in groups[0]["params"]) == [(2, 8, 8)] * 2 + [(8, 8)] * 2
    with pytest.raises(ValueError, match="DeepTransitionRIN keeps every state, got checkpoint_steps=5"):
        module.checkpoint_steps = 5
    broken = DeepTransitionRIN(4, 8)
    broken.weight_deep_l0 = torch.nn.Parameter(torch.zeros(1, 8, 7))
    with pytest.raises(RuntimeError, match=r"weight_deep_l0 must have shape \(K - 1, 8, 8\), got \(1, 8, 7\)"):
        broken(x)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        module(x, torch.zeros(1, 2, 8))
