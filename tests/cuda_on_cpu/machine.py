"""The CUDA kernels on CPU fibres, as a function on tensors: compiles csrc/cuda with csrc/cuda_on_cpu and calls it.

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
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "csrc", Path(__file__).parent)
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "tanh": 2}
MATH = {"mma": 0, "tf32": 1, "tf32x3": 2, "fma": 3}


class KernelError(RuntimeError):
    """What the fibres caught, with the kernel's coordinates."""


class Problem(ctypes.Structure):
    """csrc/problem.h"""

    _fields_ = [  # noqa: RUF012
        *((name, ctypes.c_int64) for name in ("steps", "batch", "groups", "hidden", "num_reversed")),
        ("dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("backward", ctypes.c_bool),
        ("skip", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("lengths", "offsets", "resets", "weight", "in_", "saved", "state_in", "out", "state_out"),
            )
        ),
    ]


class TensorView(ctypes.Structure):
    _fields_ = [  # noqa: RUF012
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("writable", ctypes.c_int32),
    ]


def build() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise RuntimeError("the emulation of the CUDA kernels needs a C++17 compiler (g++, clang++ or CXX)")
    files = sorted(p for folder in SOURCES for p in folder.rglob("*") if p.suffix in {".cu", ".cuh", ".cpp", ".h"})
    digest = hashlib.sha256(compiler.encode())
    for file in files:
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "cuda_on_cpu"
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cuda, cpu = ROOT / "csrc" / "cuda", ROOT / "csrc" / "cuda_on_cpu"
        units = [*sorted(cuda.glob("block*.cu")), cpu / "emulated.cpp", cpu / "fibres.cpp"]
        units.append(Path(__file__).with_name("planted.cpp"))
        flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", "-I", str(cpu), "-I", str(cuda)]

        def compile_unit(unit: Path) -> str:
            target = str(folder / f"{library.stem}-{os.getpid()}-{unit.stem}.o")
            subprocess.run([compiler, *flags, "-x", "c++", "-c", str(unit), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        partial = folder / f"{library.stem}-{os.getpid()}.so"
        subprocess.run([compiler, "-shared", *objects, "-o", str(partial)], check=True)
        partial.rename(library)  # atomic: test processes may race
        for file in objects:
            Path(file).unlink()
    return ctypes.CDLL(str(library))


class Machine:
    def __init__(self) -> None:
        self.library = build()

    def instances(self) -> list[tuple[int, ...]]:
        """(dtype, math, backward, hidden, rows, threads, shared bytes) of every compiled instance."""
        count = self.library.emulated_instances(None, 0)
        values = (ctypes.c_int32 * (7 * count))()
        self.library.emulated_instances(values, count)
        return [tuple(values[7 * i : 7 * i + 7]) for i in range(count)]

    def call(self, function: str, *arguments: object, tensors: dict[str, tuple[Tensor, bool]]) -> None:
        """Calls `function(*arguments, tensors, count, message, size)`; raises KernelError with its message."""
        views = (TensorView * len(tensors))(
            *(
                TensorView(name.encode(), t.data_ptr(), t.numel() * t.element_size(), writable)
                for name, (t, writable) in tensors.items()
            )
        )
        message = ctypes.create_string_buffer(1000)
        if getattr(self.library, function)(*arguments, views, len(tensors), message, len(message)):
            raise KernelError(message.value.decode())

    def sweep(
        self,
        instance: tuple[str, int, int],
        *,
        weight: Tensor,
        out: Tensor,
        in_: Tensor | None,
        state_in: Tensor | None,
        state_out: Tensor,
        steps: int,
        saved: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        resets: Tensor | None = None,
        skip: float = 1.0,
        activation: str = "relu",
        num_reversed: int = 0,
        seed: int = 0,
    ) -> None:
        """Runs `instance` = (math, hidden, rows); `saved` makes it the backward sweep."""
        tensors = {
            "weight": (weight, False),
            "in_": (in_, False),
            "saved": (saved, False),
            "state_in": (state_in, False),
            "out": (out, True),
            "state_out": (state_out, True),
            "lengths": (lengths, False),
            "offsets": (offsets, False),
            "resets": (resets, False),
        }
        given = {name: pair for name, pair in tensors.items() if pair[0] is not None}
        batch, groups, hidden = state_out.shape
        problem = Problem(
            steps, batch, groups, hidden, num_reversed, DTYPES[out.dtype], ACTIVATIONS[activation],
            saved is not None, skip, **{name: t.data_ptr() for name, (t, _) in given.items()},
        )  # fmt: skip
        math, padded, rows = instance
        self.call("emulate_block", ctypes.byref(problem), MATH[math], padded, rows, seed, tensors=given)
