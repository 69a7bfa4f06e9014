"""The `cluster` and the `grid` sweeps on CPU fibres: small ones in every layout, and each compiled kernel once."""

from __future__ import annotations

import pytest
import torch
from fused_rin import cuda, cuda_plan
from fused_rin.cuda_plan import CLUSTER_KERNELS, GRID_KERNELS, MATH, Kernel

from tests.conftest import check_sweeps, make_case
from tests.cuda_on_cpu.machine import KernelError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Those of small_kernels.cpp: one to four parts of k, one and two tiles a warp, one and two warps that own outputs, part
# of the matrix in shared memory.
SMALL = {
    "bf16 of 2": (BF16, Kernel("mma", 128, 8, 4, 8, 4, 4, 2, 1)),
    "fp16 of 4": (FP16, Kernel("mma", 256, 16, 4, 9, 2, 2, 4, 1)),
    "bf16 of 2 x 2": (BF16, Kernel("mma", 256, 8, 8, 8, 4, 4, 2, 2)),
    "fp32 of 2": (FP32, Kernel("fma", 64, 1, 4, 2, 4, 4, 2, 2)),
    "fp32 of 4": (FP32, Kernel("fma", 128, 2, 4, 4, 4, 4, 4, 2)),
    "bf16 grid of 8": (BF16, Kernel("mma", 128, 8, 4, 2, 4, 4, 8, 4, grid=True)),
    "fp16 grid of 4": (FP16, Kernel("mma", 128, 8, 4, 4, 4, 4, 4, 2, grid=True)),
    "bf16 grid, two tiles": (BF16, Kernel("mma", 256, 16, 4, 2, 2, 2, 8, 4, grid=True)),
    "fp32 grid of 4": (FP32, Kernel("fma", 64, 1, 4, 1, 4, 4, 4, 4, grid=True)),
    "fp32 grid of 8": (FP32, Kernel("fma", 128, 4, 4, 1, 4, 4, 8, 4, grid=True)),
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
@pytest.mark.parametrize("shared", ["bf16 of 2", "bf16 grid of 8"])
def test_layouts(native, monkeypatch, layout, resets, rows, shared):
    """Two directions, without a first state; tiles of fewer rows than fit, of a grid two at a time."""
    dtype, kernel = SMALL[shared]
    chosen = cuda_plan.SweepPlan(kernel, "forced", 1, 1, 1, 0.0, rows, 2 * kernel.workspace_bytes)
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


def test_a_workspace_too_small_is_refused(native, monkeypatch):
    dtype, kernel = BF16, GRID_KERNELS[0]
    chosen = cuda_plan.SweepPlan(kernel, "forced", 1, 1, 1, 0.0, 0, kernel.workspace_bytes - 16)
    monkeypatch.setattr(cuda_plan, "plan", lambda *a, **k: chosen)
    with pytest.raises(KernelError, match=rf"a tile needs {kernel.workspace_bytes} bytes of workspace, aligned to 16"):
        cuda.forward(*make_case(1, 1, kernel.hidden, dtype=dtype).arguments)


def name(kernel: Kernel) -> str:
    return f"{kernel.math}-{kernel.hidden}x{kernel.rows}-of-{kernel.ctas}"


def check_compiled(native, force, kernel: Kernel) -> None:
    force(kernel)
    dtype = BF16 if kernel.math == "mma" else FP32
    case = make_case(3, kernel.rows, kernel.hidden - 5, dtype=dtype, layout="lengths", seed=1)
    check_sweeps(cuda.forward, cuda.backward, case)
    assert native.kernels == {key(kernel)}


@pytest.mark.parametrize("kernel", [*CLUSTER_KERNELS, *(k for k in GRID_KERNELS if k.hidden == 512)], ids=name)
def test_every_compiled_kernel(native, force, kernel):
    """Larger grids: large_grids.py."""
    check_compiled(native, force, kernel)
