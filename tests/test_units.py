"""Units with factors of their own: the skip inside, outside of the activation, and states that are currents."""

from __future__ import annotations

import math

import pytest
import torch
from fused_rin import BackendError, cpu, explain, recurrence, reference
from fused_rin.problem import ACTIVATIONS, FORMS, Rows, Units

from tests.conftest import check_sweeps, layouts, make_case, name_of, use_threads

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned")


def loop(pre, weight, h0, form, activation, skip, gain=None, noise=None):
    """The three equations, for one recurrence [T, B, D], as they stand in the docstring of `recurrence`."""
    act = {**vars(torch.nn.functional), "none": lambda a: a}[activation]
    h, out = h0, []
    for t in range(pre.shape[0]):
        if form == "inside":
            h = act(pre[t] + h @ weight.T + skip * h)
        elif form == "outside":
            h = skip * h + gain * act(pre[t] + h @ weight.T) + (0 if noise is None else noise[t])
        else:
            h = skip * h + pre[t] + act(h) @ weight.T
        out.append(h)
    return torch.stack(out)


def leaves(form, *, steps=5, batch=3, hidden=4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    pre, weight, h0 = normal(steps, batch, 1, hidden), normal(1, hidden, hidden), normal(batch, 1, hidden)
    skip = torch.rand(1, hidden, generator=draw, dtype=dtype).requires_grad_()
    gain = noise = None
    if form == "outside":
        gain, noise = torch.rand(1, hidden, generator=draw, dtype=dtype).requires_grad_(), normal(*pre.shape)
    return pre, weight, h0, skip, gain, noise


def run(form, activation, tensors, **options):
    pre, weight, h0, skip, gain, noise = tensors
    more = {"gain": gain, "noise": noise} if form == "outside" else {}
    return recurrence(pre, weight, h0, skip=skip, form=form, activation=activation, **more, **options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_states_and_gradients_are_those_of_a_loop(form, activation, backend):
    tensors = leaves(form)
    pre, weight, h0, skip, gain, noise = tensors
    out, h_n = run(form, activation, tensors, backend=backend)
    given = [t for t in tensors if t is not None]
    squeezed = (t if t is None else t.squeeze(-2) for t in (skip, gain, noise))
    want = loop(pre[:, :, 0], weight[0], h0[:, 0], form, activation, *squeezed)
    torch.testing.assert_close(out[:, :, 0], want)
    torch.testing.assert_close(h_n[:, 0], want[-1])
    weights = torch.randn_like(want)
    got = torch.autograd.grad((out[:, :, 0] * weights).sum() + h_n.square().sum(), given)
    wanted = torch.autograd.grad((want * weights).sum() + want[-1].square().sum(), given)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["tanh", "softplus", "sigmoid"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_gradients(form, activation):
    tensors = [t for t in leaves(form, steps=3, batch=2, hidden=3) if t is not None]

    def function(*given):
        padded = [*given, *[None] * (6 - len(given))]
        return run(form, activation, padded, resets=resets)

    resets = torch.tensor([[True, False], [False, True], [False, False]])
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("options", layouts((3, 1)), ids=name_of)
@pytest.mark.parametrize("form", FORMS)
def test_all_rows_have_the_gradients_of_the_reference(form, options):
    """Weight and factors too, whose sums know which state entered which step; softplus is not 0 where a state is."""
    case = make_case(6, 5, 4, form=form, activation="softplus", dtype=torch.float64, noise=True, **options)
    results = []
    sizes = None if case.offsets is None else (case.lengths > torch.arange(6)[:, None]).sum(1)
    for backend in ("cpu", "reference"):
        units = case.units
        given = [case.pre, case.weight, case.h0, units.skip, units.gain, units.noise]
        given = [None if t is None else t.clone().requires_grad_() for t in given]
        more = {} if form != "outside" else {"gain": given[4], "noise": given[5]}
        rows = {"lengths": case.lengths} if sizes is None else {"batch_sizes": sizes}
        if backend == "cpu":
            out, h_n = recurrence(
                *given[:3], skip=given[3], form=form, activation="softplus", resets=case.resets,
                reverse=[False, False, True], **more, **rows,
            )  # fmt: skip
        else:  # by autograd of the loop itself
            used = Units(form, given[3], given[4], given[5])
            out, h_n = reference.forward(given[0], given[1], given[2], case.rows, case.rule, units=used)
        torch.manual_seed(1)
        loss = (out * torch.randn_like(out)).sum() + (h_n * torch.randn_like(h_n)).sum()
        results.append((out, h_n, *torch.autograd.grad(loss, [t for t in given if t is not None])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_kernels_by_the_tolerance_rule(isa, form, activation, dtype):
    for steps, batch, hidden in ((1, 1, 1), (7, 3, 17), (5, 2, 64), (9, 7, 37)):
        case = make_case(steps, batch, hidden, form=form, activation=activation, dtype=dtype, noise=hidden != 64)
        check_sweeps(cpu.forward, cpu.backward, case)


@pytest.mark.parametrize("options", layouts((1, 0), (1, 1), (3, 1)), ids=name_of)
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form, options):
    for dtype, activation in ((torch.float32, "sigmoid"), (torch.bfloat16, "relu")):
        check_sweeps(
            cpu.forward, cpu.backward, make_case(5, 7, 18, form=form, activation=activation, dtype=dtype, **options)
        )


@pytest.mark.parametrize("layout", ["full", "lengths"])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_shared_by_threads(form, layout):
    case = make_case(33, 1, 400, form=form, activation="softplus", layout=layout, resets=True)
    check_sweeps(cpu.forward, cpu.backward, case, threads=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_team_that_ends_leaves_the_same_bits(form, activation):
    case = make_case(40, 1, 400, form=form, activation=activation, resets=True)
    _, *arguments = case.arguments

    def both(pre):
        aside = torch.empty_like(pre)
        out = cpu.forward(pre, *arguments, units=case.units, aside=aside)
        saved = aside if form == "outside" else out[0]
        return *out, *cpu.backward(pre, case.h0, case.weight, saved, case.rows, case.rule, units=case.units, h0=case.h0)

    want = both(case.pre)
    with use_threads(2):
        try:
            for meeting in (2, 9, 30):
                cpu._native.forget_crowds()
                cpu._native.end_teams_at(meeting)
                for a, b in zip(both(case.pre), want, strict=True):
                    assert torch.equal(a, b)
        finally:
            cpu._native.end_teams_at(0)
            cpu._native.forget_crowds()


@pytest.mark.parametrize("form", FORMS)
def test_streaming_equals_the_whole_sequence_bit_for_bit(form):
    case = make_case(12, 3, 33, form=form, activation="tanh")
    whole, h_n = cpu.forward(*case.arguments, units=case.units)
    h, parts = case.h0, []
    for part in case.pre.split([5, 1, 6]):
        out, h = cpu.forward(part, case.weight, h, case.rows, case.rule, units=case.units)
        parts.append(out)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(h, h_n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "softplus"])
def test_activations_are_accurate_to_a_few_last_places(isa, activation, dtype):
    edge = 85 if dtype == torch.float32 else 700  # beyond, values are subnormal numbers or infinite exponents
    x = torch.cat([torch.linspace(-edge, edge, 100_001), torch.logspace(-30, 0, 2_000), -torch.logspace(-30, 0, 2_000)])
    pre = torch.cat([x, torch.zeros(-len(x) % 16)]).to(dtype).view(1, -1, 1, 16)
    zero = pre.new_zeros(1, 16, 16)
    rule = make_case(1, 1, 1, activation=activation).rule._replace(skip=0.0)
    out, _ = cpu.forward(pre, zero, None, Rows(), rule)
    want = reference.ACTIVATIONS[activation](pre.double() if dtype == torch.float32 else pre)
    error = ((out.double() - want).abs() / want.abs()).max().item()
    assert error <= 4 * torch.finfo(dtype).eps
    # The slope from the value, and from the argument, where the state is a current.
    ones = torch.ones_like(pre)
    slope, _ = cpu.backward(ones, None, zero, out, Rows(), rule)
    exact = torch.sigmoid(pre.double()) if activation == "softplus" else want * (1 - want)
    small = pre < 0 if activation == "sigmoid" else pre < math.inf
    error = ((slope.double() - exact).abs() / exact)[small].max().item()
    assert error <= 8 * torch.finfo(dtype).eps
    for value, limit in ((math.inf, 1 if activation == "sigmoid" else math.inf), (-math.inf, 0)):
        assert (cpu.forward(torch.full_like(pre, value), zero, None, Rows(), rule)[0] == limit).all()
    assert cpu.forward(torch.full_like(pre, math.nan), zero, None, Rows(), rule)[0].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_infinities_and_nan_spread_as_in_the_reference(form):
    for activation in ACTIVATIONS:
        for place in ("pre", "weight", "h0"):
            for value in (math.nan, math.inf, -math.inf):
                case = make_case(4, 2, 20, form=form, activation=activation)
                getattr(case, place).view(-1)[-1] = value
                got = cpu.forward(*case.arguments, units=case.units)
                want = reference.forward(*case.arguments, units=case.units)
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_numbers_and_vectors_as_factors():
    case = make_case(5, 2, 6, groups=2)
    whole = torch.full((2, 6), 0.25)
    want = recurrence(case.pre, case.weight, case.h0, skip=0.75 * torch.ones(2, 6), gain=whole, form="outside")
    for skip, gain in ((0.75, 0.25), (torch.tensor(0.75), torch.full((6,), 0.25)), (torch.full((2, 1), 0.75), 0.25)):
        got = recurrence(case.pre, case.weight, case.h0, skip=skip, gain=gain, form="outside")
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    # A vector of equal skips is the RIN's skip.
    got = recurrence(case.pre, case.weight, case.h0, skip=torch.ones(6))
    for a, b in zip(got, recurrence(case.pre, case.weight, case.h0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_keep_their_digits_in_16_bits(dtype):
    """1 - alpha for a long time constant, 0.999, is 1 in bfloat16: such a network would never forget."""
    pre, weight = torch.zeros(1000, 1, 1, 4, dtype=dtype), torch.zeros(1, 4, 4, dtype=dtype)
    h0 = torch.ones(1, 1, 4, dtype=dtype)
    _, h_n = recurrence(pre, weight, h0, skip=0.999, gain=0.001, form="outside", activation="tanh")
    torch.testing.assert_close(h_n.float(), torch.full_like(h0, 0.999**1000).float(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_operators_transforms_and_compilers(form):
    tensors = leaves(form, dtype=torch.float32)
    want, _ = run(form, "tanh", tensors)
    inputs = [t for t in tensors if t is not None]
    wanted = torch.autograd.grad(want.square().sum(), inputs)

    def padded(*given):
        return run(form, "tanh", [*given, *[None] * (6 - len(given))])

    out, _ = torch.compile(padded, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(out, want)
    for a, b in zip(torch.autograd.grad(out.square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b)

    pre, weight, h0, *rest = tensors
    mapped = torch.vmap(lambda p: run(form, "tanh", (p, weight, h0, *rest))[0])(torch.stack([pre, 2 * pre]))
    torch.testing.assert_close(mapped[0], want)

    names = torch.ops.fused_rin
    skip, gain, noise = rest
    arguments = (pre, weight, h0, None, None, None, skip, gain, noise, form, "tanh", 0, "auto")
    torch.library.opcheck(names.units_forward.default, arguments)
    plain = [None if t is None else t.detach() for t in (pre, weight, h0, skip, gain)]
    back = (plain[0], None, plain[1], plain[0], plain[2], None, None, None, plain[3], plain[4], form, "tanh", 0, "auto")
    torch.library.opcheck(names.units_backward.default, back)


def test_a_state_of_efficient_zeros_and_a_negated_one():
    """Tensors whose numbers do not lie where they say, in backward too, where currents need the first state."""
    tensors = list(leaves("current"))
    want = torch.autograd.grad(run("current", "tanh", tensors)[0].sum(), tensors[0])[0]
    negated = [torch._neg_view(-tensors[2].detach()) if i == 2 else t for i, t in enumerate(tensors)]
    torch.testing.assert_close(torch.autograd.grad(run("current", "tanh", negated)[0].sum(), tensors[0])[0], want)
    zeros = [torch._efficientzerotensor((3, 1, 4), dtype=torch.float64) if i == 2 else t for i, t in enumerate(tensors)]
    plain = [torch.zeros(3, 1, 4, dtype=torch.float64) if i == 2 else t for i, t in enumerate(tensors)]
    got, want = (torch.autograd.grad(run("current", "tanh", ts)[0].sum(), tensors[0])[0] for ts in (zeros, plain))
    torch.testing.assert_close(got, want)


def test_what_is_wrong_is_said_before_anything_runs():
    pre, weight = torch.zeros(3, 2, 1, 4), torch.zeros(1, 4, 4)

    def refused(kind, text, **options):
        with pytest.raises(kind, match=text):
            recurrence(pre, weight, **options)

    refused(ValueError, "form must be one of 'inside', 'outside', 'current', got 'leaky'", form="leaky")
    refused(ValueError, "gain is for form='outside', got it with form='current'", form="current", gain=0.1)
    refused(ValueError, "noise is for form='outside'.*add it to pre", noise=pre)
    refused(ValueError, "skip must be finite, got nan", form="outside", skip=math.nan)
    refused(TypeError, "gain should be a number or a tensor, got: str", form="outside", gain="0.1")
    refused(ValueError, "skip must have a floating point dtype, got torch.int64", skip=torch.ones(4, dtype=torch.int64))
    refused(
        RuntimeError, r"skip must be .* expand to \(1, 4\), got a tensor of \[3\]", form="outside", skip=torch.ones(3)
    )
    refused(
        RuntimeError,
        r"gain must be .* expand to \(1, 4\), got a tensor of \[2, 4\]",
        form="outside",
        gain=torch.ones(2, 4),
    )
    refused(RuntimeError, "Expected noise size", form="outside", noise=pre[:1])
    refused(ValueError, "activation must be one of", activation="gelu")


def test_a_backend_that_lacks_a_form_says_so(monkeypatch):
    from fused_rin import backends, cuda

    assert all(backends._rule_reason(name, "sigmoid", "outside") is None for name in ("cuda", "triton", "reference"))
    monkeypatch.setattr(cuda, "forms", frozenset())
    monkeypatch.setattr(cuda, "activations", frozenset({"relu", "tanh"}))
    reason = backends._rule_reason("cuda", "relu", "outside")
    assert reason == "it has no kernel for units with factors of their own in the form 'outside'"
    assert "it has no kernel for the activation 'sigmoid'" in backends._rule_reason("cuda", "sigmoid", None)
    assert backends._rule_reason("cpu", "sigmoid", "current") is None
    assert explain((5, 2, 1, 8), form="outside").backend == "cpu"


def test_one_that_is_asked_for_by_name_raises(monkeypatch):
    monkeypatch.setattr(cpu, "forms", frozenset())
    arguments = torch.zeros(3, 2, 1, 4), torch.zeros(1, 4, 4)
    with pytest.raises(BackendError, match="no kernel for units with factors of their own in the form 'inside'"):
        recurrence(*arguments, skip=torch.ones(4), backend="cpu")
    assert explain((3, 2, 1, 4), form="inside").backend == "reference"
    recurrence(*arguments, skip=torch.ones(4))
