"""A recurrence in chunks of time side by side: the plain one's numbers, few steps in turn, what does not fit."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from fused_rin import chunks as chunked
from fused_rin import parallel_recurrence, recurrence
from torch import Tensor

STEPS, BATCH, GROUPS, HIDDEN = 150, 3, 2, 6
# form, activation, skip, gain, largest of the weight's singular values: each forgets by half in a few steps
KINDS = [
    ("inside", "tanh", 0.0, 1.0, 0.5),
    ("inside", "relu", 0.2, 1.0, 0.4),
    ("outside", "tanh", 0.4, 0.5, 0.3),
    ("current", "sigmoid", 0.4, 1.0, 0.3),
]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Arguments:
    """Of a call, and what its results are multiplied with before gradients are taken."""

    def __init__(self, kind, steps=STEPS, dtype=torch.float64, lengths=None, resets=False, batch=BATCH):
        form, activation, skip, gain, norm = kind
        draw = torch.Generator().manual_seed(1)

        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        weight = normal(GROUPS, HIDDEN, HIDDEN)
        weight *= norm / torch.linalg.matrix_norm(weight.double(), 2)[:, None, None].to(dtype)
        self.tensors = {"pre": normal(steps, batch, GROUPS, HIDDEN), "weight": weight}
        self.tensors["h0"] = normal(batch, GROUPS, HIDDEN)
        self.rest = {"form": form, "activation": activation, "lengths": lengths, "skip": skip}
        if form != "inside":
            self.tensors["skip"] = skip * (1 + 0.1 * normal(GROUPS, HIDDEN))
            del self.rest["skip"]
        if form == "outside":
            self.tensors["gain"] = gain * (1 + 0.1 * normal(GROUPS, HIDDEN))
            self.tensors["noise"] = 0.1 * normal(steps, batch, GROUPS, HIDDEN)
        self.rest["resets"] = torch.rand(steps, batch, generator=draw) < 0.05 if resets else None
        self.upstream = normal(steps, batch, GROUPS, HIDDEN), normal(batch, GROUPS, HIDDEN)

    def results(self, function, use=(True, True), **more) -> dict[str, Tensor]:
        """out, h_n and the gradients of all tensors."""
        leaves = {name: t.clone().requires_grad_() for name, t in self.tensors.items()}
        out, h_n = function(**leaves, **self.rest, **more)
        loss = sum((t * g).sum() for t, g, used in zip((out, h_n), self.upstream, use, strict=True) if used)
        grads = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), grads, strict=True)]
        return {"out": out, "h_n": h_n, **dict(zip(leaves, grads, strict=True))}


def assert_equal_to(results, expected, share):
    """Up to a share of the largest of each."""
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        error = (results[name] - want).abs().max().item()
        assert error <= share * max(1e-30, want.abs().max().item()), (name, error)


@pytest.fixture
def calls(monkeypatch):
    """The steps of every call of `recurrence` that a parallel one makes, but of those that only check."""
    made = []

    def counting(pre, *args, **kwargs):
        if pre.shape[0]:
            made.append(pre.shape[0])
        return recurrence(pre, *args, **kwargs)

    monkeypatch.setattr(chunked, "recurrence", counting)
    return made


ROWS = [("full", False), ("full", True), ("lengths", False), ("lengths", True)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
@pytest.mark.parametrize(("rows", "resets"), ROWS)
@pytest.mark.parametrize(("steps", "chunks"), [(150, 3), (151, 3), (149, 4)])
def test_equals_the_plain_one(kind, rows, resets, steps, chunks):
    """Also where sequences end in other chunks, or have no step at all; and where a part has no gradient."""
    lengths = [steps, 0, steps // 2] if rows == "lengths" else None
    case = Arguments(kind, steps, lengths=lengths, resets=resets)
    for use in ((True, True), (True, False), (False, True)):
        expected = case.results(recurrence, use)
        results = case.results(parallel_recurrence, use, chunks=chunks, warm_up=37, tolerance=1e-11)
        assert_equal_to(results, expected, 1e-10)


@pytest.mark.parametrize("lengths", [None, [1, 2, 40], [50, 51, 52], [100, 101, 149]])
def test_gradients_of_last_states_near_the_borders(lengths):
    """Within the warm-up of the gradients, and at its edges."""
    case = Arguments(KINDS[0], 150, lengths=lengths)
    expected = case.results(recurrence, (False, True))
    for warm_up in (1, 2, 50):
        results = case.results(
            parallel_recurrence, (False, True), chunks=3, warm_up=warm_up, max_sweeps=3, tolerance=1e-12
        )
        assert_equal_to(results, expected, 1e-11)


def test_what_runs_in_turn_is_a_chunk_and_its_warm_up(calls):
    case = Arguments(KINDS[0], 160)
    case.results(parallel_recurrence, chunks=4, warm_up=32, tolerance=1e-8)
    assert calls == [32, 40, 32]  # forward: warm-up and chunks; backward: warm-up once more, for its gradient
    calls.clear()
    with torch.no_grad():
        parallel_recurrence(**case.tensors, **case.rest, chunks=5, tolerance=1e-2)
    assert calls == [8, 32]  # a quarter of a chunk


def test_sweeps_are_repeated_until_the_states_fit(calls):
    """Without a warm-up, a second sweep starts where the first one's chunks ended."""
    case = Arguments(KINDS[0], 160)
    with torch.no_grad():
        expected = recurrence(**case.tensors, **case.rest)
        for tolerance, sweeps in ((2.0, 1), (1e-6, 2)):
            calls.clear()
            out, _ = parallel_recurrence(
                **case.tensors, **case.rest, chunks=4, warm_up=0, tolerance=tolerance, max_sweeps=4
            )
            assert calls == [40] * sweeps
            assert (out - expected[0]).abs().max() <= tolerance * expected[0].abs().max() + 1e-15


