"""LeakyRNN and PLRNN beside a RIN of the same size, and beside the loop in Python that they take the place of.

    make bench-leaky [RESULTS=FILE.json]     two minutes; a table beside it, FILE.md

Training: forward and backward of a layer, float32, input_size = hidden_size, all parameters need gradients; medians of
rounds in which each takes its turn, and of the ratios to the RIN of the same round. One thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fused_rin import PLRNN, RIN, LeakyRNN
from torch import Tensor, nn

from benchmarks.peers.machine import description

ROUNDS = 15
SIZES = [(1, 128, 512), (16, 64, 256), (32, 128, 128), (64, 100, 128), (64, 128, 128), (128, 256, 64)]  # B, D, T
DEFAULT = Path(__file__).parent / "results" / "leaky.json"


class Loop(nn.Module):
    """What is found in public code: the leaky network, step by step (alpha a number)."""

    def __init__(self, size: int, activation: str) -> None:
        super().__init__()
        self.input, self.recurrent = nn.Linear(size, size), nn.Linear(size, size)
        self.act: Callable[[Tensor], Tensor] = getattr(torch, activation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, states = x.new_zeros(x.shape[1:]), []
        for step in x:
            h = 0.8 * h + 0.2 * self.act(self.input(step) + self.recurrent(h))
            states.append(h)
        return torch.stack(states), h


def networks(size: int, activation: str) -> dict[str, nn.Module]:
    each = torch.full((size,), 0.2)
    common: dict[str, Any] = {"nonlinearity": activation}
    return {
        "RIN": RIN(size, size, skip=0.5, **common),
        "rate": LeakyRNN(size, size, alpha=0.2, **common),
        "rate, alpha of each unit trained": LeakyRNN(size, size, alpha=each, train_alpha=True, **common),
        "current": LeakyRNN(size, size, alpha=0.2, form="current", **common),
        "current, alpha of each unit trained": LeakyRNN(
            size, size, alpha=each, train_alpha=True, form="current", **common
        ),
        "PLRNN": PLRNN(size, size, **common),
        "loop": Loop(size, activation),
    }


def seconds(network: nn.Module, x: Tensor, gradient: Tensor) -> float:
    """Of the faster of two steps: the first one meets the caches and the free memory that others left."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        network(x)[0].backward(gradient)
        times.append(time.perf_counter() - began)
        network.zero_grad()
    return min(times[1:])


def measure(batch: int, size: int, steps: int, activation: str) -> dict[str, Any]:
    torch.manual_seed(0)
    made, x = networks(size, activation), torch.randn(steps, batch, size)
    gradient = torch.randn(steps, batch, size)
    rounds = [{name: seconds(network, x, gradient) for name, network in made.items()} for _ in range(ROUNDS + 2)][2:]
    return {
        "batch": batch, "hidden": size, "steps": steps, "activation": activation,
        "us": {name: statistics.median(r[name] for r in rounds) / steps * 1e6 for name in made},
        "ratio": {name: statistics.median(r[name] / r["RIN"] for r in rounds) for name in made},
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    names = list(results["rows"][0]["us"])
    lines = [
        "# A training step of leaky networks, beside a RIN's\n",
        f"{results['machine']['cpu']}, torch {results['machine']['torch']}, one thread, float32. us a step; in brackets"
        " by the RIN's. The loop is the network",
        'of the column "rate" in Python.\n',
        "| B | D | activation | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for row in results["rows"]:
        cells = [f"{row['us'][n]:.3g}" + (f" ({row['ratio'][n]:.2f})" if n != "RIN" else "") for n in names]
        lines.append(f"| {row['batch']} | {row['hidden']} | {row['activation']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    torch.set_num_threads(1)
    # As in a process that once freed something large: until then glibc gives back every few MB that are freed, and each
    # page costs a fault when it comes again, which is 20 percent of a step where two tensors of 2 MB are kept, not one.
    torch.empty(31 << 20, dtype=torch.uint8)
    rows = []
    for batch, size, steps in SIZES:
        for activation in ("relu", "tanh"):
            rows.append(measure(batch, size, steps, activation))
            print(json.dumps(rows[-1]["ratio"]), flush=True)
    results = {"machine": {**description(), "torch": torch.__version__}, "rows": rows}
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
