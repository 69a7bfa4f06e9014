"""The CPU backend: hands tensors to the native sweep as addresses and sizes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

try:
    from fused_rin import _native  # type: ignore[attr-defined]
except ImportError as error:  # a source tree that was not built, or a binary of another Python
    _native = None
    _import_error = error

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "tanh": 2}

# "" is the best set this processor has. A process-wide setting, meant for tests and for reporting a suspected fault.
_isa = os.environ.get("FUSED_RIN_CPU_ISA", "")


def unavailable_reason(device: torch.device, dtype: torch.dtype, hidden: int = 1) -> str | None:
    """Why this backend cannot run a problem on `device` in `dtype`, or None if it can."""
    if _native is None:
        return f"the native module could not be imported ({_import_error}); build it with `pip install .`"
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    if dtype not in DTYPES:
        return f"it has no {dtype} kernel; expected one of {', '.join(map(str, DTYPES))}"
    return None


def instruction_sets() -> list[str]:
    """Instruction sets that are built in and that this processor has, best first."""
    return [] if _native is None else _native.isas()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the CPU sweeps with one of `instruction_sets()`, in this process, within the context.

    Raises ValueError, listing what there is, if this processor or this build does not have it.
    """
    global _isa
    if name not in instruction_sets():
        raise ValueError(f"CPU instruction set {name!r} is not available here; expected one of {instruction_sets()}")
    before, _isa = _isa, name
    try:
        yield
    finally:
        _isa = before


def describe(
    steps: int,
    batch: int,
    groups: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    input_size: int = 0,
) -> str:
    """The plan for a problem, in words; with `input_size`, for the forward pass of a layer."""
    plan = _native.plan(steps, batch, groups, hidden, input_size, DTYPES[dtype], torch.get_num_threads(), _isa)
    whose = "of torch's " if _native.has_torchs_threads() else ""  # or of our own pool
    threads = f"{plan['threads']} {whose}threads"
    sharing = {
        "nothing": "one thread",
        "rows": f"{threads}, each with sequences of its own",
        "outputs": f"{threads} that share the outputs and meet once a step",
    }[plan["sharing"]]
    scalar = "float64" if dtype == torch.float64 else "float32"
    # Several recurrences have their gradients from products over all steps (see layer.py).
    products = f"; input product{' and gradients' if groups == 1 else ''} in chunks of steps" if input_size else ""
    return (
        f"{plan['isa']}, {sharing}{products}; U packed once per call as {plan['blocks']} panel(s) over "
        f"{plan['vectors']} vector(s) of {plan['lanes']} {scalar}, sums and carried state in {scalar}"
    )


# From here on the C library takes memory fresh from the system and gives it back, and its pages are worth an advice.
_HUGE = 8 << 20  # bytes


