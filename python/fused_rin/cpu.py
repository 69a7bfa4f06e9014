"""The CPU backend: hands tensors to the native sweep as addresses and sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_rin import native, profiling, settings, watchers
from fused_rin.problem import ACTIVATIONS, ALL_ROWS, DTYPES, FORMS, Rows, Rule, Units, Weights

_module, _missing = native.load(
    "_native", "recurrences of CPU tensors run as a loop in Python, 1.2 to 4 times as long as torch.nn.RNN"
)
if TYPE_CHECKING:
    from fused_rin import _native
else:
    _native = _module

name = "cpu"
activations, forms = frozenset(ACTIVATIONS), frozenset(FORMS)

MAX_STEP_ROWS = 0 if _native is None else _native.MAX_STEP_ROWS

# "" is the best set this processor has. A process-wide setting, meant for tests and for reporting a suspected fault.
_isa = "" if _native is None else settings.cpu_isa(_native.isas())


def unavailable_reason(device: torch.device, dtype: torch.dtype, hidden: int = 1) -> str | None:
    """Why this backend cannot run a problem on `device` in `dtype`, or None if it can."""
    if _native is None:
        return f"the native module could not be loaded ({_missing}); build it with `pip install .`"
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    if dtype not in DTYPES:
        return f"it has no {dtype} kernel; expected one of {', '.join(map(str, DTYPES))}"
    return None


# A row of the batch costs a sweep 25 to 45 ns a step however short it is; PyTorch's operations over all rows 3 to 12 ns
# at 1 or 2 units, and some 30 us a step (measured: even at 1,000 rows; at 4 units they gain nothing in backward).
_NARROW_UNITS, _NARROW_ROWS = 2, 2048


def why_too_narrow(batch: int, hidden: int) -> str | None:
    """Why "auto" leaves a problem that this backend could run to the reference, or None."""
    if hidden > _NARROW_UNITS or batch < _NARROW_ROWS:
        return None
    return f"with {hidden} unit(s) and {batch} sequences PyTorch's operations over all sequences are faster"


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
    asked = torch.get_num_threads()
    plan = _native.plan((steps, batch, groups, hidden), input_size, DTYPES[dtype], asked, _isa)
    whose = "of torch's " if plan["torchs"] else ""  # or of our own pool
    threads = f"{plan['threads']} {whose}threads"
    if int(plan["processors"]) < asked:
        threads += f" (torch has {asked}, affinity and quota leave {plan['processors']} processors)"
    alone = "one thread" + (" for now, since others came late to a call just before" if plan["crowded"] else "")
    how = str(plan["sharing"])
    sharing = {
        "nothing": alone,
        "rows": f"{threads}, each with sequences of its own",
        "outputs": f"{threads} that share the outputs and meet once a step",
    }[how]
    scalar = "float64" if dtype == torch.float64 else "float32"
    # As units for 16 bits take them, with the state rounded to these for the product.
    factors = f"pairs of {str(dtype).removeprefix('torch.')}" if plan["terms"] == 2 else scalar
    factors += " for AMX's tiles" if plan["tiles"] else ""
    # Several recurrences have their gradients from products over all steps (see layer.py).
    products = f"; input product{' and gradients' if groups == 1 else ''} in chunks of steps" if input_size else ""
    return (
        f"{plan['isa']}, {sharing}{products}; U packed once per call as {plan['blocks']} panel(s) over "
        f"{plan['vectors']} vector(s) of {plan['lanes']} {factors}, sums and carried state in {scalar}"
    )


# From here on the C library takes memory fresh from the system and gives it back, and its pages are worth an advice.
_HUGE = 8 << 20  # bytes


def advised(tensor: Tensor) -> Tensor:
    """A fresh tensor that is about to be written as a whole."""
    if tensor.numel() * tensor.element_size() >= _HUGE:
        _native.prefer_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor


def _address(tensor: Tensor | None) -> int:
    """Where the numbers of a contiguous tensor lie, 0 for none. RuntimeError where its memory was taken from it."""
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if address > watchers.ANY_OFFSET:  # as a rule
        return address
    address = watchers.address(tensor)
    if not address and tensor.numel():
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} has no memory: its storage was freed (resize_(0), as sharding "
            "does between uses) or never allocated"
        )
    return address


def _row_addresses(rows: Rows) -> tuple[int, int, int]:
    if rows is ALL_ROWS:
        return 0, 0, 0
    lengths, offsets, resets = rows
    return _address(lengths), _address(offsets), _address(resets)


def _rule(dtype: torch.dtype, rule: Rule, backward: bool) -> tuple[int, int, bool, float, int]:
    return DTYPES[dtype], ACTIVATIONS[rule.activation], backward, rule.skip, rule.num_reversed


def _units(
    units: Units, initial: Tensor | None = None, aside: Tensor | None = None
) -> tuple[int, int, int, int, int, int]:
    form, skip, gain, noise = units
    return FORMS[form], _address(skip), _address(gain), _address(initial), _address(noise), _address(aside)


def forward(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    *,
    out: Tensor | None = None,
    units: Units | None = None,
    aside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward sweep; shapes and meaning as in `fused_rin.reference.forward`, all tensors contiguous.

    `out` receives the states; it may be `pre` itself, which is then overwritten.
    """
    groups, hidden = weight.shape[:2]
    steps, batch = rows.sizes(pre)
    if out is None:
        out = advised(torch.empty_like(pre))
    h_n = pre.new_empty(batch, groups, hidden)
    problem = (
        (steps, batch, groups, hidden), _rule(pre.dtype, rule, False), _row_addresses(rows),
        (_address(weight), _address(pre), 0, _address(h0), _address(out), _address(h_n)),
    )  # fmt: skip
    if units is None:
        _native.sweep(*problem, torch.get_num_threads(), _isa)
    else:
        _native.sweep_of_units(*problem, _units(units, aside=aside), torch.get_num_threads(), _isa)
    return out, h_n


