"""The grid that is timed on a GPU: one layer with input_size = hidden_size over STEPS steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.harness import MODES, Case

DTYPES = ("bfloat16", "float16", "float32")
BATCHES = (1, 4, 16, 64, 256)
HIDDEN = (32, 64, 100, 128, 256, 384)
WIDE_BATCHES, WIDE_HIDDEN = (1, 16, 64, 256), (512, 1024, 2048)  # beyond one block: clusters, Triton
TF32 = " tf32"  # behind the name of an implementation: float32 whose products round their operands to TF32


def precisions(implementations: list[str], case: Case) -> list[str]:
    """float32 both ways: torch allows cuDNN TF32 unless told otherwise, and forbids it matrix products, as ours are."""
    return implementations + [name + TF32 for name in implementations if case.dtype == "float32"]


def important(case: Case) -> bool:
    """Whether a case is measured before the others: time may not last for all."""
    return case.dtype != "float16" and case.hidden in (64, 128, 256, 384) and case.batch in (1, 16, 64, 256)


def cases() -> Iterator[Case]:
    """The grid up to the largest block, the most important cases first."""
    grid = [
        Case(dtype, batch, hidden, mode)
        for dtype, mode, hidden, batch in itertools.product(DTYPES, MODES, HIDDEN, BATCHES)
    ]
    yield from sorted(grid, key=lambda case: not important(case))


def wide_cases() -> Iterator[Case]:
    for dtype, mode, hidden, batch in itertools.product(DTYPES, MODES, WIDE_HIDDEN, WIDE_BATCHES):
        yield Case(dtype, batch, hidden, mode)
