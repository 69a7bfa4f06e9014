"""The recurrence as a function: checks its arguments, says what is wrong, and hands over to `ops`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rin import backends, ops
from fused_rin.reference import ACTIVATIONS

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
        rows: tuple[int, ...] = (pre.shape[0],)
    else:
        steps, batch = pre.shape[:2]
        rows = (steps, batch)
        if lengths is not None:
            lengths = check_lengths(lengths, steps, batch, pre.device)
    if h0 is not None:
        _check("h0", h0, (batch, groups, hidden), pre)
    if resets is not None:
        if resets.dtype != torch.bool:
            raise ValueError(f"resets must have dtype torch.bool, got {resets.dtype}")
        if tuple(resets.shape) != rows:
            raise RuntimeError(f"resets must have shape {rows}, got {tuple(resets.shape)}")
        _check_device("resets", resets, pre)

    backend = backends.requested(backend)
    if not reverse or reverse is True:
        num_reversed, order = (groups if reverse else 0), None
    else:
        num_reversed, order = _check_reverse(reverse, groups, pre.device)
    if order is None:
        return ops.recurrence(pre, weight, h0, lengths, offsets, resets, float(skip), activation, num_reversed, backend)
    # Kernels have the recurrences that run backwards last.
    out, h_n = ops.recurrence(
        pre.index_select(-2, order), weight[order], None if h0 is None else h0[:, order], lengths, offsets, resets,
        float(skip), activation, num_reversed, backend,
    )  # fmt: skip
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


def check_lengths(lengths: Tensor | Sequence[int], steps: int, batch: int, device: torch.device) -> Tensor:
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(list(lengths), dtype=torch.int64)
    if lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"lengths must be integers (int64 or int32), got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise RuntimeError(f"Expected lengths size ({batch},), got {list(lengths.shape)}")
    # On another device the values stay unread, which would stall it; kernels clamp them to [0, T].
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
        low, high = (int(value) for value in lengths.aminmax())
        if low < 0 or high > steps:
            raise ValueError(f"lengths must be in [0, {steps}], got values from {low} to {high}")
    return lengths.to(device=device, dtype=torch.int64)


def unpack_batch_sizes(batch_sizes: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of each sequence and first row of each step."""
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        raise RuntimeError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if not batch_sizes.numel():
        raise RuntimeError("batch_sizes must have at least one step, got none")
    if not torch.compiler.is_compiling():
        if bool((batch_sizes[1:] > batch_sizes[:-1]).any()) or int(batch_sizes[-1]) < 1:
            raise ValueError(f"batch_sizes must be positive and not increase, got {batch_sizes.tolist()}")
        if int(batch_sizes.sum()) != pre.shape[0]:
            raise RuntimeError(f"pre must have sum(batch_sizes) = {int(batch_sizes.sum())} rows, got {pre.shape[0]}")
    ends = batch_sizes.cumsum(0)
    batch = torch.arange(int(batch_sizes[0]))
    lengths = (batch_sizes[:, None] > batch).sum(0)
    return lengths.to(pre.device, non_blocking=True), (ends - batch_sizes).to(pre.device, non_blocking=True)


def _check_reverse(reverse: Sequence[bool], groups: int, device: torch.device) -> tuple[int, Tensor | None]:
    flags = [bool(flag) for flag in reverse]
    if len(flags) != groups:
        raise RuntimeError(f"reverse must have one bool per recurrence, {groups}, got {len(flags)}")
    order = sorted(range(groups), key=flags.__getitem__)
    return sum(flags), None if order == list(range(groups)) else torch.tensor(order, device=device)
