"""What nvcc made of every kernel, on every architecture of the build: registers, stack, shared memory.

Nothing may spill or have a stack (sm_80, sm_90a; the rest: see STACK_ELSEWHERE), and the registers are compared with a
committed table, so that a change is seen:

    python -m tests.cuda_aot.test_resources    # rewrites resources.json from the built module

The table holds for one release of nvcc; with another one only the limits are checked, and the test says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from fused_rin import cuda_plan

from benchmarks.gpu.cubins import Resources, compiler_release, cubins, readable

TABLE = Path(__file__).with_name("resources.json")
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a block may opt in to
DEFAULT_ARCHS = {80, 90}
# The kernels' register budgets are drawn up for sm_80 and sm_90a. On sm_100 and sm_120 a few of the largest tiles come
# out one to four registers short (nvcc 13.0); more than that is a mistake there too.
STACK_ELSEWHERE = 24


def module() -> Path:
    """The built CUDA module; skips where there is neither it nor an nvcc, fails where there is only an nvcc."""
    spec = importlib.util.find_spec("fused_rin._cuda")
    if spec is not None and spec.origin:
        return Path(spec.origin)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc and os.environ.get("FUSED_RIN_CUDA", "auto").lower() != "off":
        pytest.fail(f"there is {nvcc}, but fused_rin._cuda was not built; install again (or set FUSED_RIN_CUDA=off)")
    pytest.skip("no nvcc here and no CUDA module: nothing was compiled to look at")


def compiled() -> dict[int, dict[str, Resources]]:
    found: dict[int, dict[str, Resources]] = {}
    for arch, kernels in cubins(module()):
        for name, resources in kernels.items():
            assert readable(name) not in found.setdefault(arch, {}), f"{readable(name)} twice for sm_{arch}"
            found[arch][readable(name)] = resources
    return found


def kernel_of(name: str) -> cuda_plan.Kernel:
    _, math, size, _ = name.split()
    hidden, rows = map(int, size.split("x"))
    return next(k for k in cuda_plan.KERNELS if (k.math, k.hidden, k.rows) == (math, hidden, rows))


def test_every_kernel_is_there_on_every_architecture():
    expected = {
        f"{dtype} {k.math} {k.hidden}x{k.rows} {direction}"
        for k in cuda_plan.KERNELS
        for dtype in (("bfloat16", "float16") if k.math == "mma" else ("float32",))
        for direction in ("forward", "backward")
    }
    found = compiled()
    assert found, f"no cubin in {module()}: built with PTX alone, or compressed"
    for arch, kernels in found.items():
        assert set(kernels) == expected, f"sm_{arch}"


def test_nothing_spills_and_everything_fits():
    for arch, kernels in compiled().items():
        for name, resources in kernels.items():
            kernel = kernel_of(name)
            where = f"{name} on sm_{arch}"
            allowed = STACK_ELSEWHERE if arch not in DEFAULT_ARCHS else 0
            assert resources.stack <= allowed, f"{where}: a stack of {resources.stack} bytes: spills, or a local array"
            assert resources.registers * kernel.threads <= 65536, f"{where}: {resources.registers} registers a thread"
            assert resources.static_shared <= 1024, f"{where}: static shared memory"  # sm_90 reserves 1 KB
            # A kernel too large for an architecture is never planned there: the planner asks for the device's limit.
            assert kernel.shared_bytes <= 227 * 1024, where


def test_the_planner_leaves_out_what_an_architecture_cannot_hold():
    from fused_rin.backends import Device

    for arch, kilobytes in SHARED_LIMIT.items():
        device = Device(f"sm_{arch}", (arch // 10, arch % 10), 100, kilobytes * 1024, 65536, 0, 1)
        for dtype in cuda_plan.DTYPES:
            for hidden in (32, 100, 192, 256, 384):
                try:
                    kernel = cuda_plan.plan(64, 1, hidden, dtype, device).kernel
                except cuda_plan.NoPlan:
                    continue
                assert kernel.shared_bytes <= kilobytes * 1024


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_the_latency_program_compiles(tmp_path, arch):
    """It runs in `make gpu` alone; wgmma, clusters and their PTX are only checked by the compiler here."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        pytest.skip("no nvcc here")
    root = TABLE.parents[2]
    command = [nvcc, "-std=c++17", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-I", str(root / "csrc/cuda")]
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


if __name__ == "__main__":
    found = compiled()
    content = {"nvcc": compiler_release(module()), "registers": table(found)}
    if TABLE.exists():  # architectures that this build does not have stay
        before = json.loads(TABLE.read_text())
        if before["nvcc"] == content["nvcc"]:
            content["registers"] = dict(sorted({**before["registers"], **content["registers"]}.items()))
    TABLE.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {TABLE}: {', '.join(content['registers'])}")
