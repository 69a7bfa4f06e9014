"""The CUDA kernels on CPU fibres: compiles csrc/cuda against csrc/cuda_on_cpu and calls it.

The library is built with the C++ compiler at hand (`CXX`, g++, clang++) into build/cuda_on_cpu, once per content of
its sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CUDA, CPU, HERE = ROOT / "csrc" / "cuda", ROOT / "csrc" / "cuda_on_cpu", Path(__file__).parent
OPERATORS = ROOT / "csrc" / "operators"
SMALL = 256  # hidden size up to which blocks share a tile for these tests alone (small_kernels.cpp)
HAS_STABLE_ABI = torch.__version__ >= (2, 10)  # which the operators' C++ library is built on


class KernelError(RuntimeError):
    """What the fibres caught, with the kernel's coordinates."""


class Problem(ctypes.Structure):
    """csrc/problem.h"""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("steps", "batch", "groups", "hidden", "num_reversed")),
        ("dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("backward", ctypes.c_bool),
        ("skip", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("lengths", "offsets", "resets", "weight", "in_", "saved")),
        *((name, ctypes.c_void_p) for name in ("state_in", "out", "state_out")),
        ("padding", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("transitions", "plane")),
        ("inner", ctypes.c_void_p),
        ("scalar_states", ctypes.c_bool),
        ("tile_rows", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("workspace_bytes", "first_tile")),
        *((name, ctypes.c_void_p) for name in ("carried_in", "carried_out")),
        ("form", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("skips", "gains", "initial", "noise", "aside")),
    ]


class TensorView(ctypes.Structure):
    """csrc/cuda_on_cpu/emulated.h"""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("writable", ctypes.c_int32),
    ]


def build() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise RuntimeError("the emulation of the CUDA kernels needs a C++17 compiler (g++, clang++ or CXX)")
    units = [
        *sorted(path for plan in ("block", "cluster", "grid") for path in CUDA.glob(f"{plan}*.cu")),
        CUDA / "plan.cpp",
        *sorted(CPU.glob("*.cpp")),
        *sorted(HERE.glob("*.cpp")),
    ]
    headers = [path for folder in (ROOT / "csrc", CUDA, CPU, OPERATORS) for path in sorted(folder.glob("*.*h"))]
    flags = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", "-I", str(CPU), "-I", str(CUDA)]
    flags.append("-U_FORTIFY_SOURCE")  # whose longjmp takes another stack for a mistake
    libraries = []
    if HAS_STABLE_ABI:
        units.append(OPERATORS / "sweep.cpp")
        folder = Path(torch.__file__).parent
        flags += ["-isystem", str(folder / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wno-attributes"]
        libraries = [str(folder / "lib" / "libtorch_cpu.so")]
    else:
        units.remove(CPU / "operators.cpp")
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for file in [*units, *headers]:
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "cuda_on_cpu"
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)

        def compile_unit(unit: Path) -> Path:
            target = folder / f"{library.stem}-{os.getpid()}-{unit.stem}.o"
            level = "-O2" if unit.parent == CPU else "-Og"  # kernels take longer to compile than to run
            subprocess.run([compiler, *flags, level, "-x", "c++", "-c", str(unit), "-o", str(target)], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        partial = folder / f"{library.stem}-{os.getpid()}.so"
        subprocess.run([compiler, "-shared", *map(str, objects), *libraries, "-o", str(partial)], check=True)
        partial.rename(library)  # atomic: test processes may race
        for file in objects:
            file.unlink()
    return ctypes.CDLL(str(library))


class Machine:
    def __init__(self) -> None:
        self.library = build()

    def plan(
        self,
        batch: int,
        groups: int,
        hidden: int,
        dtype: int,
        allow_tf32: bool,
        device: tuple[int, ...],
        units: bool = False,
    ) -> tuple[int, ...] | None:
        """(math, hidden, rows, ctas, rows of a tile, workspace bytes) as processes without Python choose; None where no
        kernel fits.
        """
        call, chosen = self.library.emulated_plan, (ctypes.c_int32 * 6)()
        call.argtypes = [*[ctypes.c_int64] * 3, *[ctypes.c_int] * 3, *[ctypes.POINTER(ctypes.c_int32)] * 2]
        failed = call(batch, groups, hidden, dtype, allow_tf32, units, (ctypes.c_int32 * 6)(*device), chosen)
        return None if failed else tuple(chosen)

    def instances(self) -> list[tuple[int, ...]]:
        """(dtype, math, backward, units, hidden, rows, ctas, threads, shared bytes, workspace bytes of a tile) of every
        compiled kernel.
        """
        count = self.library.emulated_instances(None, 0)
        values = (ctypes.c_int32 * (10 * count))()
        self.library.emulated_instances(values, count)
        return [tuple(values[10 * i : 10 * i + 10]) for i in range(count)]

    def call(self, function: str, *arguments: object, tensors: dict[str, tuple[int, int, bool]]) -> None:
        """`function(*arguments, ...)` with tensors {name: (address, bytes, writable)} as all that it may touch.

        Raises KernelError with what the fibres caught.
        """
        given = {name: view for name, view in tensors.items() if view[0]}
        views = (TensorView * len(given))(*(TensorView(name.encode(), *view) for name, view in given.items()))
        message = ctypes.create_string_buffer(1000)
        if getattr(self.library, function)(*arguments, views, len(views), message, len(message)):
            raise KernelError(message.value.decode())

    def run_block(
        self,
        problem: Problem,
        math: int,
        hidden: int,
        rows: int,
        ctas: int,
        seed: int,
        tensors: dict[str, tuple[int, int, bool]],
    ) -> None:
        function = "emulate_small" if ctas > 1 and hidden <= SMALL else "emulate_block"
        self.call(function, ctypes.byref(problem), math, hidden, rows, ctas, seed, tensors=tensors)
