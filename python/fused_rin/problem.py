"""The problem that every backend solves, in Python's words: the face of csrc/problem.h.

G independent recurrences over one time-major batch, h = act(a + skip * h U-product); which rows run (`Rows`), how a
state follows from the one before (`Rule`), and what a layer multiplies with (`Weights`). Named tuples, since they are
made in every call: 0.2 us each, a frozen dataclass takes 0.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# As csrc/problem.h numbers them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "tanh": 2, "sigmoid": 3, "softplus": 4, "leaky_relu": 5}
FORMS = {"inside": 0, "outside": 1, "current": 2}


class Rows(NamedTuple):
    """Which rows run: all of [T, B], or the first `lengths` steps of each sequence, and where an episode starts.

    lengths [B]: steps of each sequence, or None: all have T. offsets [T]: the batch is packed, row `offsets[t] + b` is
    step t of sequence b; needs lengths. resets [T, B] (or [rows]) bool: no state crosses into this row.
    """

    lengths: Tensor | None = None
    offsets: Tensor | None = None
    resets: Tensor | None = None

    def sizes(self, states: Tensor) -> tuple[int, int]:
        """(T, B), from any tensor [T, B, ...], or [rows, ...] of a packed batch."""
        if self.offsets is None:
            shape = states.shape  # a slice of it takes 0.5 us
            return shape[0], shape[1]
        assert self.lengths is not None
        return self.offsets.shape[0], self.lengths.shape[0]


ALL_ROWS = Rows()


class Rule(NamedTuple):
    """How a state follows from the one before: h_t = act(pre_t + U h_{t-1} + skip * h_{t-1}).

    activation: "relu", "tanh" or "none". The last `num_reversed` recurrences run from the last step to the first.
    """

    skip: float = 1.0
    activation: str = "relu"
    num_reversed: int = 0


RIN_RULE = Rule()


class Units(NamedTuple):
    """Units with factors of their own, in place of `Rule.skip`. With s = skip, a = gain, products unit by unit:

        inside    h_t = act(pre_t + U h_{t-1} + s h_{t-1})
        outside   h_t = s h_{t-1} + a act(pre_t + U h_{t-1}) + noise_t
        current   h_t = s h_{t-1} + pre_t + U act(h_{t-1})

    skip, and outside gain: [G, D], in the dtype that sums have, float32 or for float64 that. noise: in the shape of
    pre, or None.
    """

    form: str
    skip: Tensor
    gain: Tensor | None = None
    noise: Tensor | None = None


class States(NamedTuple):
    """Of some steps of a recurrence, [B, G, D]: the state before them and the one after them, each as tensors hold it,
    and unrounded as it is carried, in float32 (None: as tensors hold it, or not wanted).
    """

    given: Tensor | None
    carried: Tensor | None
    left: Tensor
    left_carried: Tensor | None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a kernel adds up numbers of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def directions(groups: int, num_reversed: int) -> list[tuple[slice | None, bool]]:
    """Which recurrences run forward and which backward: (slice of them, or None for all of them; whether reversed)."""
    if not num_reversed or num_reversed == groups:
        return [(None, num_reversed > 0)] if groups else []
    return [(slice(None, groups - num_reversed), False), (slice(groups - num_reversed, None), True)]


class Weights(NamedTuple):
    """Of a layer: W [G * D, I], U [G * D, D] (head after head), b_ih and b_hh [G * D] or None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None


def check_lengths(lengths: Tensor | Sequence[int], steps: int, batch: int, device: torch.device) -> Tensor:
    """`lengths` as int64 [B] on `device`; ValueError or RuntimeError, naming them, if they do not fit."""
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(list(lengths), dtype=torch.int64, device="cpu")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"lengths must be integers (int64 or int32), got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise RuntimeError(f"Expected lengths size ({batch},), got {list(lengths.shape)}")
    # On another device the values stay unread, which would stall it; kernels clamp them to [0, T]. A tracer would take
    # them for constants.
    if lengths.device.type == "cpu" and batch and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        low, high = (int(value) for value in lengths.aminmax())
        if low < 0 or high > steps:
            raise ValueError(f"lengths must be in [0, {steps}], got values from {low} to {high}")
    return lengths.to(device=device, dtype=torch.int64)


