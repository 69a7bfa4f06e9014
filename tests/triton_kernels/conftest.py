"""These tests run the kernels in Triton's interpreter, which a process chooses before it imports Triton.

Without TRITON_INTERPRET=1 only test_triton_interpreted.py and the tests that need no kernel are collected; the former
runs this folder again in a process that has it.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = (
    ["test_triton_interpreted.py", "test_triton_plan.py"]
    if INTERPRETING
    else ["test_triton_sweep.py", "test_triton_barrier.py", "test_triton_in_the_package.py"]
)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs and buffers hold NaN before a sweep, not what happened to lie there."""
    real_like, real_new = torch.empty_like, torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(real_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(real_new(*a, **k)))


if INTERPRETING:
    import numpy as np
    from triton.language import float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _dot = InterpreterBuilder.create_dot

    def _widened(handle):
        """The interpreter keeps bfloat16 as 16-bit integers and would multiply those."""
        if handle.dtype.scalar.name != "bf16":
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), float32)

    def _dot_of_any_dtype(self, a, b, d, *rest):
        return _dot(self, _widened(a), _widened(b), d, *rest)

    InterpreterBuilder.create_dot = _dot_of_any_dtype
