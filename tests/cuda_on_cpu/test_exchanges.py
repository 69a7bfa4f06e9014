"""The detector: small exchanges between blocks, as the kernels do them, with a bug planted in each.

planted_clusters.cpp and planted_grids.cpp.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from tests.cuda_on_cpu.machine import KernelError, Machine

CLUSTER_BUGS = (
    "none", "nothing expected", "one buffer", "ends at once", "wrong parity", "too many expected", "not met",
    "arrives before reads",
)  # fmt: skip
GRID_BUGS = (
    "none", "number apart", "one buffer", "old numbers", "number of the step before", "not published", "reads at once",
)  # fmt: skip
STEPS, WORDS, WRONG = 20, 3 * 64, "a wrong sum"


def exchange(machine: Machine, plan: str, bug: str, seed: int) -> torch.Tensor:
    out = torch.full((WORDS,), -1, dtype=torch.int32)
    tensors = {"out": (out.data_ptr(), out.numel() * 4, True)}
    if plan == "cluster":
        given = ("emulate_planted_cluster", CLUSTER_BUGS.index(bug), STEPS, ctypes.c_void_p(out.data_ptr()))
    else:
        left = torch.tensor([1, 2], dtype=torch.int32).repeat(2 * 2 * 3 * 22)  # by an earlier sweep
        tensors["workspace"] = (left.data_ptr(), left.numel() * 4, True)
        addresses = map(ctypes.c_void_p, (out.data_ptr(), left.data_ptr()))
        given = ("emulate_planted_grid", GRID_BUGS.index(bug), STEPS, *addresses)
    machine.call(*given, seed, tensors=tensors)
    return out


def right() -> torch.Tensor:
    words = torch.zeros(3, 64, dtype=torch.int64)
    for _ in range(STEPS):
        words = (2 * words.sum() - words[:, 0].sum() + torch.arange(1, 4)[:, None] + torch.arange(64)) % 2**32
    return words.flatten().to(torch.int32)


def fault(machine: Machine, plan: str, bug: str, seed: int) -> str:
    """What is caught, or nothing."""
    try:
        return "" if torch.equal(exchange(machine, plan, bug, seed), right()) else WRONG
    except KernelError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("plan", ["cluster", "grid"])
def test_an_exchange_without_a_bug(machine, plan, seed):
    assert fault(machine, plan, "none", seed) == ""


@pytest.mark.parametrize(
    ("plan", "bug", "words"),
    [
        ("cluster", "nothing expected", r"deadlock; .* and -512 bytes|race|under way|has ended"),
        ("cluster", "one buffer", "race|under way"),
        ("cluster", "ends at once", "a store to the shared memory of block [012], which has ended"),
        ("cluster", "wrong parity", "race|under way|nothing has written"),
        (
            "cluster",
            "too many expected",
            r"deadlock; .*mbarrier at \d+ of block [012] waits for 0 arrivals and 16 bytes in phase 0",
        ),
        ("cluster", "not met", "no mbarrier at offset|race|under way"),
        ("cluster", "arrives before reads", "race|under way"),
        ("grid", "number apart", WRONG),
        ("grid", "one buffer", r"deadlock; .* threads wait for packets"),
        ("grid", "old numbers", f"{WRONG}|threads wait for packets"),
        ("grid", "number of the step before", f"{WRONG}|threads wait for packets"),
        ("grid", "not published", r"deadlock; .* threads wait for packets"),
        ("grid", "reads at once", f"{WRONG}|threads wait for packets"),
    ],
)
def test_a_bug_in_an_exchange(machine, plan, bug, words):
    """Each is caught; most of them under any schedule."""
    found = [text for seed in range(20) if (text := fault(machine, plan, bug, seed))]
    assert len(found) >= 10, f"of 20 schedules {len(found)}"
    assert [text for text in found if not re.search(words, text)] == []