def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    weight: Tensor,
    saved: Tensor,
    rows: Rows,
    rule: Rule,
    *,
    units: Units | None = None,
    h0: Tensor | None = None,
    aside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The backward sweep; shapes and meaning as in `fused_rin.reference.backward`, all tensors contiguous."""
    groups, hidden = weight.shape[:2]
    steps, batch = rows.sizes(saved)
    grad_pre = advised(torch.empty_like(saved))
    grad_h0 = saved.new_empty(batch, groups, hidden)
    problem = (
        (steps, batch, groups, hidden), _rule(saved.dtype, rule, True), _row_addresses(rows),
        (_address(weight), _address(grad_out), _address(saved), _address(grad_h_n), _address(grad_pre),
         _address(grad_h0)),
    )  # fmt: skip
    if units is None:
        _native.sweep(*problem, torch.get_num_threads(), _isa)
    else:
        _native.sweep_of_units(*problem, _units(units, h0, aside), torch.get_num_threads(), _isa)
    return grad_pre, grad_h0


@profiling.named
def layer_forward(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    groups: int,
    batch_first: bool = False,
    units: Units | None = None,
    added: Tensor | None = None,
    aside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A layer's forward pass: `forward` on pre = x W^T + b_ih + b_hh + added, which is never stored as a whole.

    All tensors contiguous: x [T, B, I] (or [rows, I]), h0 [B, G, D]. Returns out [T, B, G * D] (or [rows, G * D]; with
    batch_first [B, T, G * D], in memory time after time as ever) and h_n [1, B, G * D].
    """
    w_ih, w_hh, b_ih, b_hh = weights
    width, inputs = w_ih.shape
    steps, batch = rows.sizes(x)
    if batch_first:
        out = x.new_empty_strided((batch, steps, width), (width, batch * width, 1))
    else:
        out = x.new_empty(*x.shape[:-1], width)
    out = advised(out)
    h_n = x.new_empty(1, batch, width)
    problem = (
        (steps, batch, groups, width // groups), _rule(x.dtype, rule, False), _row_addresses(rows),
        (_address(w_hh), _address(added), 0, _address(h0), _address(out), _address(h_n)),
    )  # fmt: skip
    layer = (inputs, _address(x), _address(w_ih), _address(b_ih), _address(b_hh))
    if units is None:
        _native.layer_forward(*problem, layer, torch.get_num_threads(), _isa)
    else:
        _native.layer_forward_of_units(*problem, _units(units, aside=aside), layer, torch.get_num_threads(), _isa)
    return out, h_n


@profiling.named
def layer_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor | None,
    out: Tensor,
    rows: Rows,
    rule: Rule,
    needs: Sequence[bool],
    units: Units | None = None,
    values: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_ih, w_hh, b_ih, b_hh, h0, and with `units` of skip and gain [G, D], for a layer of one
    recurrence; None where not needed (`needs` says it of each). `values`: of the activation, in the form "outside".

    Both biases get a tensor of their own: who scales gradients in place would scale a shared one twice.

    The gradient of pre is never stored as a whole: a thread that has it for some steps adds it to the gradients.
    """
    hidden, inputs = w_ih.shape
    steps, batch = rows.sizes(x)
    grad_x = advised(torch.empty_like(x)) if needs[0] else None
    grad_w_ih = grad_w_hh = grad_b_ih = grad_b_hh = None
    biases = needs[3] or needs[4]
    if needs[1] or needs[2] or biases:
        grad_w_ih, grad_w_hh = torch.empty_like(w_ih), torch.empty_like(w_hh)
    if biases:
        grad_b_ih, grad_b_hh = w_ih.new_empty(hidden), w_ih.new_empty(hidden)
    grad_h0 = x.new_empty(batch, 1, hidden) if needs[5] else None
    saved = out if values is None else values
    problem = (
        (steps, batch, 1, hidden), _rule(x.dtype, rule, True), _row_addresses(rows),
        (_address(w_hh), _address(grad_out), _address(saved), _address(grad_h_n), 0, _address(grad_h0)),
    )  # fmt: skip
    layer = (inputs, _address(x), _address(w_ih), 0, 0)
    gradients = (
        _address(grad_x), _address(grad_w_ih), _address(grad_w_hh), _address(grad_b_ih), _address(grad_b_hh),
    )  # fmt: skip
    grads = (grad_x, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_h0)
    if units is None:
        _native.layer_backward(*problem, layer, _address(h0), gradients, torch.get_num_threads(), _isa)
        return grads
    grad_skip = torch.empty_like(units.skip) if needs[6] else None
    grad_gain = torch.empty_like(units.gain) if needs[7] and units.gain is not None else None
    _native.layer_backward_of_units(
        *problem, _units(units, h0), layer, _address(h0), _address(out), gradients, _address(grad_skip),
        _address(grad_gain), torch.get_num_threads(), _isa,
    )  # fmt: skip
    return *grads, grad_skip, grad_gain
