"""The CUDA backend: plans a sweep and hands tensors to the native kernels as addresses and sizes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rin import cuda_plan, native
from fused_rin.device import Device, NoPlan, aligned, allow_tf32, device_record, launches
from fused_rin.problem import ACTIVATIONS, FORMS, Rows, Rule, States, Units

# Missing where it was built without nvcc.
_cuda, _missing = native.load(
    "_cuda", "recurrences of CUDA tensors run by Triton or as a loop in Python", optional=True
)

name = "cuda"
activations, forms = frozenset(ACTIVATIONS), frozenset(FORMS)
_OWN = frozenset({"none", "relu", "tanh"})  # activations of the kernels without units' factors


def unavailable_reason(device: torch.device, dtype: torch.dtype, hidden: int | None = None) -> str | None:
    """Why this backend cannot run a problem on `device` in `dtype` (of `hidden` units, if given), or None if it can."""
    if _cuda is None:
        return (
            f"the CUDA module could not be loaded ({_missing}); install with nvcc on the PATH to build it "
            "(FUSED_RIN_CUDA=on makes a missing nvcc an error)"
        )
    if device.type != "cuda":
        return f"it runs on CUDA tensors, got {device}"
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, this PyTorch is built for ROCm"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device here"
    try:
        _plan(1, 1, hidden or 1, dtype, device)
    except NoPlan as reason:
        return str(reason)
    return None


@functools.cache
def _runnable(index: int, module: ModuleType) -> Device:
    """A GPU as the native module's code can use it. Raises NoPlan where none of it runs there, with the reason."""
    return cuda_plan.runnable(device_record(index), module.architectures.split(), module.ptx, *module.versions())


def _place(tensor: Tensor) -> tuple[Device, int, int]:
    """The device that a tensor is on: its record, its ordinal, and its current stream."""
    index = tensor.device.index
    return _runnable(index, _cuda), index, torch.cuda.current_stream(index).cuda_stream


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def has_factors(activation: str, form: str | None) -> bool:
    """Whether such a rule is run by the kernels for units with factors of their own."""
    return form is not None or activation not in _OWN


def runnable_device(device: torch.device) -> Device:
    """A GPU as the native module's code can use it. Raises NoPlan where none of it runs there, with the reason."""
    return _runnable(_index(device), _cuda)


def _plan(
    batch: int, groups: int, hidden: int, dtype: torch.dtype, device: torch.device, units: bool = False
) -> cuda_plan.SweepPlan:
    record = runnable_device(device)
    return cuda_plan.plan(batch, groups, hidden, dtype, record, allow_tf32=allow_tf32(), units=units)


def describe(
    steps: int,
    batch: int,
    groups: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device | str = "cuda",
    *,
    units: bool = False,
) -> str:
    """The plan for a problem, in words; raises NoPlan where there is none. `units`: with factors of their own."""
    return _plan(batch, groups, hidden, dtype, torch.device(device), units).describe()


def _whole(tensor: Tensor | None, padding: int, sides: int = 1) -> Tensor | None:
    """The tensor as the kernels need it: rows of whole 16 bytes, aligned to them. A copy only where it is not."""
    if tensor is None:
        return None
    return pad(tensor, (0, padding) * sides) if padding else aligned(tensor, 16)


def _whole_words(resets: Tensor | None) -> Tensor | None:
    """The bytes of resets as the kernels copy them, four at a time."""
    if resets is None or not (resets.numel() % 4 or resets.data_ptr() % 4):
        return resets
    return pad(resets.flatten(), (0, -resets.numel() % 4))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _problem(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    backward: bool,
    rule: Rule,
    rows: Rows,
    resets: Tensor | None,
    tensors: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """The first four arguments of the native module's functions (csrc/python_problem.h)."""
    return (
        sizes,
        (cuda_plan.DTYPES[dtype], ACTIVATIONS[rule.activation], backward, rule.skip, rule.num_reversed),
        (_address(rows.lengths), _address(rows.offsets), _address(resets)),
        tuple(map(_address, tensors)),
    )


def _workspace(plan: cuda_plan.SweepPlan, device: torch.device) -> Tensor | None:
    """Of the caching allocator: a later sweep has it again after this one, on its stream."""
    return torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device) if plan.workspace_bytes else None


def _kernel_id(plan: cuda_plan.SweepPlan, padding: int, workspace: Tensor | None) -> tuple[int, ...]:
    kernel = plan.kernel
    return (
        cuda_plan.MATH[kernel.math], kernel.hidden, kernel.rows, kernel.ctas, plan.tile_rows, padding,
        _address(workspace), plan.workspace_bytes,
    )  # fmt: skip


