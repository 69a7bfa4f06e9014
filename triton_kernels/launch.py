"""From tensors to one or a few launches of the sweep."""

from __future__ import annotations

import functools

import torch
import triton
from fused_rin.device import aligned, launches
from fused_rin.problem import Rows, Rule, Units
from torch import Tensor

from .device import device_record, fp32_precision
from .plan import Plan, plan
from .sweep import sweep

INTERPRETED = triton.knobs.runtime.interpret
_ARRIVED_STRIDE = 16  # int64 counters, one per 128-byte line


_plan = functools.lru_cache(maxsize=1024)(plan)


def compile_options(chosen: Plan, vendor: str) -> dict[str, object]:
    """Triton's options for a plan; num_stages=1 because the loop does its own prefetch."""
    options: dict[str, object] = {"num_warps": chosen.warps, "num_stages": 1, "enable_fp_fusion": True}
    if vendor == "nvidia":
        # Left alone, ptxas spills a few registers at times to fit more blocks on an SM than ever come.
        options["maxnreg"] = min(255, 65536 // (32 * chosen.warps))
    if chosen.kind == "sliced":
        options["launch_cooperative_grid"] = True
    return options


@launches
def run(
    stream_in: Tensor | None,
    saved: Tensor | None,
    state_in: Tensor | None,
    weight: Tensor,
    rows: Rows,
    rule: Rule,
    *,
    out: Tensor | None = None,
    units: Units | None = None,
    initial: Tensor | None = None,
    aside: Tensor | None = None,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """One sweep: forward when `saved` is None, else backward. Returns (out, h_n) or (grad_pre, grad_h0).

    `initial`: h0, for the backward sweep in currents.
    """
    like = stream_in if saved is None else saved
    assert like is not None
    groups, hidden = weight.shape[:2]
    steps, batch = rows.sizes(like)
    lengths, offsets, resets = rows
    if out is None:
        out = torch.empty_like(like)
    state_out = like.new_empty(batch, groups, hidden)
    if steps == 0 or state_out.numel() == 0:
        return out, state_out.zero_() if state_in is None else state_out.copy_(state_in)

    index = like.device.index if like.is_cuda else None
    if chosen is None:
        chosen = _plan(hidden, like.dtype, groups, batch, device_record(index), fp32_precision())
    tiles = -(-batch // chosen.tile_b) * groups
    wave = min(tiles, chosen.wave or tiles)
    exchange = arrived = None
    if chosen.kind == "sliced":
        exchange = like.new_empty(2, batch, groups, hidden)
    options = {} if INTERPRETED else compile_options(chosen, device_record(index).vendor)

    form = skips = gains = noise = None
    if units is not None:
        form, skips, gains, noise = units
    with torch.cuda.device(index if index is not None else -1):
        for first_tile in range(0, tiles, wave):
            count = min(wave, tiles - first_tile)
            if exchange is not None:
                arrived = torch.zeros(count, _ARRIVED_STRIDE, dtype=torch.int64, device=like.device)
            # Triton compiles once more for a pointer that is no multiple of 16; a copy, rarely needed, is cheaper.
            sweep[(count, chosen.slices)](
                aligned(stream_in, 16), aligned(saved, 16), aligned(state_in, 16), aligned(weight, 16), out, state_out,
                lengths, offsets, None if resets is None else resets.view(torch.uint8), exchange, arrived,
                skips, gains, aligned(initial, 16), aligned(noise, 16), aside,
                steps, batch, groups, rule.num_reversed, first_tile, hidden, float(rule.skip),
                TILE_N=chosen.tile_n, TILE_B=chosen.tile_b, SPLIT_K=chosen.split_k, TILE_K=chosen.tile_k,
                SLICED=chosen.kind == "sliced", MATRIX=chosen.matrix,
                BACKWARD=saved is not None, ACTIVATION=rule.activation, HAS_SKIP=form is None and rule.skip != 0,
                PRECISION=chosen.input_precision, FORM=form, UNROLL=chosen.unroll,
                **options,
            )  # fmt: skip
    return out, state_out
