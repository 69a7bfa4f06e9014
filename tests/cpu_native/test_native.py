"""The CPU sweep as a plain C++ program: here, and for ARM where a cross compiler and an emulator are at hand."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from fused_rin import cpu

ROOT = Path(__file__).parents[2]
SOURCES = [
    "csrc/cpu/amx.cpp",
    "csrc/cpu/crowd.cpp",
    "csrc/cpu/openmp.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/pool.cpp",
    "csrc/cpu/run.cpp",
    "csrc/cpu/team.cpp",
]
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
# The kernels take 84 s to compile with -O1, 26 with -Og and 17 with -O0; to run then 14, 25 and 80.
SANITIZE = ["-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(program: Path, *after: str, before: tuple[str, ...] = ()) -> str:
    done = subprocess.run([*before, program, *after], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(compiler: str, name: str, flags: list[str], folder: Path, *options: str, without: Sequence[str] = ()) -> Path:
    """The program with one instruction set, and for the others what has their names and nothing else."""
    kernels, loops, absent, program = (folder / file for file in ("kernels.o", "loops.o", "absent.cpp", "compare"))
    for command in (
        [*FLAGS, *flags, f"-DFUSED_RIN_ISA={name}", "-c", "csrc/cpu/sweep.cpp", "-o", kernels],
        # What results are compared with, the same arithmetic in plain loops: were it as slow, a third of the time.
        [*FLAGS, "-O2", "-c", "tests/cpu_native/compare.cpp", "-o", loops],
    ):
        subprocess.run([compiler, *command], cwd=ROOT, check=True)
    stub = "namespace fused_rin {{ const Kernels* kernels_{}() {{ static const Kernels k{{}}; return &k; }} }}\n"
    absent.write_text(f'#include "{ROOT}/csrc/cpu/sweep.h"\n' + "".join(stub.format(other) for other in without))
    command = [compiler, *FLAGS, *SOURCES, kernels, loops, absent, "-pthread", *options, "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


def test_neon_under_an_emulator(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    output = run(build(compiler, "neon", [], tmp_path, "-static"), before=(emulator,))
    assert "neon" in output


PAIRS = ["-DFUSED_RIN_PAIRS=1"]
AVX512 = ["-DFUSED_RIN_VECTOR_BYTES=64", "-DFUSED_RIN_VECTOR_REGISTERS=32", "-Wno-psabi"]
TILES = ["-DFUSED_RIN_TILES=2"]


def test_under_the_sanitizers(tmp_path):
    """Addresses and undefined behaviour, in the best set below that this processor has.

    With products of pairs of bfloat16, with the vectors and registers of AVX-512, and with the tiles of AMX, which need
    no such processor: by what stands in for them. (tests/sanitize has the processor's own shapes, and threads.)
    """
    flags = {"avx2": ["-mavx2", "-mfma"]}
    name = next(name for name in ("avx2", "baseline", "neon") if name in cpu.instruction_sets())
    others = [] if name == "neon" else [other for other in ("avx512", "avx2", "baseline") if other != name]
    options = [*flags.get(name, []), *SANITIZE, *AVX512, *PAIRS, *TILES]
    compiler = shutil.which("g++") or shutil.which("c++")
    said = run(build(compiler, name, options, tmp_path, *SANITIZE, without=others), name)
    assert f"{name} by tiles, of float16 too" in said


def test_the_unit_for_bfloat16_does_what_stands_in_for_it(tmp_path):
    if "avx512_bf16" not in cpu.instruction_sets():
        pytest.skip("needs a processor with AVX512-BF16, and a build for it")
    program, flags = tmp_path / "units", ["-O2", "-mavx512f", "-mavx512bf16", "-mfma"]
    command = [shutil.which("g++") or shutil.which("c++"), "-std=c++17", *flags, "tests/cpu_native/units.cpp"]
    subprocess.run([*command, "-o", program], cwd=ROOT, check=True)
    assert run(program).startswith("0 different")
