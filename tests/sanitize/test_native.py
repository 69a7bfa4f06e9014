"""The CPU engine without Python, under both kinds of sanitizers, at its worst (stress.cpp); and planted faults.

`make sanitize` is the long form: every instruction set, optimised, each compiler, and the Python module.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from fused_rin import cpu

import cmake

ROOT = Path(__file__).resolve().parents[2]
# Optimised, addresses and undefined behaviour take 21 s to compile, not 5.
SANITIZERS = {
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
FLAGS = ["-std=c++17", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
INSTRUCTIONS = {"avx2": ["-mavx2", "-mfma"], "baseline": [], "neon": []}
ABSENT = """
const Kernels* kernels_{}() {{
  static const Kernels none = [] {{ Kernels k{{}}; k.name = "absent"; return k; }}();
  return &none;
}}
"""


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    assert found
    return found


# What a kind has built, each process of pytest-xdist would build anew.
@pytest.fixture(
    scope="module", params=[pytest.param(k, marks=pytest.mark.xdist_group(f"sanitize {k}")) for k in SANITIZERS]
)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """The kind of sanitizer, stress.cpp with it, and the instruction set that is in it: one of this processor."""
    folder = tmp_path_factory.mktemp(request.param)
    options = [compiler(), *FLAGS, *SANITIZERS[request.param]]
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    linked = subprocess.run([*options, probe, "-o", folder / "probe"], capture_output=True, text=True)
    if linked.returncode:
        pytest.skip(f"{compiler()} has no {request.param} sanitizer: {linked.stderr.strip().splitlines()[-1]}")
    isa = next(name for name in INSTRUCTIONS if name in cpu.instruction_sets())
    others = [name for name in ("avx512", "avx2", "baseline") if isa not in (name, "neon")]
    (folder / "absent.cpp").write_text(
        f'#include "{ROOT}/csrc/cpu/sweep.h"\nnamespace fused_rin {{{"".join(map(ABSENT.format, others))}}}\n'
    )
    kernels, runtime = folder / "kernels.o", folder / "libtorch_cpu.so"
    sources = [path for path in ROOT.glob("csrc/cpu/*.cpp") if path.name != "sweep.cpp"]
    own = [ROOT / "tests/sanitize/stress.cpp", folder / "absent.cpp"]
    for command in (
        [*INSTRUCTIONS[isa], f"-DFUSED_RIN_ISA={isa}", "-c", ROOT / "csrc/cpu/sweep.cpp", "-o", kernels],
        ["-fPIC", "-shared", "-Wl,-soname,libtorch_cpu.so", ROOT / "tests/sanitize/runtime.cpp", "-o", runtime],
        [
            *sources,
            *own,
            kernels,
            "-Wl,--no-as-needed",
            runtime,
            f"-Wl,-rpath,{folder}",
            "-ldl",
            "-o",
            folder / "stress",
        ],
    ):
        subprocess.run([*options, *command], check=True, cwd=ROOT)
    return request.param, folder / "stress", isa


def run(program: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


def findings(output: str) -> list[str]:
    """A process that was ending anyway may end well after a report."""
    marks = ("ERROR: AddressSanitizer", "ERROR: LeakSanitizer", "WARNING: ThreadSanitizer: ", "runtime error: ")
    return [line for line in output.splitlines() if any(mark in line for mark in marks)]


def test_nothing_is_found_and_every_result_is_as_alone(program):
    _, stress, isa = program
    code, output = run(stress, isa, "1")
    assert not findings(output), output
    assert code == 0, output


FAULTS = {
    "address": {
        "out-of-bounds": "ERROR: AddressSanitizer",
        "overflow": "runtime error: signed integer overflow",
    },
    "thread": {"race": "WARNING: ThreadSanitizer: data race"},
}


def test_planted_faults_are_found(program):
    """In the engine's own code: it is built with the sanitizer, and nothing hides what that says."""
    kind, stress, isa = program
    for fault, words in FAULTS[kind].items():
        code, output = run(stress, isa, fault)
        assert code != 0
        assert any(words in line for line in findings(output)), output


@pytest.mark.parametrize("value", ["memory", "ON", "address,undefined"])
def test_the_build_refuses_another_sanitizer(value):
    command = [f"{cmake.CMAKE_BIN_DIR}/cmake", f"-DFUSED_RIN_SANITIZE={value}", "-P", "cmake/sanitize.cmake"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"must be address, thread or off, got '{value}'" in " ".join(done.stderr.split())
