"""The committed cycles of a step of every kernel are those of the code that nvcc makes, and hide device memory.

To make the table anew, three minutes: python -m benchmarks.gpu.predict
"""

from __future__ import annotations

import json
import warnings

import pytest
from fused_rin import cuda_plan

from benchmarks.gpu import predict
from benchmarks.gpu.cubins import compiler_release
from tests.cuda_aot.test_resources import can_run, every_kernel, module

COMMITTED = json.loads(predict.TABLE.read_text())
SAMPLE = (  # played anew
    "bfloat16 mma 128x8 forward", "bfloat16 mma 128x8 backward", "float32 fma 64x2 forward",
    "bfloat16 cluster-mma 1024x8 forward", "bfloat16 grid-mma 2048x8/128 backward",
)  # fmt: skip


def test_the_table_has_every_kernel_that_can_run():
    for arch, kernels in COMMITTED["cycles"].items():
        assert set(kernels) == {name for name in every_kernel() if can_run(name, int(arch.removeprefix("sm_")))}
        for name, row in kernels.items():
            kinds = {"general"} if " units-" in name else {"relu", "tanh", "general"}
            assert set(row) == {*kinds, "code"}, name


def test_no_step_waits_for_device_memory():
    slower = {
        f"{arch} {name} {loop}": times
        for arch, kernels in COMMITTED["cycles"].items()
        for name, row in kernels.items()
        for loop, times in row.items()
        if loop != "code" and times[-1] > 1.15 * times[0]
    }
    assert not slower


def test_the_table_is_of_this_code():
    """By its digest; a few are played again."""
    if compiler_release(module()) != COMMITTED["nvcc"]:
        warnings.warn(f"built by another nvcc than {COMMITTED['nvcc']}: not compared", stacklevel=1)
        return
    found = predict.digests(module())
    compared = 0
    for (arch, name), code in found.items():
        row = COMMITTED["cycles"].get(arch, {}).get(name)
        if row is None:  # empty, or of an architecture that is not in the table
            continue
        assert row["code"] == code, f"{arch} {name}; if this is meant: python -m benchmarks.gpu.predict"
        compared += 1
    assert compared or not {"sm_80", "sm_90"} & {arch for arch, _ in found}
    for arch, name, loops in predict.kernels(module(), SAMPLE):
        if arch not in COMMITTED["cycles"]:
            continue
        kernel, number = predict.kernel_of(name), int(arch.removeprefix("sm_"))
        times = {kind: predict.cycles(kernel, ways, number) for kind, ways in loops.items()}
        assert {**times, "code": found[arch, name]} == COMMITTED["cycles"][arch][name]


@pytest.mark.parametrize(
    "kernel",
    [k for k in (*cuda_plan.KERNELS, *cuda_plan.CLUSTER_KERNELS, *cuda_plan.GRID_KERNELS) if k.math == "fma"],
    ids=predict.size_of,
)
def test_wavefronts_of_fma_loads_lie_between_the_states_and_the_matrixs(kernel):
    assert 1 <= predict.wavefronts(kernel) <= 4
    assert (predict.wavefronts(kernel) == 1) == (not kernel.matrix_shared_bytes)
