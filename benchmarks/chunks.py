"""Chunks of time side by side, beside the steps in turn.

    make bench-chunks [RESULTS=FILE.json]     a minute; a table beside it, FILE.md

Networks that forget: nn.RNN as it starts (tanh), and a leaky network, alpha = 0.1, whose matrix has a norm of 0.3.
B = 1, T = 4,096, float32, tolerance 1e-4. Training is forward and backward of the recurrence, without the layer's
products. Medians of rounds in which the plain one and each number of chunks take their turn, and of the ratios within a
round. One thread and two.

Before that, how long networks remember: for how many steps two sequences of states that begin apart, at zeros and at
what the same inputs led to, differ by more than 1e-4 of the largest state. Of 128 units; and of a RIN that was trained
on the digits (64 steps) for 600 updates.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fused_rin import parallel_recurrence, recurrence
from torch import Tensor

from benchmarks.peers.machine import description

ROUNDS = 5
STEPS = 4096
SIZES = (64, 128, 256, 512, 1024)
CHUNKS = (2, 4, 8, 16)
DEFAULT = Path(__file__).parent / "results" / "chunks.json"
# Warm-up, and the rest of the call.
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "nn.RNN": (32, {"skip": 0.0, "activation": "tanh"}),
    "leaky": (128, {"skip": 0.9, "gain": 0.1, "form": "outside", "activation": "relu"}),
}


def weight_of(network: str, hidden: int) -> Tensor:
    weight = torch.empty(1, hidden, hidden).uniform_(-(hidden**-0.5), hidden**-0.5)
    return weight if network == "nn.RNN" else weight * (0.3 / torch.linalg.matrix_norm(weight, 2))


def measure(network: str, hidden: int) -> dict[str, Any]:
    torch.manual_seed(0)
    warm_up, options = NETWORKS[network]
    pre = torch.randn(STEPS, 1, 1, hidden).requires_grad_()
    weight, gradient = weight_of(network, hidden).requires_grad_(), torch.randn(STEPS, 1, 1, hidden)

    def plain() -> tuple[Tensor, Tensor]:
        return recurrence(pre, weight, **options)

    def parallel(chunks: int) -> tuple[Tensor, Tensor]:
        return parallel_recurrence(pre, weight, chunks=chunks, warm_up=warm_up, tolerance=1e-4, **options)

    calls: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"1": plain}
    calls |= {str(chunks): (lambda chunks=chunks: parallel(chunks)) for chunks in CHUNKS}

    def inference(call: Callable[[], tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            call()

    def training(call: Callable[[], tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(call()[0], (pre, weight), gradient)

    row: dict[str, Any] = {"network": network, "hidden": hidden, "threads": torch.get_num_threads()}
    for what in (training, inference):
        rounds = []
        for _ in range(ROUNDS + 1):
            rounds.append({})
            for name, call in calls.items():
                began = time.perf_counter()
                what(call)
                rounds[-1][name] = time.perf_counter() - began
        row[what.__name__] = {
            "us": statistics.median(r["1"] for r in rounds[1:]) / STEPS * 1e6,
            "times_faster": {name: statistics.median(r["1"] / r[name] for r in rounds[1:]) for name in calls},
        }
    return row


def memory(pre: Tensor, weight: Tensor, **options: Any) -> int | None:
    """Steps until it has forgotten where it began, or None: not within the sequence."""
    with torch.no_grad():
        _, state = recurrence(pre, weight, **options)
        begun = recurrence(pre, weight, state, **options)[0]
        apart = (begun - recurrence(pre, weight, **options)[0]).abs().amax((1, 2, 3)) / begun.abs().max()
    late = (apart > 1e-4).nonzero().flatten()
    if not len(late):
        return 0
    return None if late[-1] == len(pre) - 1 else int(late[-1]) + 1


def trained_rin() -> tuple[Tensor, Tensor]:
    """(pre, weight) of a RIN that was trained on the digits, over the 64 pixels of one that it has not seen."""
    from fused_rin.experiments.training.loop import Loop
    from fused_rin.experiments.training.optimizers import make_optimizers
    from fused_rin.experiments.training.settings import Settings
    from fused_rin.experiments.training.trainer import make_fabric

    settings = Settings.for_task("digits", steps=600, device="cpu", hidden_size=128)
    task = settings.build_task()
    model = settings.build_model(task)
    loop = Loop(settings, make_fabric(settings), task, model, make_optimizers(settings, model))
    while loop.step < settings.steps:
        loop.train_step()
    rnn = model.rnn
    (x,), _ = next(task.test_batches(1))
    pre = torch.nn.functional.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0)
    return pre.detach()[:, :, None], rnn.weight_hh_l0.detach()[None]


def memories() -> dict[str, int | None]:
    torch.manual_seed(0)
    pre, normal = torch.randn(STEPS, 1, 1, 128), torch.randn(1, 128, 128)
    found = {"nn.RNN as it starts, tanh": memory(pre, weight_of("nn.RNN", 128), skip=0.0, activation="tanh")}
    for alpha in (0.5, 0.1, 0.02):
        leaky = {"form": "outside", "skip": 1 - alpha, "gain": alpha}
        found[f"leaky, alpha = {alpha:g}, U of norm 0.3"] = memory(pre, weight_of("leaky", 128), **leaky)
    found["RIN as it starts"] = memory(0.01 * pre, 0.001 * normal)
    found["RIN trained on the digits, of 64 steps"] = memory(*trained_rin())
    return found


def table(results: dict[str, Any]) -> str:
    remembered = [f"| {name} | {'all' if steps is None else steps} |" for name, steps in results["memories"].items()]
    names = " | ".join(map(str, CHUNKS))
    lines = [
        "# Chunks of time side by side\n",
        f"| network | remembers, steps of {STEPS:,} |",
        "|---|---|",
        *remembered,
        f"\n{results['machine']['cpu']}, torch {results['machine']['torch']}, float32, B = 1, T = {STEPS:,}. us a step"
        " in turn, and how many times\nfaster so many chunks are.\n",
        f"| threads | network | D | training: in turn | {names} | inference: in turn | {names} |",
        "|---" * (5 + 2 * len(CHUNKS)) + "|",
    ]
    for row in results["rows"]:
        cells = [str(row[key]) for key in ("threads", "network", "hidden")]
        for what in ("training", "inference"):
            cells.append(f"{row[what]['us']:.3g}")
            cells += [f"{row[what]['times_faster'][str(chunks)]:.2f}" for chunks in CHUNKS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    warnings.simplefilter("error", RuntimeWarning)  # none runs in turn unnoticed
    remembered, rows = memories(), []
    print(remembered, flush=True)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for network in NETWORKS:
            for hidden in SIZES:
                rows.append(measure(network, hidden))
                print(json.dumps(rows[-1]), flush=True)
    results = {"machine": {**description(), "torch": torch.__version__}, "memories": remembered, "rows": rows}
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
