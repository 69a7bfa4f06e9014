"""What the peers were measured on, and what else it did meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from fused_rin.experiments.machine import machine

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def description() -> dict[str, Any]:
    """Processor, instruction sets, clock, caches and versions; what the system does not tell is left out."""
    about = machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        clocks = [float(line.split(":")[1]) for line in info.open() if line.startswith("cpu MHz")]
        about |= {"mhz": round(max(clocks))} if clocks else {}
    caches = {}
    for folder in sorted(CACHES.glob("index*")):
        level, kind, size = (_text(folder / name) for name in ("level", "type", "size"))
        if kind != "Instruction" and level:
            caches[f"L{level}"] = size
    about["caches"] = caches
    about["processors"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return about


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


class Load:
    """Processors that others used between two moments, where the system counts it (Linux)."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.monotonic(), _busy(), _own()

    def others(self) -> float | None:
        """Mean number of them since then; time that a hypervisor took counts."""
        now = _busy()
        if now is None or self.busy is None:
            return None
        took = time.monotonic() - self.began
        return round(max(0.0, now - self.busy - (_own() - self.own)) / max(took, 1e-9), 2)


def _busy() -> float | None:
    """Seconds of all processors that were neither idle nor waiting for a disk."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Processor seconds of this process and those it waited for."""
    return sum(os.times()[:4])
