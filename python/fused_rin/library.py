"""The operators' schemas: from the C++ library (csrc/operators) where there is one, else defined here.

The C++ library makes `torch.ops.fused_rin` known to processes without Python, with kernels for the CPU. A schema can be
defined once in a process, so the package takes that library's instead of its own, and both may be loaded in any order.
"""

from __future__ import annotations

from pathlib import Path

import torch

SCHEMAS = (
    "sweep_forward(Tensor pre, Tensor weight, Tensor? h0, Tensor? lengths, Tensor? offsets, Tensor? resets, "
    "float skip, str activation, int num_reversed, str backend) -> (Tensor, Tensor)",
    "sweep_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor weight, Tensor out, Tensor? lengths, Tensor? offsets, "
    "Tensor? resets, float skip, str activation, int num_reversed, str backend) -> (Tensor, Tensor)",
    "units_forward(Tensor pre, Tensor weight, Tensor? h0, Tensor? lengths, Tensor? offsets, Tensor? resets, "
    "Tensor skip, Tensor? gain, Tensor? noise, str form, str activation, int num_reversed, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    "units_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor weight, Tensor saved, Tensor? h0, Tensor? lengths, "
    "Tensor? offsets, Tensor? resets, Tensor skip, Tensor? gain, str form, str activation, int num_reversed, "
    "str backend) -> (Tensor, Tensor, Tensor)",
)

_FOLDER = Path(__file__).parent
_FILES = {"cpu": "libfused_rin_operators.so", "cuda": "libfused_rin_operators_cuda.so"}


def _why_not(device: str) -> str | None:
    """Why the C++ library of a device cannot be used here, or None if it can."""
    if torch.__version__ < (2, 10):  # type: ignore[operator]
        return f"it needs torch >= 2.10, whose stable ABI it is built on, this is {torch.__version__}"
    if not (_FOLDER / _FILES[device]).exists():
        also = " and nvcc" if device == "cuda" else ""
        return f"it was not built: install with torch >= 2.10{also} where it is built (--no-build-isolation)"
    return None


def operator_library(device: str = "cpu") -> str:
    """Path of the C++ library that registers `torch.ops.fused_rin` in a process without this package.

    For `torch.ops.load_library`, and for C++ programs that run a traced, exported or AOTInductor-compiled model: link
    it, or dlopen it, before the model is loaded. "cpu" is the library that defines the operators, "cuda" has the
    kernels of CUDA tensors and is loaded after it. They need libtorch >= 2.10. Raises RuntimeError where there is none,
    and ValueError for another device.
    """
    if device not in _FILES:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    reason = _why_not(device) or _failure
    if reason is not None:
        raise RuntimeError(f"there is no C++ library of the operators for {device} here: {reason}")
    return str(_FOLDER / _FILES[device])


def _is_defined() -> bool:
    return bool(torch._C._jit_get_schemas_for_operator("fused_rin::sweep_forward"))


_failure: str | None = None
if not _is_defined() and _why_not("cpu") is None:
    try:
        torch.ops.load_library(_FOLDER / _FILES["cpu"])
    except OSError as error:
        _failure = f"it could not be loaded ({error})"

if _is_defined():
    fragment = torch.library.Library("fused_rin", "FRAGMENT")
    # Before the library's kernels, which stand at CompositeExplicitAutograd: for the same devices, and asked first.
    KEY = "CompositeExplicitAutogradNonFunctional"
else:
    fragment = torch.library.Library("fused_rin", "DEF")
    for _schema in SCHEMAS:
        fragment.define(_schema)
    KEY = "CompositeExplicitAutograd"
