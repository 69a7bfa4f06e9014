"""Units with factors of their own in the `block` sweeps, on CPU fibres: every form, every kernel, every layout."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fused_rin import cuda, cuda_plan, explanation
from fused_rin.cuda_plan import KERNELS, MATH, UNIT_KERNELS, Kernel
from fused_rin.device import NoPlan
from fused_rin.problem import ACTIVATIONS, FORMS, Rows, Rule, Units

from tests.conftest import check_sweeps, make_case
from tests.cuda_on_cpu.conftest import H200
from tests.cuda_on_cpu.machine import HAS_STABLE_ABI, Machine
from tests.test_cuda_plan import DEVICES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {
    "bf16": (BF16, Kernel("mma", 64, 8, 4, 4, 8, 8, units=True)),
    "fp16": (FP16, Kernel("mma", 64, 8, 4, 4, 8, 8, units=True)),
    "fp32": (FP32, Kernel("fma", 64, 2, 4, 4, 8, 8, units=True)),
}


@pytest.fixture(params=SMALL)
def small(request, force) -> torch.dtype:
    dtype, kernel = SMALL[request.param]
    assert kernel in UNIT_KERNELS
    force(kernel)
    return dtype


@pytest.mark.parametrize("kernel", UNIT_KERNELS, ids=lambda k: f"{k.math}-{k.hidden}x{k.rows}")
def test_every_kernel(native, force, kernel):
    force(kernel)
    dtypes = (FP32,) if kernel.math == "fma" else (BF16, FP16) if kernel.hidden <= 128 else (BF16,)
    for dtype in dtypes:
        for form in FORMS:
            for hidden, batch in ((kernel.hidden, kernel.rows), (kernel.hidden - 27, kernel.rows + 1)):
                if form == "inside" and hidden == kernel.hidden > 128:
                    continue
                case = make_case(3, batch, hidden, dtype=dtype, activation="tanh", form=form, noise=True, seed=hidden)
                check_sweeps(cuda.forward, cuda.backward, case)
    assert native.kernels == {(MATH[kernel.math], kernel.hidden, kernel.rows, 1)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("h0", [False, True], ids=["", "h0"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_layouts(native, small, form, layout, resets, h0, activation):
    """Three recurrences, one of them in the other direction, at a size that is padded; more steps than the ring has."""
    native.seed = 2 * resets + h0
    options = {"layout": layout, "h0": h0, "resets": resets, "num_reversed": 1, "noise": h0}
    case = make_case(11, 5, 20, 3, dtype=small, form=form, activation=activation, seed=3, **options)
    check_sweeps(cuda.forward, cuda.backward, case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(native, small, form, activation):
    """Where act(0) is not 0, what is there for alignment alone must stay 0 in the state."""
    for hidden in (24, 21):
        case = make_case(5, 3, hidden, 2, dtype=small, form=form, activation=activation, num_reversed=1)
        check_sweeps(cuda.forward, cuda.backward, case)


@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "leaky_relu"])
def test_a_rin_of_these_activations_runs_by_them(native, small, activation):
    case = make_case(5, 3, 24, 2, dtype=small, activation=activation, skip=0.7)
    check_sweeps(cuda.forward, cuda.backward, case)


@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "leaky_relu"])
def test_activations_of_every_size(native, small, activation):
    """Of the values: a few roundings of float32, of each, then the type's own; of the slopes: of 1."""
    sizes = torch.logspace(-9, 1.9, 2000, dtype=torch.float64)
    values = torch.cat([sizes, -sizes, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0])])
    values = values[: len(values) // 8 * 8].to(small)
    pre = values.view(1, -1, 1, 8).requires_grad_()
    weight, rule = torch.zeros(1, 8, 8, dtype=small), Rule(0.0, activation)
    out, _ = cuda.forward(pre.detach(), weight, None, Rows(), rule)
    exact = {
        "sigmoid": torch.sigmoid,
        "softplus": lambda a: torch.nn.functional.softplus(a, threshold=60.0),
        "leaky_relu": torch.nn.functional.leaky_relu,
    }[activation](pre.double())
    assert torch.equal(out.isnan(), exact.isnan())
    # exp(x) of the hardware has an error of 2^-22 and what x log2(e) was rounded by, times x.
    allowed = exact.abs() * (5e-7 + 2e-7 * pre.double().abs().clamp(max=100)) + 1e-30
    allowed += exact.abs() * torch.finfo(small).eps / 2 if small != FP32 else 0
    known = exact.isfinite()
    error = (out.double() - exact).abs()
    assert (error <= allowed + (2**-25 if small == FP16 else 0))[known].all()
    assert torch.equal(out[~known & ~exact.isnan()], exact.to(small)[~known & ~exact.isnan()])

    grad_pre, _ = cuda.backward(torch.ones_like(out), None, weight, out, Rows(), rule)
    slope = torch.autograd.grad(exact.sum(), pre)[0].double()
    from_values = {"sigmoid": lambda y: y * (1 - y), "softplus": lambda y: -torch.expm1(-y)}.get(activation)
    if from_values is not None:  # as far as the rounded value tells it
        slope = from_values(out.double())
    wrong = (grad_pre.double() - slope).abs() > 4e-7 + torch.finfo(small).eps
    assert not (wrong & known).any()


def test_factors_that_are_not_there_are_ones(native, small):
    """By hand: with s = 1 and U = 0 the state is the sum of what came in, and its gradient the sum of what follows."""
    pre = torch.ones(6, 2, 1, 8, dtype=small)
    zero, one = torch.zeros(1, 8, 8, dtype=small), torch.ones(1, 8)
    units = Units("current", one)
    out, h_n = cuda.forward(pre, zero, None, Rows(), Rule(1.0, "tanh"), units=units)
    assert torch.equal(out[:, 0, 0, 0], torch.arange(1, 7).to(small))
    grad_pre, grad_h0 = cuda.backward(pre, None, zero, out, Rows(), Rule(1.0, "tanh"), units=units)
    assert torch.equal(grad_pre[:, 0, 0, 0], torch.arange(6, 0, -1).to(small))
    assert torch.equal(grad_h0, h_n)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_there_is_a_plan_wherever_there_is_a_block_without_factors(device):
    device = dataclasses.replace(device, max_cluster_size=1, sms=min(device.sms, 24))  # too few for a grid
    for dtype in cuda_plan.DTYPES:
        for hidden in range(1, 400, 7):
            found = []
            for units in (False, True):
                try:
                    plan = cuda_plan.plan(3, 2, hidden, dtype, device, units=units)
                    assert plan.kernel.units is units
                    assert plan.kernel in (UNIT_KERNELS if units else KERNELS)
                    found.append(True)
                except NoPlan:
                    found.append(False)
            assert found[0] == found[1], (dtype, hidden)


@pytest.mark.parametrize(
    ("activation", "form", "has"), [("relu", None, False), ("sigmoid", None, True), ("relu", "outside", True)]
)
def test_explain_names_their_kernels(monkeypatch, activation, form, has):
    monkeypatch.setattr(cuda, "_runnable", lambda *arguments: H200)
    call = explanation._Call(
        5, 16, 1, 100, dtype=BF16, device=torch.device("cuda:0"), backend="cuda", activation=activation, form=form
    )
    text = explanation._plan(call, cuda, "sweep")
    assert ("units with factors of their own" in text) == has
    assert "matrix padded to 128 x 128" in text


@pytest.mark.skipif(not HAS_STABLE_ABI, reason="the stable ABI came with torch 2.10")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "hidden"), [(BF16, 64), (BF16, 61), (FP32, 50)], ids=str)
def test_the_operators_on_fibres(machine: Machine, form, dtype, hidden):
    """What a process without Python does; with a padding and without one."""
    names = torch.ops.fused_rin_fibres

    def forward(pre, weight, h0, rows, rule, *, units, aside=None):
        form, skip, gain, noise = units
        out, h_n, values = names.units_forward(
            pre, weight, h0, *rows, skip, gain, noise, form, rule.activation, rule.num_reversed, "auto"
        )
        assert (aside is None) == (not values.numel())
        if aside is not None:
            aside.copy_(values)
        return out, h_n

    def backward(grad_out, grad_h_n, weight, saved, rows, rule, *, units, h0, aside=None):
        form, skip, gain, _ = units
        grad_pre, grad_h0, grad_state = names.units_backward(
            grad_out, grad_h_n, weight, saved, h0, *rows, skip, gain, form, rule.activation, rule.num_reversed, "cuda"
        )
        if aside is not None:
            aside.copy_(grad_state)
        return grad_pre, grad_h0

    options = {"layout": "lengths", "resets": True, "num_reversed": 1, "noise": True}
    case = make_case(5, 3, hidden, 2, dtype=dtype, form=form, activation="sigmoid", **options)
    check_sweeps(forward, backward, case)
