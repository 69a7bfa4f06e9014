"""The fuzz itself: some hundred of its cases, and that it sees what it is there to see. `make fuzz` runs more."""

from __future__ import annotations

import multiprocessing
import os
import random
import warnings

import pytest
import torch
from fused_rin import cpu, watchers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.cases import MISTAKES, Case, draw
from tests.fuzz.checks import check
from tests.fuzz.run import failure, run, shrunk


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_cases(data):
    check(draw(lambda options: data.draw(st.sampled_from(options))))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake(mistake):
    kind = "cell" if mistake.startswith("cell") else "layers"
    for directions in (1, 2) if kind == "layers" else (1,):
        check(Case(kind, 0, steps=3, batch=3, inputs=4, hidden=6, layers=2, directions=directions, mistake=mistake))


def test_what_is_right_by_chance_of_rounding_is_no_measure():
    """The state grows: plain PyTorch's gradients are ten times nearer here, and ours on an average of seeds."""
    growing = {"activation": "tanh", "skip": 2.0, "state": True, "state_layout": "zero", "transitions": 3}
    check(Case("layers", 12537, steps=9, batch=1, inputs=2, hidden=32, context="autocast", **growing))


@pytest.mark.parametrize("skip", [1.0, 2.0])
def test_it_sees_a_wrong_number(monkeypatch, skip):
    case = Case("layers", 1, steps=5, batch=4, inputs=3, hidden=8, activation="tanh", skip=skip)
    assert failure(case) is None
    real = cpu.layer_forward

    def wrong(*args, **kwargs):
        out, h_n = real(*args, **kwargs)
        out[2, 1, 3] += 1e-4
        return out, h_n

    monkeypatch.setattr(cpu, "layer_forward", wrong)
    assert "output 0: error" in failure(case)


def test_it_sees_a_lost_sign(monkeypatch):
    case = Case("layers", 1, steps=5, batch=4, inputs=3, hidden=8, input_layout="negated", trained="weights")
    assert failure(case) is None
    monkeypatch.setattr(torch.Tensor, "is_neg", lambda tensor: False)
    assert failure(case) is not None


def test_it_shrinks_and_reports(monkeypatch):
    """A case of many settings becomes one of those that matter."""
    real = cpu.forward

    def wrong(*args, **kwargs):
        out, h_n = real(*args, **kwargs)
        return (out + 1 if out.shape[-1] > 4 else out), h_n

    monkeypatch.setattr(cpu, "forward", wrong)
    case = Case("recurrence", 3, "float32", 7, 5, hidden=12, heads=2, resets=True, skip=0.3, threads=2)
    assert failure(case) is not None
    small = shrunk(case)
    assert failure(small) is not None
    assert (small.steps, small.batch, small.resets, small.threads) == (1, 1, False, 1)
    assert small.hidden == 12  # with 1 it does not fail


def _crash(seed, seconds, cases, connection):
    connection.send(("case", Case("layers", seed)))
    os._exit(11)


def test_a_crash_is_a_failure_with_its_case(monkeypatch):
    monkeypatch.setattr("tests.fuzz.run.work", _crash)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: multiprocessing.context.ForkContext())
    result = run(5, 60, 1)
    assert result["checked"] == {"crashed": 1}
    assert "seed=5" in result["failures"][0]["case"]


def test_cases_are_drawn_from_everything():
    """No field of a case is forgotten, and the settled ones are not all alike."""
    choose = random.Random(0).choice
    cases = [draw(choose) for _ in range(2000)]
    for field in Case.__dataclass_fields__:
        assert len({getattr(case, field) for case in cases}) > 1, field
    assert {case.mistake for case in cases} == {"", *MISTAKES}


def test_addresses_of_memory_that_is_not_there():
    """An offset into it is no address."""
    freed = torch.randn(6, 4)
    views = freed, freed[1:], freed[3:].t()
    freed.untyped_storage().resize_(0)
    zero = torch._efficientzerotensor((6, 4))
    for tensor in (*views, zero, zero[2:]):
        assert watchers.address(tensor) == 0
        assert not watchers.is_readable(tensor)
    there = torch.randn(6, 4)
    for tensor in (there, there[1:], there[3:].t()):
        assert watchers.address(tensor) == tensor.data_ptr()