def _advised(tensor: Tensor) -> Tensor:
    """A fresh tensor that is about to be written as a whole."""
    if tensor.numel() * tensor.element_size() >= _HUGE:
        _native.prefer_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def forward(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    *,
    skip: float,
    activation: str,
    num_reversed: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward sweep; shapes and meaning as in `fused_rin.reference.recurrence`, all tensors contiguous.

    `out` receives the states; it may be `pre` itself, which is then overwritten.
    """
    groups, hidden = pre.shape[-2:]
    steps, batch = pre.shape[:2] if offsets is None else (offsets.numel(), lengths.numel())  # type: ignore[union-attr]
    if out is None:
        out = _advised(torch.empty_like(pre))
    h_n = pre.new_empty(batch, groups, hidden)
    _native.sweep(
        steps, batch, groups, hidden, num_reversed, DTYPES[pre.dtype], ACTIVATIONS[activation], False, skip,
        _address(lengths), _address(offsets), _address(resets), weight.data_ptr(), pre.data_ptr(), 0, _address(h0),
        out.data_ptr(), h_n.data_ptr(), torch.get_num_threads(), _isa,
    )  # fmt: skip
    return out, h_n


def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    weight: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    *,
    skip: float,
    activation: str,
    num_reversed: int,
) -> tuple[Tensor, Tensor]:
    """The backward sweep; shapes and meaning as in `fused_rin.reference.backward`, all tensors contiguous."""
    groups, hidden = out.shape[-2:]
    steps, batch = out.shape[:2] if offsets is None else (offsets.numel(), lengths.numel())  # type: ignore[union-attr]
    grad_pre = _advised(torch.empty_like(out))
    grad_h0 = out.new_empty(batch, groups, hidden)
    _native.sweep(
        steps, batch, groups, hidden, num_reversed, DTYPES[out.dtype], ACTIVATIONS[activation], True, skip,
        _address(lengths), _address(offsets), _address(resets), weight.data_ptr(), _address(grad_out),
        out.data_ptr(), _address(grad_h_n), grad_pre.data_ptr(), grad_h0.data_ptr(), torch.get_num_threads(), _isa,
    )  # fmt: skip
    return grad_pre, grad_h0


def layer_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    *,
    groups: int,
    skip: float,
    activation: str,
    num_reversed: int,
) -> tuple[Tensor, Tensor]:
    """A layer's forward pass: `forward` on pre = x W^T + b_ih + b_hh, which is never stored as a whole.

    All tensors contiguous: x [T, B, I] (or [rows, I]), w_ih [G * D, I], w_hh [G * D, D], biases [G * D], h0
    [B, G, D]. Returns out [T, B, G * D] (or [rows, G * D]) and h_n [1, B, G * D].
    """
    width, inputs = w_ih.shape
    steps, batch = x.shape[:2] if offsets is None else (offsets.numel(), lengths.numel())  # type: ignore[union-attr]
    out = _advised(x.new_empty(*x.shape[:-1], width))
    h_n = x.new_empty(1, batch, width)
    _native.layer_forward(
        steps, batch, groups, width // groups, num_reversed, DTYPES[x.dtype], ACTIVATIONS[activation], skip,
        _address(lengths), _address(offsets), _address(resets), inputs, x.data_ptr(), w_ih.data_ptr(), w_hh.data_ptr(),
        _address(b_ih), _address(b_hh), _address(h0), out.data_ptr(), h_n.data_ptr(), torch.get_num_threads(), _isa,
    )  # fmt: skip
    return out, h_n


def layer_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor | None,
    out: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    *,
    skip: float,
    activation: str,
    num_reversed: int,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, w_ih, w_hh, of each bias, and of h0, for a layer of one recurrence; None where not needed.

    The gradient of pre is never stored as a whole: a thread that has it for some steps adds it to the gradients.
    """
    hidden, inputs = w_ih.shape
    steps, batch = x.shape[:2] if offsets is None else (offsets.numel(), lengths.numel())  # type: ignore[union-attr]
    grad_x = _advised(torch.empty_like(x)) if needs_x else None
    grad_w_ih, grad_w_hh, grad_bias = (
        (torch.empty_like(w_ih), torch.empty_like(w_hh), w_ih.new_empty(hidden)) if needs_weights else (None,) * 3
    )
    grad_h0 = x.new_empty(batch, 1, hidden)
    _native.layer_backward(
        steps, batch, hidden, num_reversed, DTYPES[x.dtype], ACTIVATIONS[activation], skip, _address(lengths),
        _address(offsets), _address(resets), inputs, x.data_ptr(), w_ih.data_ptr(), w_hh.data_ptr(), _address(h0),
        out.data_ptr(), _address(grad_out), _address(grad_h_n), _address(grad_x), _address(grad_w_ih),
        _address(grad_w_hh), _address(grad_bias), grad_h0.data_ptr(), torch.get_num_threads(), _isa,
    )  # fmt: skip
    return grad_x, grad_w_ih, grad_w_hh, grad_bias, grad_h0
