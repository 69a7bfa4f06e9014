"""What is timed, on CPUs and GPUs, and the shape of the results: plain data, nothing has to be there to read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

STEPS = 512
MODES = ("forward", "training")  # training: forward and backward
PEER = "torch.nn.RNN"  # and RNNCell; on a GPU, cuDNN


@dataclass(frozen=True)
class Case:
    """Calls of one layer, or of one cell."""

    dtype: str
    batch: int
    hidden: int
    mode: str
    steps: int = STEPS
    input_size: int = 0  # 0: as `hidden`
    module: str = "RIN"  # or RINCell
    state: bool = False  # whether h_0 is given
    start: str = "rin"  # the first weights, see `cpu.pair`
    threads: int = 0  # of the CPU; 0: the GPU works
    directions: int = 1
    crowd: str = ""  # who else wants the processors, see `crowd.py`
    layers: int = 1
    heads: int = 1
    activation: str = "relu"  # or tanh
    layout: str = ""  # packed (lengths from `steps` down to a quarter), batch_first; "": [steps, batch, features]

    def __str__(self) -> str:
        return "-".join(map(str, _said(self).values()))


@dataclass
class Measurement:
    """One implementation on one case. Times are microseconds per time step; None where it could not be measured."""

    implementation: str  # a backend, or PEER; with TF32 behind it where that is allowed
    case: Case
    us: float | None = None  # median over runs
    us_low: float | None = None  # first and third quartile
    us_high: float | None = None
    us_graph: float | None = None  # median when replayed as a CUDA graph
    kept_bytes: int | None = None  # memory held between forward and backward, the output included
    zero_states: float | None = None  # share of the states that are 0
    rounds: int | None = None  # how many the quartiles are of
    distance: float | None = None  # relative, of what was compared with the float64 computation, the largest
    cores: float | None = None  # processor time of the process by time, while it was measured: waiting threads count
    note: str = ""  # why there is no number

    @property
    def starved(self) -> bool:
        """Whether others had the processor for a tenth of the time or more: a call never waits for anything else."""
        return self.cores is not None and self.cores < 0.9


@dataclass
class Results:
    machine: dict[str, Any]
    rows: list[Measurement] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """What has its default is not written."""
        rows = [{**_said(row), "case": _said(row.case)} for row in self.rows]
        lines = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(f'{{"machine": {json.dumps(self.machine, indent=1)}, "rows": [\n{lines}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Results:
        content = json.loads(path.read_text())
        return cls(content["machine"], [measurement(row) for row in content["rows"]])

    def by_case(self) -> dict[Case, dict[str, Measurement]]:
        table: dict[Case, dict[str, Measurement]] = {}
        for row in self.rows:
            table.setdefault(row.case, {})[row.implementation] = row
        return table


def measurement(row: dict[str, Any]) -> Measurement:
    """Of its JSON."""
    return Measurement(**{**row, "case": Case(**row["case"])})


def _said(thing: Case | Measurement) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(thing)}
    return {name: value for name, value in asdict(thing).items() if value != defaults[name]}