@launches
def _sweep(
    in_: Tensor | None,
    saved: Tensor | None,
    state_in: Tensor | None,
    weight: Tensor,
    like: Tensor,
    rows: Rows,
    rule: Rule,
    out: Tensor | None,
    units: Units | None,
    initial: Tensor | None = None,
    aside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    groups, hidden = weight.shape[:2]
    steps, batch = rows.sizes(like)
    record, index, stream = _place(like)
    if units is None and has_factors(rule.activation, None):
        factors = torch.full((groups, hidden), rule.skip, dtype=torch.float32, device=like.device)
        units = Units("inside", factors)
    plan = cuda_plan.plan(batch, groups, hidden, like.dtype, record, allow_tf32=allow_tf32(), units=units is not None)
    if out is None:
        out = like.new_empty(like.shape)
    padding = -hidden % (16 // like.element_size())
    target, beside = out, aside
    noise = None if units is None else units.noise
    if padding:
        split = (*like.shape[: 2 if rows.offsets is None else 1], groups, hidden)
        in_, saved, noise = (None if t is None else t.view(split) for t in (in_, saved, noise))
        target = like.new_empty(*split[:-1], hidden + padding)
        beside = None if aside is None else like.new_empty(target.shape)
    elif out.data_ptr() % 16:
        target = torch.empty_like(out)
    in_, saved, state_in = _whole(in_, padding), _whole(saved, padding), _whole(state_in, padding)
    weight = _whole(weight, padding, sides=2)  # type: ignore[assignment]
    resets = _whole_words(rows.resets)
    state_out = like.new_empty(batch, groups, hidden + padding)
    sizes, tensors = (steps, batch, groups, hidden + padding), (weight, in_, saved, state_in, target, state_out)
    problem = _problem(sizes, like.dtype, saved is not None, rule, rows, resets, tensors)
    workspace = _workspace(plan, like.device)
    where = _kernel_id(plan, padding, workspace), index, stream
    if units is None:
        _cuda.sweep_block(*problem, *where)
    else:
        skip, gain = _whole(units.skip, padding), _whole(units.gain, padding)
        initial, noise = _whole(initial, padding), _whole(noise, padding)
        addresses = map(_address, (skip, gain, initial, noise, beside))
        _cuda.sweep_block_of_units(*problem, (FORMS[units.form], *addresses), *where)
    if padding:
        out.view(split).copy_(target[..., :hidden])
        if aside is not None and beside is not None:
            aside.view(split).copy_(beside[..., :hidden])
        state_out = state_out[..., :hidden].contiguous()
    elif target is not out:
        out.copy_(target)
    return out, state_out


class Spans:
    """Sweeps over some steps of a recurrence, all by one plan. A state crosses from one to the next unrounded."""

    def __init__(self, plan: cuda_plan.SweepPlan) -> None:
        self.plan = plan

    @launches
    def __call__(
        self,
        in_: Tensor | None,
        saved: Tensor | None,
        states: States,
        weight: Tensor,
        out: Tensor,
        rows: Rows,
        rule: Rule,
    ) -> None:
        """A forward sweep, with `saved` a backward one, to `out` [T, B, G, D], which may be `in_`.

        All tensors contiguous, their rows whole 16 bytes and aligned to them. On the current stream.
        """
        _, index, stream = _place(out)
        resets, workspace = _whole_words(rows.resets), _workspace(self.plan, out.device)
        tensors = (weight, in_, saved, states.given, out, states.left)
        _cuda.sweep_block_of_span(
            *_problem(tuple(out.shape), out.dtype, saved is not None, rule, rows, resets, tensors),  # type: ignore[arg-type]
            (_address(states.carried), _address(states.left_carried)),
            _kernel_id(self.plan, 0, workspace), index, stream,
        )  # fmt: skip


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

    Rows that are not whole 16 bytes (an odd hidden size, say) cost a padded copy of `pre` and one of the output. Raises
    NoPlan where no kernel fits.
    """
    return _sweep(pre, None, h0, weight, pre, rows, rule, out, units, aside=aside)


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
    """The backward sweep; shapes and meaning as in `fused_rin.reference.backward`, all tensors contiguous.

    Raises NoPlan where no kernel fits.
    """
    initial = h0 if units is not None and units.form == "current" else None
    return _sweep(grad_out, saved, grad_h_n, weight, saved, rows, rule, None, units, initial, aside)