@pytest.mark.parametrize("warm_up", [4, 8, 16, 24])
def test_the_error_is_below_the_tolerance(warm_up):
    """Whatever the warm-up gives: with little of it chunks run twice, with enough once."""
    for dtype, kind in itertools.product((torch.float32, torch.float64), KINDS):
        case = Arguments(kind, 128, dtype)
        expected = Arguments(kind, 128).results(recurrence)
        results = case.results(parallel_recurrence, chunks=4, warm_up=warm_up, tolerance=1e-4, max_sweeps=3)
        assert_equal_to(results, expected, 5e-4 if dtype == torch.float32 else 3e-4)


@pytest.mark.parametrize("use", [(True, True), (True, False)])
def test_a_network_that_remembers_runs_in_turn_and_says_so(calls, use):
    case = Arguments(("inside", "relu", 1.0, 1.0, 0.01), 60)
    expected = case.results(recurrence, use)
    with pytest.warns(RuntimeWarning, match=r"after 2 sweeps of 5 chunks the states still differ by .* one after the"):
        results = case.results(parallel_recurrence, use, chunks=5)
    assert calls == [3, 12, 12, 60]
    for name, want in expected.items():
        assert torch.equal(results[name], want), name


def test_gradients_that_remember_run_in_turn_and_say_so(calls):
    """The states are zeros from everywhere; a gradient is the sum of all that come after."""
    case = Arguments(("inside", "none", 1.0, 1.0, 0.0), 60)
    case.tensors["pre"].zero_()
    case.tensors["h0"].zero_()
    expected = case.results(recurrence)
    with pytest.warns(RuntimeWarning, match=r"after 2 sweeps of 5 chunks the gradients still differ by"):
        results = case.results(parallel_recurrence, chunks=5)
    assert calls == [3, 12, 3, 60]
    for name, want in expected.items():
        assert torch.equal(results[name], want), name


