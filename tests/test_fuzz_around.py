"""The fuzz of what is around a call: some hundred of its cases, and that it sees what it is there to see."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from fused_rin import cpu, modules, ops

from tests.fuzz import around, refusals, twisting, twists
from tests.fuzz.refusals import Refused
from tests.fuzz.twists import TWISTS, Twisted


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("twist", TWISTS)
def test_twists(twist):
    drawn = random.Random(TWISTS.index(twist))
    for _ in range(1 if twist in ("large", "trace") else 3):
        case = twists.draw(drawn.choice)
        while case.twist != twist:
            case = twists.draw(drawn.choice)
        twisting.check(case)


@pytest.mark.parametrize("kind", ["rin", "cell", "recurrence", "packed"])
def test_refusals(kind):
    for seed, what in enumerate(refusals.WHAT[kind]):
        for steps in (1, 2, 20):
            refusals.check(Refused(kind, seed, what, steps=steps, grad=steps < 20, skip=0.0))


def test_cases_are_drawn_from_everything():
    choose = random.Random(0).choice
    cases = [around.draw(choose) for _ in range(3000)]
    assert {case.twist for case in cases if isinstance(case, Twisted)} == set(TWISTS)
    assert {case.kind for case in cases if isinstance(case, Refused)} == set(refusals.WHAT)
    for case in cases:  # a repr that reproduces it
        assert eval(repr(case), {"Twisted": Twisted, "Refused": Refused}) == case


def _case(twist, **options):
    options = {"steps": 5, "batch": 4, "inputs": 3, "hidden": 8, "activation": "tanh", **options}
    return twists.settled(Twisted("layers", 1, twist=twist, **options))


def test_it_sees_a_result_that_a_later_call_writes_to(monkeypatch):
    real, kept = cpu.layer_forward, []

    def wrong(*args, **kwargs):
        out, h_n = real(*args, **kwargs)
        kept.append(out)
        kept[0].copy_(out).add_(1e-3 * len(kept))
        return kept[0], h_n

    twisting.check(_case("repeat", context="no_grad"))
    monkeypatch.setattr(cpu, "layer_forward", wrong)
    with pytest.raises(AssertionError, match="share memory"):
        twisting.check(_case("repeat", context="no_grad"))


def test_it_sees_a_written_argument(monkeypatch):
    real = cpu.layer_forward

    def wrong(x, *args, **kwargs):
        results = real(x, *args, **kwargs)
        x[0, 0, 0] += 1
        return results

    monkeypatch.setattr(cpu, "layer_forward", wrong)
    with pytest.raises(AssertionError, match="an argument was written"):
        twisting.check(_case("large", context="no_grad"))


@pytest.mark.parametrize("twist", ["grad negated", "hooks negated"])
def test_it_sees_a_lost_sign_in_backward(twist, monkeypatch):
    twisting.check(_case(twist))
    monkeypatch.setattr(torch.Tensor, "is_neg", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "resolve_neg", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: tensor)
    with pytest.raises(AssertionError, match="gradient"):
        twisting.check(_case(twist))


def test_it_sees_a_saved_dtype_that_is_taken_for_the_kernels(monkeypatch):
    twisting.check(_case("hooks dtype"))
    monkeypatch.setattr(ops, "restored", lambda ctx: ctx.saved_tensors)
    with pytest.raises(AssertionError, match="gradient"):
        twisting.check(_case("hooks dtype"))


def test_it_sees_a_kernel_that_runs_before_the_error(monkeypatch):
    case = Refused("rin", 1, "state: one wider", steps=20)
    assert refusals.check(case) == "error"
    real = modules.RIN.forward

    def late(self, input, hx=None, **options):
        real(self, input, None)
        return real(self, input, hx, **options)

    monkeypatch.setattr(modules.RIN, "forward", late)
    with pytest.raises(AssertionError, match="a kernel ran before"):
        refusals.check(case)


def test_it_sees_an_error_that_is_missing(monkeypatch):
    monkeypatch.setattr(modules.RIN, "_check", lambda *arguments: None)
    with pytest.raises(AssertionError, match="torch ValueError"):
        refusals.check(Refused("rin", 1, "input: another float", steps=20))
