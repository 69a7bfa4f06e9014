"""The recurrence as a function: checks its arguments, says what is wrong, and hands over to `ops`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rin import backends, ops, unit_ops, watchers
from fused_rin.problem import (
    ACTIVATIONS,
    FORMS,
    Rows,
    Rule,
    Units,
    check_lengths,
    check_resets,
    sum_dtype,
    unpack_batch_sizes,
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def recurrence(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    skip: float | Tensor = 1.0,
    activation: str = "relu",
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    backend: str = "auto",
    form: str = "inside",
    gain: float | Tensor = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = act(pre_t + U h_{t-1} + skip * h_{t-1}), G independent recurrences side by side (arXiv 1801.06105).

    `pre` is what parallelises over time, W x_t + b for all steps; only the loop over time is left to this function.

    The skip may also stand outside the activation, or the state may be what enters it. With s = skip and a = gain,
    numbers or vectors with one for each unit, all of them differentiable:

    - form="inside": h_t = act(pre_t + U h_{t-1} + s h_{t-1}), arXiv 1801.06105, eq. 2. For backward the output is kept.
    - form="outside": h_t = s h_{t-1} + a act(pre_t + U h_{t-1}) + noise_t, the leaky rate network with a = alpha and
      s = 1 - alpha (Yang et al. 2019, doi 10.1038/s41593-018-0310-2, eq. 2 of the methods). Kept: the output and the
      activation's values. These would follow from the output, (h_t - s h_{t-1}) / a, but not with all their digits.
    - form="current": h_t = s h_{t-1} + pre_t + U act(h_{t-1}), the same network in currents, and with s a diagonal the
      piecewise-linear network (Durstewitz 2017, doi 10.1371/journal.pcbi.1005542, eq. 1). Kept: the output, from which
      the activation is computed again.

    Args:
        pre: [T, B, G, D], or [rows, G, D] with `batch_sizes`. float32, float64, bfloat16 or float16.
        weight: U, [G, D, D], same dtype and device as `pre`.
        h0: [B, G, D], the state before the first step; zeros if None.
        skip: the factor s of the state that is added in the accumulator. 1 for the RIN, 0 for a plain RNN. A number, or
            a tensor that can be expanded to [G, D]; it is used in float32 (with float64 in that), whatever pre has.
        activation: "relu", "tanh", "none", "sigmoid", "softplus" or "leaky_relu" (with a slope of 0.01).
        lengths: [B] integers in [0, T], steps of each sequence. Its outputs past its end are 0, its state is kept.
        batch_sizes: [T] integers on the CPU, as in PackedSequence: `pre` holds, step by step, the rows of the
            sequences that reach that step, longest sequence first. Excludes `lengths`.
        resets: bool, [T, B], or [rows] with `batch_sizes`: an episode starts here and no state crosses into it, in
            either direction. At the first step it is `h0` that is dropped.
        reverse: run from the last step to the first; one bool for all recurrences or one for each.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; see `fused_rin.explain`.
        form: where the skip stands, "inside", "outside" or "current"; see above.
        gain: the factor a of the activation in the form "outside", as skip.
        noise: in the form "outside", in the shape of pre: added to the state.

    Returns:
        out: all states, in the shape of `pre`; and h_n: [B, G, D], the state after the last step of each sequence.

    Raises:
        RuntimeError: a tensor of wrong rank, size or device.
        ValueError: a wrong dtype, activation, form, backend, or length out of range; gain or noise in another form.
        BackendError: a backend asked for by name cannot run this problem.
    """
    if watchers.may_be_passed_by(pre, weight, h0, lengths, batch_sizes, resets, reverse, skip, gain, noise):
        with watchers.without_function_modes():
            return _recurrence(
                pre, weight, h0, skip, activation, lengths, batch_sizes, resets, reverse, backend, form, gain, noise
            )
    return _recurrence(
        pre, weight, h0, skip, activation, lengths, batch_sizes, resets, reverse, backend, form, gain, noise
    )