def test_episodes_that_begin_where_chunks_do_cut_the_memory(calls):
    """A network that remembers, without a warm-up: nothing has to fit, and nothing is run twice."""
    case = Arguments(("inside", "relu", 1.0, 1.0, 0.01), 60)
    case.rest["resets"] = torch.zeros(60, BATCH, dtype=torch.bool)
    case.rest["resets"][::12] = True
    results = case.results(parallel_recurrence, chunks=5, warm_up=0, max_sweeps=1)
    assert calls == [12]
    assert_equal_to(results, case.results(recurrence), 1e-13)


@pytest.mark.parametrize("kind", [KINDS[0], ("inside", "relu", 1.0, 1.0, 0.01)], ids=["forgets", "remembers"])
def test_as_many_sweeps_as_chunks_are_exact_for_every_network(kind):
    case = Arguments(kind, 40)
    results = case.results(parallel_recurrence, chunks=5, warm_up=0, max_sweeps=5, tolerance=1e-15)
    assert_equal_to(results, case.results(recurrence), 1e-12)


def test_what_is_not_finite_runs_in_turn():
    case = Arguments(KINDS[0], 40)
    case.tensors["pre"][7, 1] = torch.nan
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="the states still differ by nan"):
            out, _ = parallel_recurrence(**case.tensors, **case.rest, chunks=4)
        assert torch.equal(out.isnan(), recurrence(**case.tensors, **case.rest)[0].isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """The state is rounded where chunks meet: one rounding more than the plain one has."""
    case, exact = Arguments(KINDS[0], 128, dtype), Arguments(KINDS[0], 128)
    exact.tensors = {name: t.double() for name, t in case.tensors.items()}
    exact.upstream = tuple(t.double() for t in case.upstream)
    expected, plain = exact.results(recurrence), case.results(recurrence)
    results = case.results(parallel_recurrence, chunks=4, warm_up=32, tolerance=1e-2)
    for name, want in expected.items():
        error, theirs = ((r[name].double() - want).abs().max().item() for r in (results, plain))
        assert error <= 2 * theirs + 4 * torch.finfo(dtype).eps * want.abs().max().item(), name


def test_one_chunk_no_steps_and_more_chunks_than_steps(calls):
    case = Arguments(KINDS[0], 5)
    expected = case.results(recurrence)
    for number in (1, 5, 9):
        results = case.results(parallel_recurrence, chunks=number, max_sweeps=5, tolerance=1e-15)
        assert_equal_to(results, expected, 1e-13)
    calls.clear()
    out, h_n = parallel_recurrence(case.tensors["pre"][:0], *[*case.tensors.values()][1:3], chunks=4)
    assert out.shape == (0, BATCH, GROUPS, HIDDEN)
    assert torch.equal(h_n, case.tensors["h0"])
    out, h_n = parallel_recurrence(case.tensors["pre"][:, :0], case.tensors["weight"], chunks=2)
    assert out.shape == (5, 0, GROUPS, HIDDEN)
    assert h_n.shape == (0, GROUPS, HIDDEN)


def test_only_what_is_asked_for_has_a_gradient():
    case = Arguments(KINDS[2], 60)
    expected = case.results(recurrence)
    for name in case.tensors:
        tensors = {other: t.clone().requires_grad_(other == name) for other, t in case.tensors.items()}
        out, h_n = parallel_recurrence(**tensors, **case.rest, chunks=3, tolerance=1e-10, max_sweeps=3)
        ((out * case.upstream[0]).sum() + (h_n * case.upstream[1]).sum()).backward()
        assert [other for other, t in tensors.items() if t.grad is not None] == [name]
        assert_equal_to({name: tensors[name].grad}, {name: expected[name]}, 1e-9)


def test_a_weight_changed_before_backward_is_noticed():
    case = Arguments(KINDS[0], 60)
    weight = case.tensors["weight"].requires_grad_()
    out, _ = parallel_recurrence(**case.tensors, **case.rest, chunks=3, warm_up=20)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivatives_are_the_plain_ones():
    for kind in (KINDS[0], KINDS[2]):
        case, found = Arguments(kind, 30), []
        for function, more in ((recurrence, {}), (parallel_recurrence, {"chunks": 3, "warm_up": 10, "max_sweeps": 3})):
            leaves = {name: t.clone().requires_grad_() for name, t in case.tensors.items()}
            out, h_n = function(**leaves, **case.rest, **more)
            loss = (out * case.upstream[0]).sum() + h_n.square().sum()
            first = torch.autograd.grad(loss, [*leaves.values()], create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            second = torch.autograd.grad(penalty, [*leaves.values()], allow_unused=True)
            second = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), second, strict=True)]
            found.append(dict(zip(leaves, second, strict=True)))
        assert all(g.abs().max() > 0 for g in found[0].values())
        assert_equal_to(found[1], found[0], 1e-4)