def check_resets(resets: Tensor, shape: tuple[int, ...], device: torch.device, whose: str) -> None:
    """RuntimeError or ValueError unless `resets` is bool, of this shape, on the device of `whose`."""
    if resets.dtype != torch.bool:
        raise ValueError(f"resets must have dtype torch.bool, got {resets.dtype}")
    if tuple(resets.shape) != shape:
        raise RuntimeError(f"resets must have shape {shape}, got {tuple(resets.shape)}")
    if resets.device != device:
        raise RuntimeError(f"resets must be on the device of {whose}, {device}, got {resets.device}")


def check_sweep(
    states: Tensor, weight: Tensor, rows: Rows, rule: Rule, others: Sequence[tuple[str, Tensor | None, bool]], name: str
) -> None:
    """Arguments of a registered operator, which a graph may call with other tensors than it was made with.

    `states`: pre of a forward sweep, out of a backward one (`name` says which). `others`: name, tensor or None, and
    whether it has the shape of a state [B, G, D] or of `states`. Raises RuntimeError as csrc/operators does.
    """
    if weight.dim() != 3 or weight.shape[1] != weight.shape[2]:
        raise RuntimeError(f"weight must have shape [G, D, D], got {list(weight.shape)}")
    groups, hidden = weight.shape[:2]
    if not 0 <= rule.num_reversed <= groups:
        raise RuntimeError(f"num_reversed must be in [0, {groups}], got {rule.num_reversed}")
    if rows.offsets is not None and rows.lengths is None:
        raise RuntimeError("offsets must come with lengths")
    axes = 2 if rows.offsets is None else 1
    shape = tuple(states.shape)
    if len(shape) < axes or shape[axes:] not in ((groups, hidden), (groups * hidden,)):
        wanted = "[T, B, G, D] or [T, B, G * D]" if axes == 2 else "[rows, G, D] or [rows, G * D]"
        raise RuntimeError(f"{name} must have shape {wanted} with G = {groups} and D = {hidden}, got {list(shape)}")
    steps, batch = rows.sizes(states)
    state, dtype = (batch, groups, hidden), states.dtype
    for what, tensor, of_states, kind in (
        ("weight", weight, (groups, hidden, hidden), dtype),
        *((what, tensor, state if is_state else shape, dtype) for what, tensor, is_state in others),
        ("lengths", rows.lengths, (batch,), torch.int64),
        ("offsets", rows.offsets, (steps,), torch.int64),
        ("resets", rows.resets, shape[:axes], torch.bool),
    ):
        if tensor is None:
            continue
        if tensor.dtype != kind:
            raise RuntimeError(f"{what} must have dtype {kind}, got {tensor.dtype}")
        if tuple(tensor.shape) != of_states:
            raise RuntimeError(f"{what} must have shape {list(of_states)}, got {list(tensor.shape)}")
        if tensor.device != states.device:
            raise RuntimeError(f"{what} must be on the device of {name}, {states.device}, got {tensor.device}")


def unpack_batch_sizes(batch_sizes: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of each sequence [B] and first row of each step [T], on the device of the packed `data`.

    Sequence b runs in the steps whose batch size exceeds b. Batch sizes do not increase, so their number is found by
    bisection: B log T, where comparing every step with every sequence would take T * B memory.
    """
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        raise RuntimeError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    steps = batch_sizes.shape[0]
    if not steps:
        raise RuntimeError("batch_sizes must have at least one step, got none")
    # A value that Python reads is a constant of a trace, and of a compiled graph a break.
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        if bool((batch_sizes[1:] > batch_sizes[:-1]).any()) or int(batch_sizes[-1]) < 1:
            raise ValueError(f"batch_sizes must be positive and not increase, got {batch_sizes.tolist()}")
        if int(batch_sizes.sum()) != data.shape[0]:
            rows = int(batch_sizes.sum())
            raise RuntimeError(f"pre must have sum(batch_sizes) = {rows} rows, got {data.shape[0]}")
    sequences = torch.arange(batch_sizes[0], device=batch_sizes.device)  # type: ignore[call-overload]
    lengths = steps - torch.searchsorted(batch_sizes.flip(0), sequences, right=True)
    offsets = batch_sizes.cumsum(0) - batch_sizes
    return lengths.to(data.device, non_blocking=True), offsets.to(data.device, non_blocking=True)
