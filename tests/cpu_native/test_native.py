"""The CPU sweep as a plain C++ program: here, and for ARM where a cross compiler and an emulator are at hand."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from fused_rin import cpu

ROOT = Path(__file__).parents[2]
SOURCES = [
    "csrc/cpu/crowd.cpp",
    "csrc/cpu/openmp.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/pool.cpp",
    "csrc/cpu/run.cpp",
    "csrc/cpu/team.cpp",
    "tests/cpu_native/compare.cpp",
]
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(program: Path, *after: str, before: tuple[str, ...] = ()) -> str:
    done = subprocess.run([*before, program, *after], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(compiler: str, sets: dict[str, list[str]], folder: Path, *options: str) -> Path:
    objects = []
    for name, flags in sets.items():
        objects.append(str(folder / f"{name}.o"))
        define = f"-DFUSED_RIN_ISA={name}"
        command = [compiler, *FLAGS, *flags, define, "-c", "csrc/cpu/sweep.cpp", "-o", objects[-1]]
        subprocess.run(command, cwd=ROOT, check=True)
    program = folder / "compare"
    subprocess.run([compiler, *FLAGS, *SOURCES, *objects, "-pthread", *options, "-o", program], cwd=ROOT, check=True)
    return program


def test_neon_under_an_emulator(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    output = run(build(compiler, {"neon": []}, tmp_path, "-static"), before=(emulator,))
    assert "neon" in output


AVX512_SHAPES = ["-DFUSED_RIN_VECTOR_BYTES=64", "-DFUSED_RIN_VECTOR_REGISTERS=32", "-Wno-psabi"]
PAIRS = ["-DFUSED_RIN_PAIRS=1"]


@pytest.mark.parametrize("shapes", [PAIRS, AVX512_SHAPES + PAIRS], ids=["own", "of AVX-512"])
def test_under_the_sanitizers(tmp_path, shapes):
    """Addresses and undefined behaviour, in the first set below that this processor has; the others only link.

    With vectors of 64 bytes and 32 registers too, the tiles of AVX-512, which need no such processor, and with products
    of pairs of bfloat16, by what stands in for the instruction.
    """
    assert under(SANITIZE, shapes, tmp_path)


def test_the_unit_for_bfloat16_does_what_stands_in_for_it(tmp_path):
    if "avx512_bf16" not in cpu.instruction_sets():
        pytest.skip("needs a processor with AVX512-BF16, and a build for it")
    program, flags = tmp_path / "units", ["-O2", "-mavx512f", "-mavx512bf16", "-mfma"]
    command = [shutil.which("g++") or shutil.which("c++"), "-std=c++17", *flags, "tests/cpu_native/units.cpp"]
    subprocess.run([*command, "-o", program], cwd=ROOT, check=True)
    assert run(program).startswith("0 different")


def test_under_the_thread_sanitizer(tmp_path):
    """What one thread hands to another, in teams that stay together and in teams that one of them leaves."""
    assert under(["-fsanitize=thread"], [], tmp_path, "teams")


def under(sanitizer: list[str], shapes: list[str], folder: Path, *arguments: str) -> bool:
    """Whether the program passes with the first set below that this processor has; the others only link."""
    if platform.machine() in ("aarch64", "arm64"):
        sets = {"neon": []}
    else:
        sets = {
            "avx2": ["-mavx2", "-mfma"],
            "baseline": [],
            "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
        }
    checked = next(name for name in sets if name in cpu.instruction_sets())
    for name, flags in sets.items():
        flags += [*sanitizer, *shapes] if name == checked else ["-O0"]
    compiler = shutil.which("g++") or shutil.which("c++")
    return checked in run(build(compiler, sets, folder, *sanitizer), checked, *arguments)
