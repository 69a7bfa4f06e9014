"""Long sequences: time and memory of a training step with checkpoint_steps, beside one that keeps every state.

    make bench-checkpoint [RESULTS=FILE.json]     two minutes; a table beside it, FILE.md

Each row is a process of its own, on one thread, float32, input_size 1: a thousand rows first, which brings code and
workspaces into memory, then forward and backward from the sum of h_n, five times. Time is that of the fastest; memory
is how much the process grew at its largest beyond what it had with the input in place.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fused_rin import RIN, LeakyRNN

from benchmarks.peers.machine import description

DEFAULT = Path(__file__).parent / "results" / "checkpoint.json"
# Network, T, B, D; contracting ones (a RIN with skip=0), whose states stay finite.
ROWS = [
    ("RIN relu", 100_000, 1, 128), ("RIN relu", 1_000_000, 1, 128), ("RIN relu", 10_000, 32, 128),
    ("RIN relu", 2_000, 64, 256), ("RIN tanh", 100_000, 1, 128), ("LeakyRNN", 100_000, 1, 128),
]  # fmt: skip
WAYS: list[int | str | None] = [None, "auto", 100, 1000]


def make(network: str, hidden: int) -> Any:
    if network != "LeakyRNN":
        return RIN(1, hidden, nonlinearity=network.split()[1], skip=0.0)
    return LeakyRNN(1, hidden, alpha=0.1, train_alpha=True)


def measure(network: str, steps: int, batch: int, hidden: int, way: int | str | None) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = make(network, hidden)
    module.checkpoint_steps, module.return_sequences = way and 1, way is None
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731

    def step(x: torch.Tensor) -> float:
        began = time.perf_counter()
        h_n = module(x)[1]
        h_n.sum().backward()
        return time.perf_counter() - began

    step(torch.randn(1 + 1000 // batch, batch, 1))
    module.checkpoint_steps = way
    x = torch.randn(steps, batch, 1)
    before = peak()
    times = [step(x) for _ in range(5)]
    return {"seconds": min(times), "bytes": peak() - before}


def table(results: dict[str, Any]) -> str:
    lines = [
        "# A training step on a long sequence\n",
        f"{results['machine']['cpu']}, torch {results['machine']['torch']}, one thread, float32. Time and memory, the"
        " input apart; in brackets by",
        "the step that keeps every state. `auto` and numbers: checkpoint_steps, with return_sequences=False.\n",
        "| network | T | B | D | all kept | " + " | ".join(f"{w}" for w in WAYS[1:]) + " |",
        "|---" * (4 + len(WAYS)) + "|",
    ]
    for row in results["rows"]:
        first = row["ways"]["None"]
        cells = []
        for way in map(str, WAYS):
            now = row["ways"][way]
            text = f"{now['seconds']:.3f} s, {now['bytes'] / 1e6:.1f} MB"
            if way != "None":
                text += f" ({now['seconds'] / first['seconds']:.2f}, 1/{first['bytes'] / max(now['bytes'], 1):.0f})"
            cells.append(text)
        lines.append(
            f"| {row['network']} | {row['steps']:,} | {row['batch']} | {row['hidden']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        network, steps, batch, hidden, way = json.loads(sys.argv[2])
        print(json.dumps(measure(network, steps, batch, hidden, way)))
        return
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    rows = []
    for network, steps, batch, hidden in ROWS:
        ways = {}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.checkpoint", "--one"]
            command.append(json.dumps([network, steps, batch, hidden, way]))
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            ways[str(way)] = json.loads(done.stdout)
        rows.append({"network": network, "steps": steps, "batch": batch, "hidden": hidden, "ways": ways})
        print(json.dumps(rows[-1]), flush=True)
    results = {"machine": {**description(), "torch": torch.__version__}, "rows": rows}
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
