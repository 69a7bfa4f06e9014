"""Deep transitions beside a RIN of the same size.

    make bench-deep [RESULTS=FILE.json]     a minute; a table beside it, FILE.md

Training (forward and backward of a layer) and inference, float32; medians of rounds in which each takes its turn, and
of the ratios to the RIN of the same round. One thread and two.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fused_rin import RIN, DeepTransitionRIN
from torch import Tensor, nn

from benchmarks.peers.machine import description

ROUNDS = 17
# B, D, I, T; the last but two are the paper's own network on its digits.
SIZES = [
    (1, 128, 128, 500), (16, 64, 64, 300), (16, 128, 128, 200), (128, 100, 1, 100), (64, 128, 128, 100),
    (64, 256, 256, 60),
]  # fmt: skip
TRANSITIONS = (2, 4)
DEFAULT = Path(__file__).parent / "results" / "deep.json"


def training(network: nn.Module, x: Tensor, gradient: Tensor) -> None:
    network(x)[0].backward(gradient)


@torch.no_grad()
def inference(network: nn.Module, x: Tensor, gradient: Tensor) -> None:
    network(x)


def measure(batch: int, hidden: int, inputs: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    made = {"1": RIN(inputs, hidden), **{str(k): DeepTransitionRIN(inputs, hidden, transitions=k) for k in TRANSITIONS}}
    x, gradient = torch.randn(steps, batch, inputs), torch.randn(steps, batch, hidden)
    row: dict[str, Any] = {"batch": batch, "hidden": hidden, "inputs": inputs, "threads": torch.get_num_threads()}
    for what in (training, inference):
        rounds = []
        for _ in range(ROUNDS + 2):
            rounds.append({})
            for name, network in made.items():
                times = []
                for _ in range(2):
                    began = time.perf_counter()
                    what(network, x, gradient)
                    times.append(time.perf_counter() - began)
                rounds[-1][name] = min(times)
        row[what.__name__] = {
            "us": {name: statistics.median(r[name] for r in rounds[2:]) / steps * 1e6 for name in made},
            "ratio": {name: statistics.median(r[name] / r["1"] for r in rounds[2:]) for name in made},
        }
    return row


def table(results: dict[str, Any]) -> str:
    names = " | ".join(f"K = {k}" for k in TRANSITIONS)
    lines = [
        "# Steps of several transitions, beside a RIN's\n",
        f"{results['machine']['cpu']}, torch {results['machine']['torch']}, float32. us a step of a RIN, and by what it"
        " is multiplied with\nK transitions.\n",
        f"| threads | B | D | I | training: RIN | {names} | inference: RIN | {names} |",
        "|---" * (6 + 2 * len(TRANSITIONS)) + "|",
    ]  # fmt: skip
    for row in results["rows"]:
        cells = [str(row[key]) for key in ("threads", "batch", "hidden", "inputs")]
        for what in ("training", "inference"):
            cells.append(f"{row[what]['us']['1']:.3g}")
            cells += [f"{row[what]['ratio'][str(k)]:.2f}" for k in TRANSITIONS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for sizes in SIZES:
            rows.append(measure(*sizes))
            print(json.dumps(rows[-1]), flush=True)
    results = {"machine": {**description(), "torch": torch.__version__}, "rows": rows}
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
