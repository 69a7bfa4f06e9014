"""The environment variables that the package reads, all of them at import; docs/environment.md is their page.

FUSED_RIN_DATA belongs to the experiments (fused_rin.experiments.data), TRITON_INTERPRET to Triton.
"""

from __future__ import annotations

import os
from collections.abc import Sequence


def choice(name: str, accepted: Sequence[str]) -> str:
    """The value of a variable, "" where it is empty or not set. ValueError for one that is not accepted."""
    value = os.environ.get(name, "")
    if value and value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
    return value


BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")

# What "auto" means where `use_backend` does not say otherwise.
BACKEND = choice("FUSED_RIN_BACKEND", BACKENDS) or "auto"
# How float32 products are made on tensor cores by Triton's kernels; "" leaves it to torch's own setting.
TRITON_FP32 = choice("FUSED_RIN_TRITON_FP32", ("tf32", "tf32x3", "ieee"))
# Several layers of a GPU: side by side wherever that can be, or never; "" where it gains something by the model.
WAVEFRONT = choice("FUSED_RIN_WAVEFRONT", ("on", "off"))


def cpu_isa(available: Sequence[str]) -> str:
    """The instruction set that CPU sweeps are to run with, of those that this build and this processor have; "" is
    the best one."""
    return choice("FUSED_RIN_CPU_ISA", available)
