"""The CUDA planner on Device records: which kernel, and what it says where there is none. No GPU, no native module."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from fused_rin import cuda
from fused_rin.cuda_plan import CLUSTER_KERNELS, GRID_KERNELS, KERNELS, plan, runnable
from fused_rin.device import Device, NoPlan, allow_tf32

from tests.conftest import CudaModule

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
A100 = Device("A100", (8, 0), 108, 163 * 1024, 65536, 40 << 20, 1)
RTX4090 = Device("RTX 4090", (8, 9), 128, 99 * 1024, 65536, 72 << 20, 1)
H100 = Device("H100", (9, 0), 132, 227 * 1024, 65536, 50 << 20, 16)
H200 = Device("H200", (9, 0), 132, 227 * 1024, 65536, 50 << 20, 16)
B200 = Device("B200", (10, 0), 148, 227 * 1024, 65536, 126 << 20, 16)
TINY = Device("tiny", (8, 7), 2, 32 * 1024, 32768, 1 << 20, 1)
TURING = Device("T4", (7, 5), 40, 64 * 1024, 65536, 4 << 20, 1)
DEVICES = [A100, RTX4090, H100, H200, B200, TINY]


def by_name(device: Device) -> str:
    return device.name


@pytest.mark.parametrize("device", DEVICES, ids=by_name)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("hidden", [1, 32, 100, 128, 192, 256, 384, 1024, 2048, 2049])
@pytest.mark.parametrize("batch", [1, 5, 64, 4096])
def test_a_plan_fits_or_says_why_not(device, dtype, hidden, batch):
    try:
        chosen = plan(batch, 2, hidden, dtype, device)
    except NoPlan:
        with pytest.raises(NoPlan, match=rf"\b{hidden}\b.*use backend='triton'"):
            plan(batch, 2, hidden, dtype, device)
        return
    kernel = chosen.kernel
    assert kernel in (*KERNELS, *CLUSTER_KERNELS, *GRID_KERNELS)
    assert kernel.runs_on(device)
    assert kernel.hidden >= hidden
    assert kernel.most_shared_bytes <= device.shared_memory_per_block
    assert kernel.threads <= 1024
    assert (kernel.math == "mma") == (dtype != FP32)
    assert chosen.blocks * kernel.rows >= 2 * batch * kernel.ctas
    assert chosen.blocks % kernel.ctas == 0
    assert chosen.estimated_cycles > 0
    tiles = chosen.blocks // kernel.ctas
    assert chosen.workspace_bytes == kernel.workspace_bytes * min(tiles, kernel.places(device.sms))
    assert bool(chosen.workspace_bytes) == kernel.grid


@pytest.mark.parametrize(
    ("device", "clusters"), [(A100, False), (RTX4090, False), (H100, True), (H200, True), (B200, True)], ids=str
)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_sizes_that_are_promised(device, clusters, dtype):
    """Of a full device a block, then a cluster where there are any, then a grid. 2,048 of float32 take 128 SMs."""
    wide = dtype == FP32
    largest = 1024 if wide and device is A100 else 2048
    of_a_block, of_a_cluster = (256, 512) if wide else (384, 1024)
    if device is RTX4090:  # has less shared memory
        of_a_block = 192 if wide else 256
    for hidden in range(1, largest + 1):
        few, many = (plan(batch, 1, hidden, dtype, device).kernel for batch in (8, 4096))
        assert few.hidden >= hidden
        assert few.ctas >= many.ctas
        assert (many.ctas > 1) == (hidden > of_a_block)
        assert many.grid == (hidden > (of_a_cluster if clusters else of_a_block))
        assert not (few.grid and clusters and hidden <= of_a_cluster)
    with pytest.raises(NoPlan, match=rf"hidden sizes up to {largest} in {dtype} on {device.name}, got {largest + 1}"):
        plan(8, 1, largest + 1, dtype, device)
    with pytest.raises(NoPlan, match="with factors of its own for each unit on"):
        plan(8, 1, 400, dtype, device, units=True)


def test_a_cluster_is_spread_over_its_place():
    chosen = plan(16, 2, 1000, BF16, H200)
    assert (chosen.kernel.ctas, chosen.tile_rows, chosen.blocks) == (16, 6, 2 * 3 * 16)  # 7 clusters, 3 a direction
    words = chosen.describe()
    for part in ("6 cluster(s) of 16 CTAs of 256 threads for 132 SMs", "6 batch row(s) each", "1024 x 1024"):
        assert part in words


def test_rows_are_spread_over_clusters_first():
    """What a cluster sends in a step grows with its rows: 15 clusters of 8 run at a time, 7 of 16."""
    for batch, hidden, rows, clusters in (
        (1, 512, 1, 1), (8, 512, 1, 8), (15, 512, 1, 15), (16, 512, 2, 8), (100, 512, 7, 15), (120, 512, 8, 15),
        (7, 1024, 1, 7), (56, 1024, 8, 7), (57, 1024, 8, 8),
    ):  # fmt: skip
        chosen = plan(batch, 1, hidden, BF16, H200)
        assert (chosen.tile_rows, chosen.blocks // chosen.kernel.ctas) == (rows, clusters)
    assert plan(1, 1, 512, BF16, H200).estimated_cycles < plan(120, 1, 512, BF16, H200).estimated_cycles
    assert plan(1024, 1, 384, BF16, H200).tile_rows == 0  # blocks have the rows that they are compiled for


def test_code_of_older_architectures_has_no_clusters():
    seen = runnable(B200, ["80", "90a"], 80, 13000, 13000)
    assert seen.max_cluster_size == 1
    assert plan(1, 1, 512, BF16, seen).kernel.grid
    assert runnable(B200, ["80", "90a", "100"], 80, 13000, 13000).max_cluster_size == 16
    assert runnable(H100, ["80", "90a"], 80, 13000, 13000).max_cluster_size == 16


def test_a_grid_takes_so_many_sms():
    """Two tiles side by side where 64 SMs hold a matrix of 2,048 units, with half the rows each; or one on 128."""
    one, two, more = (plan(batch, 1, 2000, BF16, H200) for batch in (1, 16, 40))
    assert (one.kernel.ctas, one.tile_rows, one.workspace_bytes // one.kernel.workspace_bytes) == (128, 1, 1)
    assert (two.kernel.ctas, two.tile_rows, two.workspace_bytes // two.kernel.workspace_bytes) == (64, 8, 2)
    assert (more.kernel.ctas, more.blocks // 64, more.workspace_bytes) == (64, 5, two.workspace_bytes)
    assert plan(8, 1, 2000, BF16, H200).tile_rows == 4
    assert plan(8, 1, 2000, BF16, A100).kernel.ctas == 64
    assert plan(1, 1, 2000, FP32, H200).kernel.ctas == 128
    words = two.describe()
    for part in ("grid plan on H200", "2 tile(s) of 8 batch row(s), 2 at a time on 64 of 132 SMs each", "through L2"):
        assert part in words


def test_small_batches_take_the_smallest_tile():
    assert plan(1, 1, 128, BF16, H200).kernel.rows == 8
    assert plan(8, 1, 128, BF16, H200).blocks == 1
    assert plan(1, 1, 128, FP32, H200).kernel.math == "fma"
    assert plan(100, 1, 128, FP32, H200).kernel.rows == 1  # a CTA a row, all at once


def test_large_batches_take_large_tiles():
    """Eight rows a CTA would be several waves over the device; more rows share one pass over the matrix."""
    assert plan(16384, 1, 128, BF16, H200).kernel.rows > 8
    assert plan(16384, 1, 192, FP32, A100).kernel.math == "tf32x3"  # 3 x TF32 tensor cores against 64 FMA lanes


def test_tf32_only_where_torch_allows_it():
    assert plan(2048, 1, 128, FP32, H200, allow_tf32=False).kernel.math in ("fma", "tf32x3")
    assert plan(2048, 1, 128, FP32, H200, allow_tf32=True).kernel.math == "tf32"
    assert plan(1, 1, 128, FP32, H200, allow_tf32=True).kernel.math == "fma"  # faster and exact


def test_torchs_tf32_setting_is_followed(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert not allow_tf32()
        torch.set_float32_matmul_precision("high")
        assert allow_tf32()
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "ieee"
            assert not allow_tf32()
            matmul.fp32_precision = "none"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_matrix_that_one_architecture_cannot_hold():
    assert plan(1024, 1, 384, BF16, H100).kernel.hidden == 384
    assert plan(1024, 1, 384, BF16, RTX4090).kernel.grid
    small = replace(RTX4090, sms=24)
    with pytest.raises(NoPlan, match=r"RTX 4090 offers 99 KB; use backend='triton'"):
        plan(1, 1, 384, BF16, small)
    with pytest.raises(NoPlan, match="tiny"):
        plan(1, 1, 256, FP32, TINY)


def test_few_rows_of_a_matrix_that_fills_a_block_are_shared():
    """Where a good part of U would lie in one block's shared memory, and other SMs have nothing to do."""
    shared = [(384, BF16), (300, FP16), (256, FP32)]
    for hidden, dtype in shared:
        few, many = plan(4, 1, hidden, dtype, H100), plan(1024, 1, hidden, dtype, H100)
        assert few.kernel.ctas == 8
        assert few.tile_rows == 1
        assert many.kernel.ctas == 1
    assert plan(4, 1, 384, BF16, A100).kernel.grid
    for hidden, dtype in ((256, BF16), (192, FP32), (128, FP32)):
        assert plan(1, 1, hidden, dtype, H100).kernel.ctas == 1


