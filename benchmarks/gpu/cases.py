"""What is timed on a GPU, and the shape of the results: plain data, no GPU needed to read or to test it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

STEPS = 512
DTYPES = ("bfloat16", "float16", "float32")
BATCHES = (1, 4, 16, 64, 256)
HIDDEN = (32, 64, 100, 128, 256, 384)
WIDE_BATCHES, WIDE_HIDDEN = (1, 16, 64), (512, 1024, 2048)  # beyond one block: Triton against the peer
MODES = ("forward", "training")  # training: forward and backward
PEER = "torch.nn.RNN"  # cuDNN
TF32 = " tf32"  # behind the name of an implementation: float32 whose products round their operands to TF32


@dataclass(frozen=True)
class Case:
    """One layer with input_size = hidden_size = `hidden`, over STEPS steps."""

    dtype: str
    batch: int
    hidden: int
    mode: str


@dataclass
class Measurement:
    """One implementation on one case. Times are microseconds per time step; None where it could not be measured."""

    implementation: str  # "cuda", "triton" or PEER; with TF32 behind it where that is allowed
    case: Case
    us: float | None = None  # median over runs
    us_low: float | None = None  # first and third quartile
    us_high: float | None = None
    us_graph: float | None = None  # median when replayed as a CUDA graph
    kept_bytes: int | None = None  # memory held between forward and backward, the output included
    note: str = ""  # why there is no number


@dataclass
class Results:
    machine: dict[str, str]
    rows: list[Measurement] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"steps": STEPS, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        content = json.loads(path.read_text())
        rows = [Measurement(**{**row, "case": Case(**row["case"])}) for row in content["rows"]]
        return cls(content["machine"], rows)

    def by_case(self) -> dict[Case, dict[str, Measurement]]:
        table: dict[Case, dict[str, Measurement]] = {}
        for row in self.rows:
            table.setdefault(row.case, {})[row.implementation] = row
        return table


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
