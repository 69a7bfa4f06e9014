"""What nvcc made of every kernel, on every architecture: registers, stack, shared memory.

Nothing may spill or have a stack. A kernel that takes more shared memory than a block may have on an architecture is
empty there. The registers are compared with a committed table of six architectures, so that a change is seen. What is
compared in every run is the built module, as a rule sm_80 and sm_90a, and on the other four the kernels that are
shortest of registers. The table holds for one release of nvcc; with another one only the limits are checked, and the
test says so. To make it anew:

    make cuda-all                              all six, ten to fifteen minutes of one core
    python -m tests.cuda_aot.test_resources    the architectures of the built module
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from fused_rin import cuda_plan

from benchmarks.gpu import predict
from benchmarks.gpu.cubins import Resources, compiler_release, cubins, readable
from tools import cuda_toolkit

TABLE = Path(__file__).with_name("resources.json")
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a block may opt in to
DEFAULT_ARCHS = {80, 90}
EMPTY = 16  # registers that a kernel without a body may take
# Kernels within a register or two of the limit, which spilled in one version or another of the sources.
SHORT_OF_REGISTERS = {
    86: ("float16 mma 192x8",),
    89: ("bfloat16 mma 192x8", "float32 grid-fma 2048x4/128"),
    100: ("float16 mma 384x8", "float16 units-mma 384x8", "float32 tf32x3 192x8", "float32 tf32 256x8"),
    120: ("bfloat16 mma 192x8", "float32 tf32 128x8"),
}


def module() -> Path:
    """The built CUDA module; skips where there is neither it nor an nvcc that works, fails where there is one."""
    spec = importlib.util.find_spec("fused_rin._cuda")
    if spec is not None and spec.origin:
        return Path(spec.origin)
    if os.environ.get("FUSED_RIN_CUDA", "auto").lower() == "off":
        pytest.skip("FUSED_RIN_CUDA=off, and no CUDA module: nothing was compiled to look at")
    nvcc = find_nvcc()
    pytest.fail(f"there is {nvcc}, but fused_rin._cuda was not built; install again (or set FUSED_RIN_CUDA=off)")


def found_in(path: Path) -> dict[int, dict[str, Resources]]:
    """{sm number: {kernel: what it takes}} of a module or a cubin."""
    found: dict[int, dict[str, Resources]] = {}
    for arch, kernels in cubins(path):
        for name, resources in kernels.items():
            assert readable(name) not in found.setdefault(arch, {}), f"{readable(name)} twice for sm_{arch}"
            found[arch][readable(name)] = resources
    return found


def compiled() -> dict[int, dict[str, Resources]]:
    return found_in(module())


@functools.cache
def chosen() -> cuda_toolkit.Choice:
    return cuda_toolkit.choose()


def find_nvcc() -> str:
    """The nvcc that a build takes; skips where there is none, or none that works."""
    if chosen().nvcc is None:
        pytest.skip(chosen().warning or "no nvcc here")
    return chosen().nvcc


def kernel_of(name: str) -> cuda_plan.Kernel:
    return predict.kernel_of(name)


def can_run(name: str, arch: int) -> bool:
    """Whether the architecture has what the kernel needs, shared memory and clusters; else it is never planned, and
    empty.
    """
    kernel = kernel_of(name)
    fits = kernel.shared_bytes(backward=name.endswith("backward")) <= SHARED_LIMIT[arch] * 1024
    return fits and (kernel.ctas == 1 or kernel.grid or arch >= 90)


def every_kernel() -> set[str]:
    return {
        f"{dtype} {of}{k.math} {predict.size_of(k)} {direction}"
        for of, kernels in (
            ("", cuda_plan.KERNELS),
            ("units-", cuda_plan.UNIT_KERNELS),
            ("cluster-", cuda_plan.CLUSTER_KERNELS),
            ("grid-", cuda_plan.GRID_KERNELS),
        )
        for k in kernels
        for dtype in (("bfloat16", "float16") if k.math == "mma" else ("float32",))
        for direction in ("forward", "backward")
    }


def test_every_kernel_is_there_on_every_architecture():
    found = compiled()
    assert found, f"no cubin in {module()}: built with PTX alone, or compressed"
    for arch, kernels in found.items():
        assert set(kernels) == every_kernel(), f"sm_{arch}"


def test_the_module_says_what_it_has_code_for():
    found, release = compiled(), compiler_release(module())  # skips where there is none
    from fused_rin import _cuda

    numbers = [int(name.rstrip("af")) for name in _cuda.architectures.split()]
    assert sorted(numbers) == sorted(found)
    assert _cuda.ptx == numbers[0]
    driver, runtime = _cuda.versions()  # answers without a driver too: 0
    assert f"{runtime // 1000}.{runtime % 1000 // 10}" == release
    assert driver == 0 or driver >= 11000


def test_nothing_spills_and_everything_fits():
    for arch, kernels in compiled().items():
        for name, resources in kernels.items():
            kernel = kernel_of(name)
            where = f"{name} on sm_{arch}"
            assert resources.stack == 0, f"{where}: a stack of {resources.stack} bytes: spills, or a local array"
            assert (resources.registers > EMPTY) == can_run(name, arch), f"{where}: {resources.registers} registers"
            assert resources.registers * kernel.threads <= 65536, f"{where}: {resources.registers} registers a thread"
            assert resources.static_shared <= 1024, f"{where}: static shared memory"  # sm_90 reserves 1 KB
            assert any(can_run(name, other) for other in SHARED_LIMIT), f"{name} fits no architecture"


def test_the_planner_leaves_out_what_an_architecture_cannot_hold():
    from fused_rin.device import Device, NoPlan

    for arch, kilobytes in SHARED_LIMIT.items():
        device = Device(f"sm_{arch}", (arch // 10, arch % 10), 100, kilobytes * 1024, 65536, 0, 1)
        for dtype in cuda_plan.DTYPES:
            for hidden in (32, 100, 192, 256, 384):
                try:
                    kernel = cuda_plan.plan(64, 1, hidden, dtype, device).kernel
                except NoPlan:
                    continue
                assert kernel.most_shared_bytes <= kilobytes * 1024


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_the_latency_program_compiles(tmp_path, arch):
    """It runs in `make gpu` alone; wgmma, clusters and their PTX are only checked by the compiler here."""
    root = TABLE.parents[2]
    command = [
        find_nvcc(),
        "-std=c++17",
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
        "-I",
        str(root / "csrc/cuda"),
    ]
    command += ["-cubin", "-o", str(tmp_path / "latencies.cubin"), str(root / "benchmarks/gpu/latencies.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr  # ptxas says so where wgmma would not overlap, and the figures mean nothing


def table(found: dict[int, dict[str, Resources]]) -> dict[str, dict[str, int]]:
    return {f"sm_{arch}": {name: r.registers for name, r in sorted(k.items())} for arch, k in sorted(found.items())}


def test_registers_are_those_of_the_committed_table():
    committed = json.loads(TABLE.read_text())
    found, release = table(compiled()), compiler_release(module())
    if release != committed["nvcc"]:
        warnings.warn(f"built by nvcc {release}, the table is of {committed['nvcc']}: not compared", stacklevel=1)
        return
    known = {arch: kernels for arch, kernels in found.items() if arch in committed["registers"]}
    assert known or not DEFAULT_ARCHS & {int(a[3:]) for a in found}
    for arch, kernels in known.items():
        assert kernels == committed["registers"][arch], f"{arch}; if this is meant: python -m {__spec__.name}"


def test_the_table_has_every_kernel_on_every_architecture():
    committed = json.loads(TABLE.read_text())
    assert set(committed["registers"]) == {f"sm_{arch}" for arch in SHARED_LIMIT}
    for arch, kernels in committed["registers"].items():
        assert set(kernels) == every_kernel(), arch
        assert max(kernels.values()) <= 255


def instantiations(kernels: tuple[str, ...]) -> str:
    """C++ that has the compiler make both directions of the named kernels, with the columns of block_configs.h or
    grid_configs.h.
    """
    lines = ['#include "block.cuh"', "namespace fused_rin {"]
    for kernel in kernels:
        dtype, math, size = kernel.split()
        plan = "grid" if math.startswith("grid-") else "block"
        configs = (TABLE.parents[2] / "csrc" / "cuda" / f"{plan}_configs.h").read_text()
        element = {"float32": "float", "bfloat16": "T", "float16": "T"}[dtype]
        units = "" if plan == "grid" else f", {str(math.startswith('units-')).lower()}"
        product = math.rpartition("-")[2]
        math_name = {"mma": "kMma", "tf32": "kTf32", "tf32x3": "kTf32x3", "fma": ""}[product]
        head = f"MmaConfig<{element}, Math::{math_name}," if math_name else "FmaConfig<"
        of_tile, _, ctas = size.partition("/")
        columns = r",\s*".join(of_tile.split("x")) + rf",[^>]*{ctas}[^>]*>"
        found = re.search(rf"{head}\s*{columns}", configs)
        assert found, f"{kernel} is not in {plan}_configs.h"
        tag = {"bfloat16": "BFloat16", "float16": "Float16"}.get(dtype, "")
        config = found.group().replace("<T,", f"<device::{tag},")
        for backward in ("false", "true"):
            lines.append(f"template __global__ void {plan}_sweep<{config}, {backward}{units}>(const Problem);")
    return "\n".join([*lines, "}", ""])


@pytest.mark.parametrize("arch", SHORT_OF_REGISTERS)
def test_the_kernels_short_of_registers_elsewhere(tmp_path, arch):
    """On the architectures that the default build leaves out."""
    nvcc = find_nvcc()
    source, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    source.write_text(instantiations(SHORT_OF_REGISTERS[arch]))
    command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-I", str(TABLE.parents[2] / "csrc/cuda")]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = found_in(cubin)
    assert set(found) == {arch}
    assert len(found[arch]) == 2 * len(SHORT_OF_REGISTERS[arch])
    for name, resources in found[arch].items():
        assert resources.stack == 0, f"{name} on sm_{arch}: a stack of {resources.stack} bytes"
    committed = json.loads(TABLE.read_text())
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if f"release {committed['nvcc']}," not in release:
        warnings.warn(f"the table is of nvcc {committed['nvcc']}: not compared", stacklevel=1)
        return
    expected = committed["registers"][f"sm_{arch}"]
    got = {name: r.registers for name, r in found[arch].items()}
    assert got == {name: expected[name] for name in got}, "if this is meant: make cuda-all"


def write(path: Path, release: str) -> None:
    """Puts the architectures of a module, by this release of nvcc, into the table, unless one spills."""
    found = found_in(path)
    spills = [
        f"{name} on sm_{arch}: {resources.stack} bytes"
        for arch, kernels in found.items()
        for name, resources in sorted(kernels.items())
        if resources.stack
    ]
    if spills:
        sys.exit("\n".join(["the table is left as it is, these have a stack:", *spills]))
    content = {"nvcc": release, "registers": table(found)}
    before = json.loads(TABLE.read_text())
    if before["nvcc"] == content["nvcc"]:  # architectures that this build does not have stay
        content["registers"] = dict(sorted({**before["registers"], **content["registers"]}.items()))
    TABLE.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {TABLE}: {', '.join(content['registers'])}")


if __name__ == "__main__":
    write(module(), compiler_release(module()))
