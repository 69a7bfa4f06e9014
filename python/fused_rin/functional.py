"""The recurrence as a function: checks its arguments, says what is wrong, and hands over to `ops`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rin import backends, ops, watchers
from fused_rin.problem import ACTIVATIONS, Rows, Rule, check_lengths, check_resets, unpack_batch_sizes

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def recurrence(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    skip: float = 1.0,
    activation: str = "relu",
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = act(pre_t + U h_{t-1} + skip * h_{t-1}), G independent recurrences side by side (arXiv 1801.06105).

    `pre` is what parallelises over time, W x_t + b for all steps; only the loop over time is left to this function.

    Args:
        pre: [T, B, G, D], or [rows, G, D] with `batch_sizes`. float32, float64, bfloat16 or float16.
        weight: U, [G, D, D], same dtype and device as `pre`.
        h0: [B, G, D], the state before the first step; zeros if None.
        skip: the factor s of the state that is added in the accumulator. 1 for the RIN, 0 for a plain RNN.
        activation: "relu", "tanh" or "none".
        lengths: [B] integers in [0, T], steps of each sequence. Its outputs past its end are 0, its state is kept.
        batch_sizes: [T] integers on the CPU, as in PackedSequence: `pre` holds, step by step, the rows of the
            sequences that reach that step, longest sequence first. Excludes `lengths`.
        resets: bool, [T, B], or [rows] with `batch_sizes`: an episode starts here and no state crosses into it, in
            either direction. At the first step it is `h0` that is dropped.
        reverse: run from the last step to the first; one bool for all recurrences or one for each.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; see `fused_rin.explain`.

    Returns:
        out: all states, in the shape of `pre`; and h_n: [B, G, D], the state after the last step of each sequence.

    Raises:
        RuntimeError: a tensor of wrong rank, size or device.
        ValueError: a wrong dtype, activation, backend, or length out of range.
        BackendError: a backend asked for by name cannot run this problem.
    """
    if watchers.may_be_passed_by(pre, weight, h0, lengths, batch_sizes, resets, reverse):
        with watchers.without_function_modes():
            return _recurrence(pre, weight, h0, skip, activation, lengths, batch_sizes, resets, reverse, backend)
    return _recurrence(pre, weight, h0, skip, activation, lengths, batch_sizes, resets, reverse, backend)


def _recurrence(
    pre: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    skip: float,
    activation: str,
    lengths: Tensor | Sequence[int] | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool | Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if not math.isfinite(skip):
        raise ValueError(f"skip must be finite, got {skip}")
    rank = 4 if batch_sizes is None else 3
    if pre.dim() != rank:
        layout = "[T, B, G, D]" if batch_sizes is None else "[rows, G, D] when batch_sizes is given"
        raise RuntimeError(f"pre must have {rank} dimensions {layout}, got {pre.dim()}")
    if pre.dtype not in _FLOATS:
        raise ValueError(f"pre must have a floating point dtype, got {pre.dtype}")
    groups, hidden = pre.shape[-2:]
    _check("weight", weight, (groups, hidden, hidden), pre)

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
        _check("h0", h0, (batch, groups, hidden), pre)
    if resets is not None:
        check_resets(resets, shape, pre.device, "pre")

    backend = backends.requested(backend)
    if not reverse or reverse is True:
        num_reversed, order = (groups if reverse else 0), None
    else:
        num_reversed, order = _check_reverse(reverse, groups, pre.device)
    rows, rule = Rows(lengths, offsets, resets), Rule(float(skip), activation, num_reversed)
    if order is None:
        return ops.recurrence(pre, weight, h0, rows, rule, backend)
    # Kernels have the recurrences that run backwards last.
    h0 = None if h0 is None else h0[:, order]
    out, h_n = ops.recurrence(pre.index_select(-2, order), weight[order], h0, rows, rule, backend)
    back = order.argsort()
    return out.index_select(-2, back), h_n[:, back]


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], pre: Tensor) -> None:
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