def test_what_the_kernels_do_not_take():
    with pytest.raises(NoPlan, match=r"got torch\.float64; backend='reference' takes any"):
        plan(1, 1, 10, torch.float64, H100)
    with pytest.raises(NoPlan, match=r"compute capability 8.0 or later, T4 has 7.5"):
        plan(1, 1, 10, BF16, TURING)
    assert issubclass(NoPlan, ValueError)


def test_a_plan_in_words():
    words = plan(16, 2, 100, BF16, H200).describe()
    for part in ("H200", "4 CTA(s)", "8 batch row(s)", "128 x 128", "registers", "tensor cores", "not a measurement"):
        assert part in words
    assert "and shared memory" in plan(1024, 1, 384, BF16, H200).describe()


def test_a_build_without_the_module_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_missing", "no module named _cuda")
    reason = cuda.unavailable_reason(torch.device("cuda"), BF16)
    assert "no module named _cuda" in reason
    assert "nvcc" in reason


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", CudaModule())
    assert "CUDA tensors" in cuda.unavailable_reason(torch.device("cpu"), BF16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in cuda.unavailable_reason(torch.device("cuda"), BF16)


def test_an_available_device_is_judged_by_the_plan(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", CudaModule())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_record", lambda index: RTX4090)
    device = torch.device("cuda", 0)
    assert cuda.unavailable_reason(device, BF16) is None
    assert cuda.unavailable_reason(device, BF16, 256) is None
    assert cuda.unavailable_reason(device, BF16, 384) is None
    assert "2049" in cuda.unavailable_reason(device, BF16, 2049)
    assert "float64" in cuda.unavailable_reason(device, torch.float64)
    assert "RTX 4090" in cuda.describe(10, 3, 1, 100, BF16, device)


@pytest.mark.parametrize(
    ("device", "architectures", "kilobytes"),
    [
        (A100, "80 90a", 163),
        (H100, "80 90a", 227),
        (RTX4090, "80 90a", 99),  # sm_80's code, within what the device has
        (B200, "80 90a", 163),  # PTX of compute_80, whose kernels are empty beyond an A100's shared memory
        (B200, "80 90a 100", 227),
        (H100, "80", 163),
        (RTX4090, "86", 99),
        (Device("H100 of 9.0 by sm_90", (9, 0), 132, 227 * 1024), "90", 227),
    ],
    ids=lambda value: value.name if isinstance(value, Device) else None,
)
def test_shared_memory_is_that_of_the_code_that_runs(device, architectures, kilobytes):
    ptx = int(architectures.split()[0])
    seen = runnable(device, architectures.split(), ptx, 13000, 13000)
    assert seen.shared_memory_per_block == kilobytes * 1024
    assert seen.capability == device.capability


def test_no_kernel_that_would_be_empty_is_planned():
    """A B200 that runs PTX of compute_86 has kernels that fit 99 KB alone: 384x8 would leave its outputs unwritten."""
    assert plan(2048, 1, 384, BF16, runnable(B200, ["80", "90a"], 80, 13000, 13000)).kernel.hidden == 384
    seen = runnable(B200, ["86"], 86, 13000, 13000)
    for hidden in (384, 2048):
        assert plan(2048, 1, hidden, BF16, seen).kernel.most_shared_bytes <= 99 * 1024
    assert plan(2048, 1, 256, BF16, B200).kernel.rows == 16
    assert plan(2048, 1, 256, BF16, seen).kernel.rows == 8


@pytest.mark.parametrize(
    ("device", "architectures", "driver", "reason"),
    [
        (H100, "80 90a", 12040, "built with CUDA 13.0 and the driver supports CUDA up to 12.4; update the driver"),
        (H100, "80 90a", 0, "the driver is missing"),
        (A100, "90a", 13000, 'for compute capability 90a, A100 has 8.0; install with FUSED_RIN_CUDA_ARCHS="80"'),
        (B200, "80 90a", 13000, None),
        (B200, "90a", 13000, None),  # its PTX is compute_90
    ],
)
def test_code_that_cannot_run_says_why(device, architectures, driver, reason):
    arguments = (device, architectures.split(), int(architectures[:2]), driver, 13000)
    if reason is None:
        assert runnable(*arguments)
        return
    with pytest.raises(NoPlan, match=re.escape(reason)):
        runnable(*arguments)


def test_ptx_newer_than_the_driver_is_not_run():
    with pytest.raises(NoPlan, match=r"and the driver \(CUDA 13.0\) is older than its PTX \(CUDA 13.1\)"):
        runnable(B200, ["80", "90a"], 80, 13000, 13010)
    assert runnable(H100, ["80", "90a"], 80, 13000, 13010) == H100


def test_the_backend_says_so(monkeypatch):
    """Not a launch that fails: `explain` and backend="auto" hear it first."""
    old = CudaModule()
    old.versions = lambda: (12040, 13000)
    monkeypatch.setattr(cuda, "_cuda", old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_record", lambda index: H100)
    assert "update the driver" in cuda.unavailable_reason(torch.device("cuda", 0), BF16, 64)
