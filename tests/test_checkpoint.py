"""checkpoint_steps and return_sequences: the same numbers in less memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import fused_rin
import pytest
import torch
from fused_rin import PLRNN, RIN, LeakyRNN, checkpoint, cpu, cpu_layers
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tests.conftest import use_threads

MODULES: dict[str, Callable[..., Any]] = {
    "rin": RIN,
    "rnn": lambda *sizes, **more: RIN(*sizes, nonlinearity="tanh", skip=0.0, **more),
    "rate": lambda *sizes, **more: LeakyRNN(*sizes, alpha=0.3, train_alpha=True, nonlinearity="tanh", **more),
    "current": lambda *sizes, **more: LeakyRNN(*sizes, alpha=0.2, form="current", **more),
    "plrnn": lambda *sizes, **more: PLRNN(*sizes, skip=0.7, nonlinearity="tanh", **more),
}
BATCHES = ("full", "first", "lengths", "resets", "packed", "packed resets")
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


def make(kind: str, inputs: int, hidden: int, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(hidden)
    module = MODULES[kind](inputs, hidden, dtype=dtype, **more)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith("weight"):
                p.copy_(torch.randn(p.shape) * 0.2 / p.shape[1] ** 0.5)
    return module


class Call:
    """A batch of some kind, with leaves for all that may have a gradient."""

    def __init__(self, module: Any, steps: int, batch: int, kind: str) -> None:
        draw = torch.Generator().manual_seed(steps)
        dtype, sizes = module.weight_ih_l0.dtype, (batch, steps) if module.batch_first else (steps, batch)
        layers = module.num_layers * (2 if module.bidirectional else 1)
        self.h = torch.randn(layers, batch, module.hidden_size, generator=draw).to(dtype).requires_grad_()
        self.x: Any = torch.randn(*sizes, module.input_size, generator=draw).to(dtype).requires_grad_()
        self.leaf, self.options = self.x, {}
        rows: tuple[int, ...] = sizes
        lengths = torch.randint(0, steps + 1, (batch,), generator=draw)
        lengths[0] = steps
        if kind.startswith("packed"):
            packed = pack_padded_sequence(self.x.detach(), lengths.clamp(min=1), enforce_sorted=False)
            self.leaf = packed.data.clone().requires_grad_()
            self.x, rows = PackedSequence(self.leaf, *packed[1:]), (len(packed.data),)
        elif kind == "lengths":
            self.options["lengths"] = lengths
        if "resets" in kind:
            self.options["resets"] = torch.rand(rows, generator=draw) < 4 / steps
            # On both sides of a border between two spans of one sequence (256 steps).
            if batch == 1:
                self.options["resets"][[-256, -257]] = True

    def results(self, module: Any) -> list[Tensor]:
        """Outputs and gradients of everything."""
        out, h_n = module(self.x, self.h, **self.options)
        out = out.data if isinstance(out, PackedSequence) else out
        draw = torch.Generator().manual_seed(1)
        loss = sum((t.float() * torch.randn(t.shape, generator=draw)).sum() for t in (out, h_n))
        grads = torch.autograd.grad(loss, [*module.parameters(), self.leaf, self.h])
        return [t.detach() for t in (out, h_n, *grads)]


def count_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    calls = {"forward_of_span": 0, "backward_of_span": 0}
    for name in calls:
        function = getattr(cpu_layers, name)

        def counted(*args: Any, name: str = name, function: Any = function, **kw: Any) -> None:
            calls[name] += 1
            function(*args, **kw)

        monkeypatch.setattr(cpu_layers, name, counted)
    return calls


def assert_same_bits(got: list[Tensor], want: list[Tensor], what: str = "") -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"{what}: result {i} differs"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", MODULES)
def test_the_same_bits_on_a_cpu(monkeypatch, kind, batch, dtype):
    """A layer of one recurrence: outputs and gradients are those of a layer that keeps everything."""
    for steps, rows, inputs, hidden, every in ((600, 1, 3, 20, 40), (90, 70, 4, 17, 7)):
        module = make(kind, inputs, hidden, DTYPES[dtype], batch_first=batch == "first")
        call = Call(module, steps, rows, batch)
        want = call.results(module)
        module.checkpoint_steps = every
        calls = count_calls(monkeypatch)
        assert_same_bits(call.results(module), want, f"B={rows}")
        spans = calls["backward_of_span"]
        assert spans > 1
        assert calls["forward_of_span"] == 2 * spans


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_in_every_instruction_set_and_on_threads(isa, threads):
    """One sequence, whose outputs threads share, many, whose rows they share, and one that starts from nothing."""
    for steps, rows, hidden in ((270, 1, 300), (24, 50, 40)):
        for kind, dtype in (("rin", torch.float32), ("rate", torch.bfloat16)):
            module = make(kind, 5, hidden, dtype)
            call = Call(module, steps, rows, "full")
            with cpu.use_instruction_set(isa), use_threads(threads):
                want = call.results(module)
                module.checkpoint_steps = 8
                assert_same_bits(call.results(module), want, f"{kind} B={rows}")
                outs = []
                for module.checkpoint_steps in (None, 8):
                    x = call.x.detach()
                    out, h_n = module(x)
                    outs.append([out.detach(), *torch.autograd.grad(h_n.float().sum(), list(module.parameters()))])
                assert_same_bits(*outs, "without h0 and without a gradient of the output")


def test_the_same_bits_when_a_team_ends_under_way():
    module = make("rin", 3, 300)
    call = Call(module, 300, 1, "full")
    want = call.results(module)
    module.checkpoint_steps = 100
    try:
        with use_threads(2):
            for meeting in (1, 5, 150, 900):
                cpu._native.end_teams_at(meeting)
                assert_same_bits(call.results(module), want, f"meeting {meeting}")
                cpu._native.forget_crowds()
    finally:
        cpu._native.end_teams_at(0)
        cpu._native.forget_crowds()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rin", {"bidirectional": True}),
        ("rnn", {"bidirectional": True, "num_heads": 2, "num_layers": 2}),
        ("rin", {"backend": "reference"}),
        ("rate", {"num_heads": 2}),
        ("current", {"bidirectional": True}),
        ("plrnn", {"num_layers": 3, "bias": False}),
    ],
)
def test_other_ways_to_rounding(kind, options, batch):
    """Several recurrences, layers above each other and other backends: span by span, in another order of sums."""
    for steps, rows, every in ((40, 7, 7), (9, 3, 1)):
        module = make(kind, 4, 18, torch.float64, batch_first=batch == "first", **options)
        call = Call(module, steps, rows, batch)
        want = call.results(module)
        module.checkpoint_steps = every
        for got, exact in zip(call.results(module), want, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12 * float(1 + exact.abs().max()))


def test_noise_is_the_same_in_both_passes():
    for form, after in (("rate", False), ("rate", True), ("current", False)):
        module = LeakyRNN(3, 12, alpha=0.3, train_alpha=True, form=form, noise=0.5, noise_after=after)
        results = []
        for every in (None, 5):
            module.checkpoint_steps = every
            call = Call(module, 300, 4, "full")
            torch.manual_seed(5)
            results.append(call.results(module))
        assert_same_bits(*results, f"{form} {after}")


def saved_bytes(module: Any, *arguments: Tensor) -> int:
    """Of tensors that are kept for backward, weights apart; each storage once."""
    storages: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in module.parameters()}

    def pack(t: Tensor) -> Tensor:
        storages.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, h_n = module(*arguments)
    kept = sum(storages.values())
    del out, h_n
    return kept


@pytest.mark.parametrize("kind", MODULES)
def test_what_is_kept(kind):
    """The input and a state for every span; at 20,000 steps of 64 units 5.12 MB otherwise."""
    steps, hidden = 20_000, 64
    module, x = make(kind, 1, hidden), torch.randn(20_000, 1, 1)
    states, inputs = steps * hidden * 4, steps * 4
    assert saved_bytes(module, x) >= states + inputs
    module.checkpoint_steps, module.return_sequences = 500, False
    # Spans end every 512 steps; factors of units and scaled weights are derived from parameters.
    derived = 2 * 4 * sum(p.numel() for p in module.parameters())
    assert saved_bytes(module, x) <= inputs + (steps // 512 + 2) * hidden * 4 + derived


def test_without_gradients_no_output_is_made(monkeypatch):
    """Spans, too, where the output would be large; below that one call, whose output is dropped."""
    calls = count_calls(monkeypatch)
    module = make("rnn", 1, 64, return_sequences=False)
    with torch.no_grad():
        out, h_n = module(torch.ones(100, 1, 1))
        assert out is None
        assert calls["forward_of_span"] == 0
        x = torch.randn(140_000, 1, 1)
        assert x.numel() * 64 * 4 > checkpoint.AUTO_BYTES
        out, h_n = module(x)
        assert out is None
        assert calls["forward_of_span"] > 100
        module.return_sequences = True
        before = calls["forward_of_span"]
        assert torch.equal(module(x)[1], h_n)
        assert calls["forward_of_span"] == before


@pytest.mark.parametrize("kind", MODULES)
def test_return_sequences(kind):
    for options in ({}, {"batch_first": True}, {"bidirectional": True, "num_layers": 2}):
        module = make(kind, 3, 10, **options)
        x = torch.randn(6, 6, 3)
        want = module(x)[1]
        unbatched = module(x[0])[1]
        packed = module(pack_padded_sequence(x, torch.tensor([6, 5, 5, 2, 2, 1])))[1]
        step = module(x[:1, :1])[1].detach()
        for every in (None, 2):
            module.checkpoint_steps, module.return_sequences = every, False
            for given, expected in ((x, want), (x[0], unbatched)):
                out, h_n = module(given)
                assert out is None
                torch.testing.assert_close(h_n, expected)
            out, h_n = module(pack_padded_sequence(x, torch.tensor([6, 5, 5, 2, 2, 1])))
            assert out is None
            torch.testing.assert_close(h_n, packed)
            with torch.no_grad():  # the way of a few steps
                out, h_n = module(x[:1, :1])
            assert out is None
            torch.testing.assert_close(h_n, step)


def test_auto_starts_above_a_size():
    numbers = checkpoint.AUTO_BYTES // 4
    assert checkpoint.span_steps("auto", 10_000, numbers, torch.float32) is None
    assert checkpoint.span_steps("auto", 10_000, numbers + 1, torch.float32) == 100
    assert checkpoint.span_steps("auto", 10_000, numbers + 1, torch.bfloat16) is None
    assert checkpoint.span_steps(7, 10_000, 1, torch.float32) == 7
    assert checkpoint.span_steps(7, 7, 1, torch.float32) is None
    assert checkpoint.span_steps(None, 10**9, 10**12, torch.float32) is None


def test_gradients_of_gradients_and_of_batches():
    plain = make("rin", 3, 8, torch.float64)
    module = copy.deepcopy(plain)
    module.checkpoint_steps = 4
    x = torch.randn(20, 30, 3, dtype=torch.float64, requires_grad=True)

    def second(m: Any) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(m(x)[0].square().sum(), x, create_graph=True)
        assert grad.requires_grad
        return torch.autograd.grad(grad.square().sum(), [x, *m.parameters()])

    for a, b in zip(second(module), second(plain), strict=True):
        torch.testing.assert_close(a, b)
    short = x[:6, :2].detach()
    jacobians = [
        torch.autograd.functional.jacobian(lambda z, m=m: m(z)[1], short, vectorize=True) for m in (module, plain)
    ]
    torch.testing.assert_close(*jacobians)
    # Transforms have no hooks for tensors that are saved: everything is kept.
    each = torch.func.vmap(lambda z: module(z)[0])(x[None].detach())
    torch.testing.assert_close(each[0], plain(x)[0].detach())


def test_compilers_exporters_and_autocast(monkeypatch):
    plain = make("rin", 3, 8)
    module = copy.deepcopy(plain)
    module.checkpoint_steps = 4
    x = torch.randn(20, 30, 3)
    calls = count_calls(monkeypatch)
    want = plain(x)[0]
    compiled = torch.compile(module, backend="aot_eager")
    out, _ = compiled(x)
    torch.testing.assert_close(out, want)
    grads = torch.autograd.grad(out.sum(), list(module.parameters()))
    torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), list(plain.parameters())))
    assert calls["backward_of_span"] > 1, "compiled code keeps every state"
    before = dict(calls)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x)[0], want)
    traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x)[0], want)
    assert calls == before
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = module(x)[0], plain(x)[0]
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert saved_bytes(module, x) < saved_bytes(plain, x)


def test_hooks_on_saved_tensors_hand_back_copies():
    module = make("rate", 3, 8, checkpoint_steps=2)
    call = Call(module, 40, 30, "lengths")
    want = call.results(module)
    strided = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t.clone()  # noqa: E731
    for pack in (lambda t: t.double(), strided):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            got = call.results(module)
        assert_same_bits(got, want)


def test_explain_says_it():
    module = RIN(1, 128, checkpoint_steps="auto")
    assert "spans" not in str(fused_rin.explain(module, (1000, 1, 1)))
    assert "in spans of some 316 steps, computed again for backward" in str(fused_rin.explain(module, (100_000, 1, 1)))
    with torch.no_grad():
        assert "spans" not in str(fused_rin.explain(module, (100_000, 1, 1)))
        module.return_sequences = False
        assert fused_rin.explain(module, (100_000, 1, 1)).plan.endswith("in spans of some 316 steps")


def test_arguments():
    for kind in MODULES.values():
        with pytest.raises(ValueError, match="checkpoint_steps must be at least 1, got 0"):
            kind(1, 4, checkpoint_steps=0)
        for wrong in (2.5, True, "sometimes"):
            with pytest.raises(TypeError, match=r"checkpoint_steps must be an int, 'auto' or None, got "):
                kind(1, 4, checkpoint_steps=wrong)
        with pytest.raises(TypeError, match="return_sequences must be a bool, got None"):
            kind(1, 4, return_sequences=None)
        module = kind(1, 4)
        with pytest.raises(ValueError, match="checkpoint_steps must be at least 1, got -3"):
            module.checkpoint_steps = -3
        assert module.checkpoint_steps is None
        assert "checkpoint" not in repr(module)
        module.checkpoint_steps = "auto"
        assert "checkpoint_steps=auto" in repr(module)
        again = pickle.loads(pickle.dumps(module))
        assert again.checkpoint_steps == "auto"
        assert "return_sequences=False" in repr(kind(1, 4, return_sequences=False))


def test_modules_are_exchanged_all_the_same():
    model = torch.nn.Sequential(RIN(2, 4, skip=0.0, checkpoint_steps=5))
    restored = fused_rin.restore_rnn(model)
    assert type(restored[0]) is torch.nn.RNN
    x = torch.randn(9, 3, 2)
    torch.testing.assert_close(restored(x)[0], model(x)[0])
