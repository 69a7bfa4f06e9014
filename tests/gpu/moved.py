"""Sweeps of a backend on tensors that are moved to a GPU and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fused_rin.problem import Rows, Units
from torch import Tensor


def on_gpu(
    function: Callable[..., tuple[Tensor, ...]], device: torch.device | str = "cuda", **fixed: Any
) -> Callable[..., tuple[Tensor, ...]]:
    """A sweep on CPU tensors that runs on the GPU; `fixed` are arguments of every call."""

    def moved(t: Any) -> Any:
        return t.to(device) if isinstance(t, Tensor) else t

    def run(*tensors: Any, units: Units | None = None, aside: Tensor | None = None, **more: Any) -> tuple[Tensor, ...]:
        *given, rows, rule = tensors
        options = fixed | {name: moved(t) for name, t in more.items()}
        if units is not None:
            options["units"] = Units(*map(moved, units))
        if aside is not None:
            options["aside"] = moved(aside)
        results = function(*map(moved, given), Rows(*map(moved, rows)), rule, **options)
        if aside is not None:
            aside.copy_(options["aside"])
        return tuple(t.cpu() for t in results)

    return run
