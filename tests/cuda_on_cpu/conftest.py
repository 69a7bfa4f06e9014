"""The CUDA backend on CPU fibres: `fused_rin.cuda` itself, with the native module and the GPU replaced."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fused_rin import cuda, cuda_plan
from fused_rin.device import Device

from tests.cuda_on_cpu.machine import KernelError, Machine, Problem

H200 = Device("NVIDIA H200", (9, 0), 132, 227 * 1024, 65536, 50 << 20, 16)


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine()


class NativeOnFibres:
    """Stands in for fused_rin._cuda; a kernel may touch the tensors it is given, to their last byte and no further."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.seed = 0
        self.kernels: set[tuple[int, int, int, int]] = set()

    def sweep_block(self, sizes: Any, rule: Any, row_tensors: Any, tensors: Any, kernel: Any, *_: Any) -> None:
        self.run(sizes, rule, row_tensors, tensors, (0,) * 6, kernel)

    def sweep_block_of_span(
        self, sizes: Any, rule: Any, row_tensors: Any, tensors: Any, carried: Any, kernel: Any, *_: Any
    ) -> None:
        self.run(sizes, rule, row_tensors, tensors, (0,) * 6, kernel, carried)

    def sweep_block_of_units(
        self, sizes: Any, rule: Any, row_tensors: Any, tensors: Any, units: Any, kernel: Any, *_: Any
    ) -> None:
        self.run(sizes, rule, row_tensors, tensors, units, kernel)

    def run(
        self, sizes: Any, rule: Any, row_tensors: Any, tensors: Any, units: Any, kernel: Any, carried: Any = (0, 0)
    ) -> None:
        steps, batch, groups, hidden = sizes
        dtype, activation, backward, skip, reversed_ = rule
        lengths, offsets, resets = row_tensors
        weight, in_, saved, state_in, out, state_out = tensors
        form, skips, gains, initial, noise, aside = units
        math, padded, rows, ctas, tile_rows, padding, workspace, workspace_bytes = kernel
        # What an earlier sweep may have left, numbers of its steps too.
        words = workspace_bytes // 4
        left = (ctypes.c_int32 * words)(*[1, 2] * (words // 2))
        ctypes.memmove(workspace, left, workspace_bytes)
        size = 4 if dtype == 0 else 2
        row_count = self.rows_of(steps, batch, lengths, offsets)
        row_bytes = groups * hidden * size
        extents = {
            "lengths": (lengths, batch * 8, False),
            "offsets": (offsets, steps * 8, False),
            "resets": (resets, -(-row_count // 4) * 4, False),
            "weight": (weight, groups * hidden * hidden * size, False),
            "in": (in_, row_count * row_bytes, False),
            "saved": (saved, row_count * row_bytes, False),
            "state_in": (state_in, batch * row_bytes, False),
            "out": (out, row_count * row_bytes, True),
            "state_out": (state_out, batch * row_bytes, True),
            "skips": (skips, groups * hidden * 4, False),
            "gains": (gains, groups * hidden * 4, False),
            "initial": (initial, batch * row_bytes, False),
            "noise": (noise, row_count * row_bytes, False),
            "aside": (aside, row_count * row_bytes, True),
            "carried_in": (carried[0], batch * groups * hidden * 4, False),
            "carried_out": (carried[1], batch * groups * hidden * 4, True),
            "workspace": (workspace, workspace_bytes, True),
        }
        problem = Problem(
            steps, batch, groups, hidden, reversed_, dtype, activation, backward, skip, lengths, offsets, resets,
            weight, in_, saved, state_in, out, state_out, padding, 0, 0, 0, False, tile_rows,
            workspace, workspace_bytes, 0, *carried, form, skips, gains, initial, noise, aside,
        )  # fmt: skip
        self.kernels.add((math, padded, rows, ctas))
        self.machine.run_block(problem, math, padded, rows, ctas, self.seed, extents)

    @staticmethod
    def rows_of(steps: int, batch: int, lengths: int, offsets: int) -> int:
        if not offsets:
            return steps * batch
        return sum((ctypes.c_int64 * batch).from_address(lengths)) if batch else 0


@pytest.fixture
def native(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> NativeOnFibres:
    """`fused_rin.cuda` computing on fibres, its outputs poisoned with NaN first."""
    stand_in = NativeOnFibres(machine)
    monkeypatch.setattr(cuda, "_cuda", stand_in)
    monkeypatch.setattr(cuda, "_place", lambda tensor: (H200, 0, 0))
    monkeypatch.setattr(cuda, "allow_tf32", lambda: False)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    return stand_in


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[cuda_plan.Kernel], None]:
    """Makes the planner choose one kernel."""

    def choose(kernel: cuda_plan.Kernel) -> None:
        chosen = cuda_plan.SweepPlan(kernel, "forced", 1, 1, 1, 0.0, 0, kernel.workspace_bytes)
        monkeypatch.setattr(cuda_plan, "plan", lambda *a, **k: chosen)

    return choose


@contextmanager
def caught(*words: str) -> Iterator[None]:
    """A KernelError whose message has all the words."""
    with pytest.raises(KernelError) as error:
        yield
    for word in words:
        assert word in str(error.value), str(error.value)
