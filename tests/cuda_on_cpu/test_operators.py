"""What processes without Python do with CUDA tensors: the plan, and the operators themselves on fibres."""

from __future__ import annotations

import itertools

import pytest
import torch
from fused_rin import cuda_plan
from fused_rin.device import NoPlan

from tests.conftest import check_sweeps, make_case
from tests.cuda_on_cpu.machine import HAS_STABLE_ABI, Machine
from tests.test_cuda_plan import DEVICES, TURING

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("device", [*DEVICES, TURING], ids=lambda device: device.name)
def test_the_plan_without_python_is_the_same(machine: Machine, device):
    limits = (*device.capability, device.sms, device.shared_memory_per_block, device.registers_per_sm)
    limits += (device.max_cluster_size,)
    sizes = [1, 8, 33, 64, 65, 128, 129, 150, 192, 193, 256, 257, 384, 385, 512, 513, 1000, 1025, 2048, 2049]
    seen = set()
    for dtype, hidden, batch, groups, tf32, units in itertools.product(
        cuda_plan.DTYPES, sizes, (0, 1, 7, 8, 9, 100, 1057, 4096, 100_000), (1, 2, 6), (False, True), (False, True)
    ):
        try:
            plan = cuda_plan.plan(batch, groups, hidden, dtype, device, allow_tf32=tf32, units=units)
            kernel = plan.kernel
            expected = (cuda_plan.MATH[kernel.math], kernel.hidden, kernel.rows, kernel.ctas)
            expected += (plan.tile_rows, plan.workspace_bytes)
        except NoPlan:
            expected = None
        got = machine.plan(batch, groups, hidden, cuda_plan.DTYPES[dtype], tf32, limits, units)
        assert got == expected, (dtype, hidden, batch, groups, tf32, units)
        seen.add(got)
    assert len(seen) > 3 or device in (TURING,)


@pytest.mark.parametrize("version", [80, 86, 87, 89, 90, 100, 103, 120])
def test_shared_memory_of_code_is_the_same(machine: Machine, version):
    assert machine.library.emulated_shared_bytes_of_code(version) == cuda_plan._shared_bytes_of_code(version)


needs_stable_abi = pytest.mark.skipif(not HAS_STABLE_ABI, reason="the stable ABI came with torch 2.10")


@pytest.fixture
def operators(machine: Machine, monkeypatch):
    """(forward, backward) with a backend's arguments, outputs poisoned by nobody: the kernels write every number."""
    names = torch.ops.fused_rin_fibres

    def forward(pre, weight, h0, rows, rule):
        return names.sweep_forward(pre, weight, h0, *rows, *rule, "auto")

    def backward(grad_out, grad_h_n, weight, out, rows, rule):
        return names.sweep_backward(grad_out, grad_h_n, weight, out, *rows, *rule, "cuda")

    return forward, backward


@needs_stable_abi
@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
@pytest.mark.parametrize(
    ("dtype", "hidden"), [(BF16, 64), (BF16, 61), (FP16, 20), (FP32, 64), (FP32, 50), (FP32, 3)], ids=str
)
def test_the_operators_on_fibres(operators, dtype, hidden, layout):
    """Sizes that need a padding and that do not; resets whose number is no multiple of four."""
    case = make_case(5, 3, hidden, 2, dtype=dtype, layout=layout, resets=True, skip=0.7, num_reversed=1)
    check_sweeps(*operators, case)


@needs_stable_abi
def test_units_in_one_axis_strides_and_misalignment(operators):
    forward, _ = operators
    case = make_case(4, 3, 24, 2, dtype=BF16)
    want, want_h_n = forward(*case.arguments)
    out, h_n = forward(case.pre.flatten(2), *case.arguments[1:])
    assert torch.equal(out, want.flatten(2))
    assert torch.equal(h_n, want_h_n)
    shifted = torch.empty(case.pre.numel() + 1, dtype=BF16)[1:].view_as(case.pre).copy_(case.pre)
    strided = case.weight.mT.contiguous().mT
    assert shifted.data_ptr() % 16
    out, h_n = forward(shifted, strided, *case.arguments[2:])
    assert torch.equal(out, want)
    assert torch.equal(h_n, want_h_n)


@needs_stable_abi
def test_an_empty_batch_and_what_no_kernel_takes(operators):
    forward, _ = operators
    empty = make_case(4, 0, 24, dtype=BF16)
    out, h_n = forward(*empty.arguments)
    assert out.shape == empty.pre.shape
    assert h_n.shape == (0, 1, 24)
    with pytest.raises(ValueError, match="the CUDA kernels take float32, bfloat16 and float16"):
        forward(*make_case(2, 1, 8, dtype=torch.float64).arguments)
    with pytest.raises(ValueError, match="no CUDA kernel holds a matrix of 2100 units on this device"):
        forward(*make_case(2, 1, 2100, dtype=BF16).arguments)
