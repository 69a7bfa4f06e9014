"""Processors that are not there, or not free: how many threads a sweep takes, and a team that ends under way."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fused_rin import RIN, _native, cpu, explain, recurrence

from tests.conftest import layouts, make_case, name_of, use_threads
from tests.test_cpu_threads import run_python

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@contextmanager
def ending_at(meeting: int) -> Iterator[None]:
    """Teams of three, which end at that meeting, of one in a step; 0: they do not."""
    _native.end_teams_at(meeting)
    try:
        with use_threads(3):
            yield
    finally:
        _native.end_teams_at(0)


@pytest.mark.parametrize("options", layouts((1, 0), (2, 1))[::3], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sweep_that_one_thread_ends_has_the_same_bits(dtype, options):
    """At any step of a recurrence; of two, the first goes on alone and the second begins alone."""
    groups = options["groups"]
    steps, hidden = (40, 400) if groups == 1 else (9, 1000)  # two of 400 units would have a thread each
    case = make_case(steps, 1, hidden, dtype=dtype, **options)
    alone = cpu.forward(*case.arguments)
    grads = torch.randn_like(alone[0]), torch.randn_like(alone[1])
    alone_back = cpu.backward(*grads, case.weight, alone[0], case.rows, case.rule)
    with use_threads(3):
        assert "share the outputs" in cpu.describe(steps, 1, groups, hidden, dtype)
    # Packing ends with the first one, each step and the entering of h0 with one; the last is none of them.
    for meeting in [1, 2, 3, *range(4, groups * (steps + 2), 3), 1000]:
        with ending_at(meeting):
            for got, want in zip(cpu.forward(*case.arguments), alone, strict=True):
                assert torch.equal(got, want), meeting
            back = cpu.backward(*grads, case.weight, alone[0], case.rows, case.rule)
            for got, want in zip(back, alone_back, strict=True):
                assert torch.equal(got, want), meeting


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_layer_that_one_thread_ends_has_the_same_bits(dtype, bidirectional):
    """Chunks of steps: what the others have of an input product, and their sums of gradients, go over to one."""
    module = RIN(30, 400, bidirectional=bidirectional).to(dtype)
    torch.nn.init.normal_(module.weight_hh_l0, std=0.02)
    x, hx = torch.randn(300, 1, 30).to(dtype).requires_grad_(), torch.rand(1 + bidirectional, 1, 400).to(dtype)
    resets = torch.rand(300, 1) < 0.05

    def call() -> list[torch.Tensor]:
        out, h_n = module(x, hx, resets=resets)
        # One direction's gradients are the layer's own; of two they come from torch's products on torch's threads.
        wanted = [x] if bidirectional else [x, *module.parameters()]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [out, h_n, *torch.autograd.grad([out, h_n], wanted, [torch.randn_like(out), torch.randn_like(h_n)])]

    with use_threads(1):
        alone = call()
    for meeting in (1, 2, 50, 97, 98, 257, 258, 300, 301, 302, 1000):
        with ending_at(meeting):
            compared = call()
        for got, want in zip(compared[:2] if bidirectional else compared, alone, strict=not bidirectional):
            assert torch.equal(got, want), meeting


def test_callers_that_end_their_teams_at_once():
    """Many calls, one after the other, of which each ends at another meeting."""
    case = make_case(40, 1, 300)
    alone = cpu.forward(*case.arguments)[0]
    for meeting in range(1, 43):
        with ending_at(meeting):
            assert torch.equal(cpu.forward(*case.arguments)[0], alone)


# ---- what the system leaves ----


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {}, 0),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, 0),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "cpu.max": "50000 100000"}, 0.5),
        ("0::/of/the/host", {"cpu.max": "400000 100000"}, 4),  # in a container, which sees its own group as the root
        (
            "4:memory:/m\n3:cpu,cpuacct:/c",
            {"cpu/c/cpu.cfs_quota_us": "250000", "cpu/c/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("3:cpuacct,cpu:/c", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 0),
        ("3:cpuset:/c", {"cpu/c/cpu.cfs_quota_us": "250000", "cpu/c/cpu.cfs_period_us": "100000"}, 0),
        ("garbage", {"cpu.max": "1 1"}, 0),
        ("0::/", {"cpu.max": "many 100000"}, 0),
        ("0::/", {"cpu.max": "100000 0"}, 0),
    ],
    ids=range(12),
)
def test_the_quota_of_a_cgroup(tmp_path, groups, files, quota):
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _native.processor_quota(str(tmp_path)) == quota


def test_without_cgroups_there_is_no_quota(tmp_path):
    assert _native.processor_quota(str(tmp_path)) == 0


BOUND = """
import os, torch
from fused_rin import RIN, _native, cpu, explain
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(4)
module, x = RIN(64, 512), torch.randn(100, 1, 64)
before = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    module(x)
print(_native.plan((100, 1, 1, 512), 64, 0, 4, "")["processors"], len(os.listdir("/proc/self/task")) - before)
print(explain(module, x).plan)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_more_threads_than_processors_are_not_used():
    """Whatever torch has been told; set after torch was loaded, too."""
    numbers, plan = run_python(BOUND).splitlines()
    assert numbers == "1 0"
    assert "one thread" in plan


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads affinity")
def test_explain_says_what_leaves_fewer_threads():
    processors = _native.plan((9, 9, 1, 999), 0, 0, 10**6, "")["processors"]
    before = torch.get_num_threads()
    torch.set_num_threads(processors + 1)
    try:
        plan = explain((50, 64, 512)).plan
    finally:
        torch.set_num_threads(before)
    if processors > 1:
        assert f"{processors} threads (torch has {processors + 1}, affinity and quota leave {processors} proc" in plan


# ---- a crowd is remembered ----


@pytest.fixture
def _two_processors():
    if _native.plan((9, 9, 1, 999), 0, 0, 2, "")["processors"] < 2:
        pytest.skip("needs two processors")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _native.forget_crowds()
    yield
    torch.set_num_threads(before)
    _native.forget_crowds()


@pytest.mark.usefixtures("_two_processors")
def test_after_a_crowd_short_work_is_not_divided_and_explain_says_so():
    assert "share the outputs" in explain((65, 1, 400)).plan
    _native.found_crowded()
    assert "one thread for now" in explain((65, 1, 400)).plan
    assert "one thread for now" in explain((20, 64, 100)).plan
    assert "each with sequences of its own" in explain((20000, 64, 400)).plan  # seconds: a time slice is nothing
    assert "share the outputs" not in explain((1000000, 1, 400)).plan
    _native.forget_crowds()
    assert "share the outputs" in explain((65, 1, 400)).plan


@pytest.mark.usefixtures("_two_processors")
def test_the_bits_are_the_same_after_a_crowd():
    pre, weight = torch.randn(65, 1, 1, 400), torch.randn(1, 400, 400) / 100
    before = recurrence(pre, weight)[0]
    _native.found_crowded()
    assert torch.equal(recurrence(pre, weight)[0], before)
