"""The plan: plain Python over a plain record, for GPUs that are not here. Needs no Triton."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fused_rin.triton_kernels import Device, NoPlan, plan, unavailable_reason

A100 = Device("A100", (8, 0), 108, 163 * 1024)
RTX_4090 = Device("RTX 4090", (8, 9), 128, 99 * 1024)
H200 = Device("H200", (9, 0), 132, 227 * 1024)
B200 = Device("B200", (10, 0), 148, 227 * 1024)
RTX_5090 = Device("RTX 5090", (12, 0), 170, 99 * 1024)
MI300 = Device("MI300X", (9, 4), 304, 64 * 1024, vendor="amd")
GPUS = [A100, RTX_4090, H200, B200, RTX_5090, MI300]
SIZES = [1, 16, 17, 64, 100, 128, 129, 200, 256, 257, 384, 512, 1000, 1024, 1500, 2048]


@pytest.mark.parametrize("device", GPUS, ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", [None, "tf32", "ieee"])
def test_up_to_2048_every_gpu_has_a_plan_that_fits(device: Device, dtype: torch.dtype, precision: str | None) -> None:
    for hidden in SIZES:
        p = plan(hidden, dtype, 1, 64, device, precision)
        assert p.shared_memory <= device.shared_memory_per_block
        assert p.tile_n * p.slices >= hidden > p.tile_n * (p.slices - 1)
        assert all(n & (n - 1) == 0 for n in (p.tile_n, p.tile_b, p.split_k, p.tile_k, p.warps))
        assert min(p.tile_n, 2 * p.tile_b, p.tile_k) >= 16  # what tl.dot takes
        if p.kind == "block":
            assert p.slices == 1
            assert p.tile_k == p.tile_n >= hidden
        else:
            assert 1 <= p.wave * p.slices <= device.sms  # all resident at once, or the barrier never ends
            assert p.matrix == "streamed" or p.split_k * p.tile_k >= hidden


def test_the_plans_of_an_h200() -> None:
    kinds = {h: plan(h, torch.bfloat16, 1, 64, H200) for h in (128, 256, 512, 1024, 2048, 4096)}
    assert [p.kind for p in kinds.values()] == ["block", "block", "sliced", "sliced", "sliced", "sliced"]
    assert [p.matrix for p in kinds.values()] == ["registers"] * 5 + ["streamed"]
    assert [p.slices for p in kinds.values()] == [1, 1, 32, 32, 128, 128]
    assert [p.warps for p in kinds.values()] == [8] * 6


def test_small_shared_memory_cuts_u_into_slices() -> None:
    assert plan(256, torch.float16, 1, 64, A100).kind == "block"
    assert plan(256, torch.float16, 1, 64, RTX_4090).kind == "sliced"


def test_float32_is_as_exact_as_float32_unless_asked() -> None:
    assert plan(64, torch.float32, 1, 1, H200).precision == "tf32x3"
    assert plan(64, torch.float32, 1, 1, H200, "tf32").precision == "tf32"
    assert plan(64, torch.float32, 1, 1, MI300).precision == "ieee"
    with pytest.raises(NoPlan, match=r"precision must be .* got 'fast'"):
        plan(64, torch.float32, 1, 1, H200, "fast")


def test_batch_and_groups_change_nothing_that_is_compiled() -> None:
    for hidden in (100, 1024):
        assert len({plan(hidden, torch.bfloat16, g, b, H200) for g in (1, 2, 8) for b in (1, 7, 64, 5000)}) == 1


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(NoPlan, match=r"no kernel for float64, only .* use backend=\"reference\""):
        plan(16, torch.float64, 1, 1, H200)
    with pytest.raises(NoPlan, match=r"8\.0 and newer, T4 has 7\.5; use backend"):
        plan(16, torch.float16, 1, 1, Device("T4", (7, 5), 40, 64 * 1024))
    with pytest.raises(NoPlan, match=r"hidden size of 100000 in half products .* 132 SMs .* use backend"):
        plan(100_000, torch.float16, 1, 1, H200)
    assert issubclass(NoPlan, ValueError)


def test_any_record_with_the_fields_will_do() -> None:
    record = SimpleNamespace(name="H100", capability=(9, 0), sms=132, shared_memory_per_block=227 * 1024)
    assert plan(128, "bfloat16", 1, 1, record) == plan(128, torch.bfloat16, 1, 1, H200)


def test_a_plan_describes_itself() -> None:
    assert plan(100, torch.float32, 1, 64, H200).describe() == (
        "triton block plan: one program per 8 sequences, 8 warps, U padded to 128 x 128 in shared memory, "
        "tf32x3 products"
    )
    assert plan(1024, torch.bfloat16, 1, 64, H200).describe() == (
        "triton sliced plan: 32 programs of 32 rows of U per 16 sequences, 8 warps, U in registers, "
        "half products, a grid barrier per step, 4 batch tiles at a time"
    )


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, fused_rin.triton_kernels; assert not any(m.partition('.')[0] == 'triton' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_rin import triton_kernels

    monkeypatch.setattr(triton_kernels, "_missing", triton_kernels._missing.__wrapped__)  # without its cache
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_kernels, "_triton_version", lambda: triton_kernels.OLDEST)
    assert unavailable_reason(None) is None
    for device in ("cpu", "xpu:0", "mps"):
        reason = unavailable_reason(torch.device(device))
        assert reason == f'it runs on CUDA and ROCm tensors, got {device}; use backend="auto"'
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable_reason(torch.device("cuda")) == 'PyTorch sees no GPU here; use backend="auto"'
    monkeypatch.setattr(triton_kernels, "_triton_version", lambda: (3, 2))
    assert "Triton 3.2 is older than 3.6" in unavailable_reason(None)
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in unavailable_reason(None)