def test_transforms_see_the_plain_one():
    case = Arguments(KINDS[0], 30)
    tensors = [case.tensors[name] for name in ("pre", "weight", "h0")]

    def loss(function, weight, **more):
        return function(tensors[0], weight, tensors[2], **case.rest, **more)[0].square().sum()

    got = torch.func.grad(lambda w: loss(parallel_recurrence, w, chunks=3))(tensors[1])
    torch.testing.assert_close(got, torch.func.grad(lambda w: loss(recurrence, w))(tensors[1]))
    compiled = torch.compile(lambda w: loss(parallel_recurrence, w, chunks=3), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tensors[1]), loss(recurrence, tensors[1]))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"chunks": 0}, ValueError, "chunks must be at least 1, got 0"),
        ({"chunks": 2.0}, TypeError, "chunks must be an int, got 2.0"),
        ({"chunks": True}, TypeError, "chunks must be an int, got True"),
        ({"max_sweeps": 0}, ValueError, "max_sweeps must be at least 1, got 0"),
        ({"warm_up": -1}, ValueError, "warm_up must be at least 0, got -1"),
        ({"warm_up": 1.5}, TypeError, "warm_up must be an int, got 1.5"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive and finite, got 0.0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be positive and finite, got nan"),
        (
            {"weight": torch.zeros(GROUPS, 5, HIDDEN)},
            RuntimeError,
            r"Expected weight size \(2, 6, 6\), got \[2, 5, 6\]",
        ),
        ({"h0": torch.zeros(1, GROUPS, HIDDEN)}, RuntimeError, r"Expected h0 size \(3, 2, 6\), got \[1, 2, 6\]"),
        ({"pre": torch.zeros(4, 3, 12)}, RuntimeError, r"pre must have 4 dimensions \[T, B, G, D\], got 3"),
        ({"lengths": [1, 2, 999]}, ValueError, r"lengths must be in \[0, 150\], got values from 1 to 999"),
        ({"lengths": [1, 2]}, RuntimeError, r"Expected lengths size \(3,\), got \[2\]"),
        ({"resets": torch.zeros(2, 3, dtype=torch.bool)}, RuntimeError, r"resets must have shape \(150, 3\)"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
        ({"form": "around"}, ValueError, "form must be one of"),
        ({"backend": "tpu"}, ValueError, "backend"),
        ({"gain": 2.0}, ValueError, "gain is for form='outside'"),
        ({"form": "outside", "noise": torch.zeros(3, 3, 2, 6)}, RuntimeError, r"Expected noise size \(150, 3, 2, 6\)"),
    ],
)
def test_bad_arguments(change, error, text):
    given = {**Arguments(KINDS[0], dtype=torch.float32).tensors, "activation": "tanh", "skip": 0.0, "chunks": 4}
    with pytest.raises(error, match=text):
        parallel_recurrence(**{**given, **change})