def _recurrence(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    skip: float | Tensor,
    activation: str,
    lengths: Tensor | Sequence[int] | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool | Sequence[bool],
    backend: str,
    form: str,
    gain: float | Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    rank = 4 if batch_sizes is None else 3
    if pre.dim() != rank:
        layout = "[T, B, G, D]" if batch_sizes is None else "[rows, G, D] when batch_sizes is given"
        raise RuntimeError(f"pre must have {rank} dimensions {layout}, got {pre.dim()}")
    if pre.dtype not in _FLOATS:
        raise ValueError(f"pre must have a floating point dtype, got {pre.dtype}")
    groups, hidden = pre.shape[-2:]
    check_tensor("weight", weight, (groups, hidden, hidden), pre)

    offsets: Tensor | None = None
    if batch_sizes is not None:
        if lengths is not None:
            raise ValueError("lengths and batch_sizes exclude each other, got both")
        lengths, offsets = unpack_batch_sizes(batch_sizes, pre)
        batch = lengths.numel()
        shape: tuple[int, ...] = (pre.shape[0],)
    else:
        steps, batch = pre.shape[:2]
        shape = (steps, batch)
        if lengths is not None:
            lengths = check_lengths(lengths, steps, batch, pre.device)
    if h0 is not None:
        check_tensor("h0", h0, (batch, groups, hidden), pre)
    if resets is not None:
        check_resets(resets, shape, pre.device, "pre")

    units = _units(form, skip, gain, noise, pre)
    backend = backends.requested(backend)
    if not reverse or reverse is True:
        num_reversed, order = (groups if reverse else 0), None
    else:
        num_reversed, order = _check_reverse(reverse, groups, pre.device)
    rows = Rows(lengths, offsets, resets)
    rule = Rule(1.0 if isinstance(skip, Tensor) else float(skip), activation, num_reversed)
    if order is None:
        return _run(pre, weight, h0, rows, rule, units, backend)
    # Kernels have the recurrences that run backwards last.
    h0 = None if h0 is None else h0[:, order]
    if units is not None:
        form, s, a, noise = units
        noise = None if noise is None else noise.index_select(-2, order)
        units = Units(form, s[order], None if a is None else a[order], noise)
    out, h_n = _run(pre.index_select(-2, order), weight[order], h0, rows, rule, units, backend)
    back = order.argsort()
    return out.index_select(-2, back), h_n[:, back]


def _run(
    pre: Tensor, weight: Tensor, h0: Tensor | None, rows: Rows, rule: Rule, units: Units | None, backend: str
) -> tuple[Tensor, Tensor]:
    if units is None:
        return ops.recurrence(pre, weight, h0, rows, rule, backend)
    return unit_ops.recurrence(pre, weight, h0, rows, rule, units, backend)


def _units(form: str, skip: float | Tensor, gain: float | Tensor, noise: Tensor | None, pre: Tensor) -> Units | None:
    """The factors of the units on checked arguments; None for the RIN, whose skip is one number, inside."""
    if form != "outside":
        if isinstance(gain, Tensor) or gain != 1.0:
            raise ValueError(f"gain is for form='outside', got it with form={form!r}")
        if noise is not None:
            raise ValueError(f"noise is for form='outside', got it with form={form!r}; add it to pre")
    if form == "inside" and not isinstance(skip, Tensor):
        if not math.isfinite(skip):
            raise ValueError(f"skip must be finite, got {skip}")
        return None
    factors = unit_factor("skip", skip, pre)
    if noise is not None:
        check_tensor("noise", noise, tuple(pre.shape), pre)
    return Units(form, factors, unit_factor("gain", gain, pre) if form == "outside" else None, noise)


def unit_factor(name: str, value: float | Tensor, states: Tensor) -> Tensor:
    """One number for each unit, [G, D], for states [..., G, D] and in the dtype that their sums have.

    Raises TypeError, ValueError or RuntimeError, naming it, for what is no finite number and no tensor of such a shape.
    """
    shape, dtype = states.shape[-2:], sum_dtype(states.dtype)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} should be a number or a tensor, got: {type(value).__name__}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        return torch.full(shape, float(value), dtype=dtype, device=states.device)
    if not value.is_floating_point():
        raise ValueError(f"{name} must have a floating point dtype, got {value.dtype}")
    _check_device(name, value, states)
    pairs = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.dim() > 2 or any(size not in (1, wanted) for size, wanted in pairs):
        raise RuntimeError(f"{name} must be a number or expand to {tuple(shape)}, got a tensor of {list(value.shape)}")
    return value.to(dtype).expand(shape)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], pre: Tensor) -> None:
    """RuntimeError or ValueError unless it has this shape, and the dtype and device of `pre`."""
    if tensor.dim() != len(shape):
        raise RuntimeError(f"{name} must have {len(shape)} dimensions, got {tensor.dim()}")
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"Expected {name} size {tuple(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != pre.dtype:
        raise ValueError(f"{name} must have the dtype of pre, {pre.dtype}, got {tensor.dtype}")
    _check_device(name, tensor, pre)


def _check_device(name: str, tensor: Tensor, pre: Tensor) -> None:
    if tensor.device != pre.device:
        raise RuntimeError(f"{name} must be on the device of pre, {pre.device}, got {tensor.device}")


def _check_reverse(reverse: Sequence[bool], groups: int, device: torch.device) -> tuple[int, Tensor | None]:
    flags = [bool(flag) for flag in reverse]
    if len(flags) != groups:
        raise RuntimeError(f"reverse must have one bool per recurrence, {groups}, got {len(flags)}")
    order = sorted(range(groups), key=flags.__getitem__)
    return sum(flags), None if order == list(range(groups)) else torch.tensor(order, device=device)
