"""What figures were measured on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import fused_rin
from fused_rin import cpu


def machine() -> dict[str, Any]:
    """The processor, its instruction sets and the versions, without naming the machine."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), model)
    return {
        "cpu": model,
        "instruction_sets": cpu.instruction_sets(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_rin": fused_rin.__version__,
    }
