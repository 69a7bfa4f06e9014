"""Builds the C++ of the CPU under sanitizers and runs it at its worst; exit code 1 if anything is found.

    python -m tools.sanitize [--sanitizers address thread] [--compilers g++ clang++] [--seconds 20] [--rounds 5]

For each compiler that is there and each kind (cmake/sanitize.cmake): tests/sanitize/stress.cpp, which needs neither
Python nor torch, in every instruction set of this processor, and tests/sanitize/calls.py on the Python module. That one
runs in a plain Python, into which LD_PRELOAD brings the sanitizer's runtime; torch and its libraries are not built with
it, so what they do alone is not looked at. Everything lies under build/sanitize, nothing in python/fused_rin.
About twenty minutes on two cores, most of it compiling.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

import cmake

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "fused_rin"
FOLDER = ROOT / "build" / "sanitize"
KINDS = ("address", "thread")
MARKS = ("ERROR: AddressSanitizer", "ERROR: LeakSanitizer", "WARNING: ThreadSanitizer: ", "runtime error: ")
SCENARIOS = [
    ["forks_before_the_first_call", "exits_during_a_call"],
    ["many_threads", "nested_calls", "exceptions", "forks_after_calls"],
]

# Python keeps what it has until it ends, so leaks are looked for in the native program alone; 16 TB are a null pointer;
# for the rest see tests/sanitize/stress.cpp.
OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "thread": {
        "TSAN_OPTIONS": "die_after_fork=0:allocator_may_return_null=1:atexit_sleep_ms=0:"
        f"suppressions={ROOT}/tests/sanitize/tsan.supp"
    },
}


def findings(output: str) -> list[str]:
    """Lines that begin a report. A process that was ending anyway may end well after one."""
    return [line for line in output.splitlines() if any(mark in line for mark in MARKS)]


def runtime(compiler: str, kind: str) -> list[Path]:
    """The shared libraries to preload, none where the compiler has no such sanitizer.

    C++'s own comes with it: the sanitizer looks for what throws as it starts, when a Python has none yet.
    """
    short = {"address": "asan", "thread": "tsan"}[kind]
    machine = os.uname().machine
    names = [f"lib{short}.so", f"libclang_rt.{short}-{machine}.so", f"libclang_rt.{short}.so", "libstdc++.so.6"]
    if "clang" in Path(compiler).name:  # which finds GCC's, too
        names = names[1:]
    paths = []
    for name in names:
        said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(said.stdout.strip())
        if path.is_absolute() and path.exists():
            paths.append(path.resolve())
    return paths if len(paths) == 2 else []


def build(compiler: str, kind: str, folder: Path) -> None:
    """`native_stress` in the folder, and a package with the module under its `python`."""
    package = folder / "python" / "fused_rin"
    package.mkdir(parents=True, exist_ok=True)
    for path in PACKAGE.iterdir():
        if path.suffix != ".so" and path.name != "__pycache__" and not (package / path.name).is_symlink():
            (package / path.name).symlink_to(path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    executable = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    generator = ["-GNinja"] if shutil.which("ninja", path=environment["PATH"]) else []
    configure = [executable, "-S", str(ROOT), "-B", str(folder / "cmake"), *generator, "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}"]
    configure += [f"-DFUSED_RIN_SANITIZE={kind}", "-DFUSED_RIN_CUDA=off"]
    subprocess.run(configure, check=True, env=environment)
    parallel = [] if "CMAKE_BUILD_PARALLEL_LEVEL" in environment else ["--parallel"]
    targets = ["--target", "native_stress", "--target", "_native"]
    subprocess.run([executable, "--build", str(folder / "cmake"), *parallel, *targets], check=True, env=environment)


def without_randomness(kind: str) -> list[str]:
    """What goes before a command under ThreadSanitizer; nothing where it may not be asked for.

    Older runtimes do not find their place in addresses laid out with more than 28 bits of randomness.
    """
    asked = ["setarch", "-R"]
    may = shutil.which("setarch") and subprocess.run([*asked, "true"], capture_output=True).returncode == 0
    return asked if kind == "thread" and may else []


def run(what: str, command: list[str], **environment: str) -> bool:
    """Whether it ended well, with nothing found."""
    print(f"== {what}", flush=True)
    with_these = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=with_these, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    found = findings(done.stdout)
    print(done.stdout[-20000:] + f"-- {len(found)} finding(s), exit code {done.returncode}", flush=True)
    return done.returncode == 0 and not found


def check(compiler: str, kind: str, seconds: float, rounds: int) -> list[str]:
    """What went wrong."""
    folder = FOLDER / f"{Path(compiler).name}-{kind}"
    build(compiler, kind, folder)
    before = without_randomness(kind)
    preloaded = runtime(compiler, kind)
    if not preloaded:
        raise SystemExit(f"{compiler} has no shared runtime of the {kind} sanitizer")
    python = {
        "LD_PRELOAD": " ".join(map(str, preloaded)),
        "PYTHONPATH": str(folder / "python"),
        "PYTHONMALLOC": "malloc",
        **OPTIONS[kind],
    }
    module = [*before, sys.executable, "-m", "tests.sanitize.calls", "--rounds", str(rounds)]
    module += ["--threads-in-children", "1"] if kind == "thread" else ["--quiet-forks"]  # see there
    where = [*before, sys.executable, "-c", "from fused_rin import _native as n; print(n.__file__, *n.isas())"]
    said = subprocess.run(where, env={**os.environ, **python}, stdout=subprocess.PIPE, text=True, check=True).stdout
    path, *sets = said.split()
    assert Path(path).is_relative_to(folder), path
    failed = []
    for name in sets:
        what = f"{compiler}, {kind}, {name}: native"
        if not run(what, [*before, str(folder / "cmake" / "stress" / "native_stress"), name, str(seconds)]):
            failed.append(what)
    for scenarios in SCENARIOS:
        what = f"{compiler}, {kind}: {', '.join(scenarios)}"
        if not run(what, [*module, *scenarios], **python):
            failed.append(what)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizers", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--compilers", nargs="+", default=[c for c in ("g++", "clang++") if shutil.which(c)])
    parser.add_argument(
        "--seconds", type=float, default=20, help="how long each native scenario of many callers goes on"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each scenario of Python is gone through")
    arguments = parser.parse_args()
    if not arguments.compilers:
        raise SystemExit("neither g++ nor clang++ is on the PATH")
    failed = []
    for compiler in arguments.compilers:
        for kind in arguments.sanitizers:
            failed += check(compiler, kind, arguments.seconds, arguments.rounds)
    print("\n".join(["FAILED:", *failed]) if failed else "nothing was found")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
