"""The detector itself: kernels with a planted bug, each of which the fibres must catch (planted.cpp)."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.cuda_on_cpu.conftest import caught
from tests.cuda_on_cpu.machine import Machine

EXCHANGE, EXCHANGE_ASYNC, MULTIPLY, MULTIPLY_TRANSPOSED, HANDOVER = range(5)
BUGS = (
    "none", "missing barrier", "wrong fragment", "read beyond tensor", "read beyond shared", "unwritten", "diverged",
    "barrier not reached by all", "forgotten wait", "write to input",
)  # fmt: skip
SEEDS = range(5)


def run(machine: Machine, kernel: int, bug: str, given: torch.Tensor, out: torch.Tensor, seed: int = 0) -> torch.Tensor:
    tensors = {
        "given": (given.data_ptr(), given.numel() * given.element_size(), False),
        "out": (out.data_ptr(), out.numel() * out.element_size(), True),
    }
    pointers = (ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    machine.call("emulate_planted", kernel, BUGS.index(bug), *pointers, seed, tensors=tensors)
    return out


def exchange(machine: Machine, bug: str, seed: int, kernel: int = EXCHANGE) -> tuple[torch.Tensor, torch.Tensor]:
    given = torch.arange(64, dtype=torch.int32) + 100
    return run(machine, kernel, bug, given, torch.full((64,), -1, dtype=torch.int32), seed), given.roll(32)


@pytest.mark.parametrize("kernel", [EXCHANGE, EXCHANGE_ASYNC])
@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_bug_nothing_is_caught(machine, seed, kernel):
    out, expected = exchange(machine, "none", seed, kernel)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barrier(machine, seed):
    """Whatever the schedule: a race, or a read of what nothing has written."""
    with caught("kernel block_sweep, block 0, thread ", "shared read of 4 bytes"):
        exchange(machine, "missing barrier", seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_producer_that_arrives_too_early(machine, seed):
    with caught("shared"):
        exchange(machine, "missing barrier", seed, HANDOVER)


@pytest.mark.parametrize("seed", SEEDS)
def test_handover_by_named_barriers(machine, seed):
    out, expected = exchange(machine, "none", seed, HANDOVER)
    assert torch.equal(out[:32], expected[32:])


def test_read_beyond_a_tensor(machine):
    with caught("thread 63 (warp 1, lane 31)", "global read of 4 bytes outside every tensor", "past the end of given"):
        exchange(machine, "read beyond tensor", 0)


def test_read_beyond_shared_memory(machine):
    with caught("(warp 1", "outside the block's 256 bytes"):
        exchange(machine, "read beyond shared", 0)


def test_read_of_what_nothing_wrote(machine):
    with caught("(warp 0", "which nothing has written"):
        exchange(machine, "unwritten", 0)


def test_diverged_warp(machine):
    with caught("the warp has diverged", "shuffle_xor", "sync_warp"):
        exchange(machine, "diverged", 0)


def test_barrier_that_a_thread_misses(machine):
    with pytest.raises(RuntimeError, match=r"barrier 0 has 63 of 64 threads|race|nothing has written"):
        exchange(machine, "barrier not reached by all", 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_forgotten_wait_for_a_copy(machine, seed):
    with caught("to which a copy is under way"):
        exchange(machine, "forgotten wait", seed, EXCHANGE_ASYNC)


def test_write_to_an_input(machine):
    with caught("write to the read-only tensor given"):
        exchange(machine, "write to input", 0)


def multiply(machine: Machine, bug: str, kernel: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    stored = b.t().contiguous() if kernel == MULTIPLY_TRANSPOSED else b
    given = torch.cat([a.flatten(), stored.flatten()])
    out = run(machine, kernel, bug, given, torch.full((16, 8), float("nan")))
    return out, a.float() @ b.float().t()


@pytest.mark.parametrize("kernel", [MULTIPLY, MULTIPLY_TRANSPOSED])
def test_tensor_core_and_ldmatrix(machine, kernel):
    out, expected = multiply(machine, "none", kernel)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_wrong_fragment_index(machine):
    out, expected = multiply(machine, "wrong fragment", MULTIPLY)
    assert (out - expected).abs().max() > 0.1
