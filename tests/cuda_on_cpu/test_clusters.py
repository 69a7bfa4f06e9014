"""The `cluster` sweeps on CPU fibres: small ones in every layout, and each compiled kernel once."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from fused_rin import cuda, cuda_plan
from fused_rin.cuda_plan import CLUSTER_KERNELS, MATH, Kernel

from tests.conftest import check_sweeps, make_case
from tests.cuda_on_cpu.machine import KernelError, Machine

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Those of small_clusters.cpp: one and two parts of k, one and two tiles a warp, part of the matrix in shared memory.
SMALL = {
    "bf16 of 2": (BF16, Kernel("mma", 128, 8, 4, 8, 4, 4, 2, 1)),
    "fp16 of 4": (FP16, Kernel("mma", 256, 16, 4, 9, 2, 2, 4, 1)),
    "bf16 of 2 x 2": (BF16, Kernel("mma", 256, 8, 8, 8, 4, 4, 2, 2)),
    "fp32 of 2": (FP32, Kernel("fma", 64, 1, 4, 2, 4, 4, 2, 2)),
    "fp32 of 4": (FP32, Kernel("fma", 128, 2, 4, 4, 4, 4, 4, 2)),
}


def key(kernel: Kernel) -> tuple[int, int, int, int]:
    return MATH[kernel.math], kernel.hidden, kernel.rows, kernel.ctas


@pytest.fixture(params=SMALL)
def small(request, force) -> tuple[torch.dtype, Kernel]:
    dtype, kernel = SMALL[request.param]
    force(kernel)
    return dtype, kernel


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
@pytest.mark.parametrize("loop", ["relu", "tanh", "general"])
def test_every_way_to_share_a_tile(native, small, loop, steps):
    """Plain loops, and the general one at an odd size with a ragged batch tile."""
    dtype, kernel = small
    hidden, batch = (kernel.hidden - 27, kernel.rows + 1) if loop == "general" else (kernel.hidden, kernel.rows)
    native.seed = steps
    activation = "tanh" if loop == "tanh" else "relu"
    case = make_case(steps, batch, hidden, dtype=dtype, activation=activation, seed=steps)
    check_sweeps(cuda.forward, cuda.backward, case)
    assert native.kernels == {key(kernel)}


@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("rows", [1, 3, 0])
def test_layouts(native, monkeypatch, layout, resets, rows):
    """Two directions, without a first state; tiles of fewer rows than fit."""
    dtype, kernel = SMALL["bf16 of 2"]
    chosen = cuda_plan.SweepPlan(kernel, "forced", 1, 1, 1, 0.0, rows)
    monkeypatch.setattr(cuda_plan, "plan", lambda *a, **k: chosen)
    native.seed = rows
    case = make_case(
        6, 5, kernel.hidden - 3, 2, dtype=dtype, layout=layout, resets=resets, num_reversed=1, h0=not resets, seed=3
    )  # fmt: skip
    check_sweeps(cuda.forward, cuda.backward, case)


def test_results_do_not_depend_on_the_schedule(native, small):
    dtype, kernel = small
    case = make_case(5, kernel.rows + 1, kernel.hidden, 2, dtype=dtype, num_reversed=1)
    results = []
    for native.seed in (1, 2):
        out, h_n = cuda.forward(*case.arguments)
        results.append((out, h_n, *cuda.backward(out, h_n, case.weight, out, case.rows, case.rule)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_tile_that_does_not_suit_is_refused(native, monkeypatch):
    dtype, kernel = BF16, CLUSTER_KERNELS[0]
    chosen = cuda_plan.SweepPlan(kernel, "forced", 1, 1, 1, 0.0, kernel.rows + 1)
    monkeypatch.setattr(cuda_plan, "plan", lambda *a, **k: chosen)
    with pytest.raises(KernelError, match=r"a tile of 9 rows does not suit a kernel of 8 rows and 8 CTAs"):
        cuda.forward(*make_case(1, 1, kernel.hidden, dtype=dtype).arguments)


@pytest.mark.parametrize("kernel", CLUSTER_KERNELS, ids=lambda k: f"{k.math}-{k.hidden}x{k.rows}")
def test_every_compiled_kernel(native, force, kernel):
    force(kernel)
    dtype = BF16 if kernel.math == "mma" else FP32
    case = make_case(3, kernel.rows, kernel.hidden - 5, dtype=dtype, layout="lengths", seed=1)
    check_sweeps(cuda.forward, cuda.backward, case)
    assert native.kernels == {key(kernel)}


# ---- the detector: an exchange with a bug planted in it (planted_clusters.cpp)

BUGS = (
    "none", "nothing expected", "one buffer", "ends at once", "wrong parity", "too many expected", "not met",
    "arrives before reads",
)  # fmt: skip


def exchange(machine: Machine, bug: str, seed: int, steps: int = 6) -> torch.Tensor:
    out = torch.full((3 * 64,), -1, dtype=torch.int32)
    tensors = {"out": (out.data_ptr(), out.numel() * 4, True)}
    pointer = ctypes.c_void_p(out.data_ptr())
    machine.call("emulate_planted_cluster", BUGS.index(bug), steps, pointer, seed, tensors=tensors)
    return out


def fault(machine: Machine, bug: str, seed: int) -> str:
    """What is caught, or nothing."""
    try:
        exchange(machine, bug, seed)
    except KernelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(10))
def test_an_exchange_without_a_bug(machine, seed):
    words = torch.zeros(3, 64, dtype=torch.int64)
    for _ in range(6):
        words = words.sum() + torch.arange(1, 4)[:, None] + torch.arange(64)
    assert torch.equal(exchange(machine, "none", seed), words.flatten().to(torch.int32))


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        ("nothing expected", r"deadlock; .* and -512 bytes|race|under way|has ended"),
        ("one buffer", "race|under way"),
        ("ends at once", "a store to the shared memory of block [012], which has ended"),
        ("wrong parity", "race|under way|nothing has written"),
        (
            "too many expected",
            r"deadlock; .*mbarrier at \d+ of block [012] waits for 0 arrivals and 16 bytes in phase 0",
        ),
        ("not met", "no mbarrier at offset|race|under way"),
        ("arrives before reads", "race|under way"),
    ],
)
def test_a_bug_in_an_exchange(machine, bug, words):
    """Each is caught; most of them under any schedule."""
    found = [text for seed in range(20) if (text := fault(machine, bug, seed))]
    assert len(found) >= 10, f"of 20 schedules {len(found)}"
    assert [text for text in found if not re.search(words, text)] == []
