"""Times layers side by side (fused_rin/wavefront.py) against layers in turn and torch.nn.RNN (cuDNN), by CUDA events.

    python -m benchmarks.gpu.layers OUT.json [--seconds 40]

Eager and replayed as a graph. And what `wavefront.choose` has assumptions for: START, the microseconds that one more
sweep takes of a layer that is cut in spans, in a graph, and CALL, those of the CPU for a span.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fused_rin import RIN, cuda, cuda_plan, settings, wavefront
from fused_rin.device import device_record
from fused_rin.problem import ALL_ROWS, RIN_RULE

from benchmarks.gpu.measure import elapsed_us, graphed, machine
from benchmarks.harness import PEER

STEPS = 1024
# The most important first: time may not last for all.
CASES = [
    (layers, hidden, batch, mode)
    for hidden, layers, batch, mode in itertools.product((128, 512, 1024), (2, 4), (1, 8), ("forward", "training"))
]


def runner(module: torch.nn.Module, mode: str, batch: int) -> Callable[[], None]:
    weight = next(module.parameters())
    x = torch.randn(STEPS, batch, weight.shape[1], device="cuda", dtype=weight.dtype, requires_grad=mode == "training")
    grad = torch.randn(STEPS, batch, weight.shape[0], device="cuda", dtype=weight.dtype)

    def run() -> None:
        with torch.set_grad_enabled(mode == "training"):
            out, _ = module(x)
            if mode == "training":
                torch.autograd.grad(out, (x, *module.parameters()), grad)

    return run


def time_case(layers: int, hidden: int, batch: int, mode: str) -> Iterator[dict[str, Any]]:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    ours = RIN(hidden, hidden, layers, backend="cuda", **options)
    peer = torch.nn.RNN(hidden, hidden, layers, nonlinearity="relu", **options)
    peer.flatten_parameters()
    ways = {
        "side by side": ("on", runner(ours, mode, batch)),
        "in turn": ("off", runner(ours, mode, batch)),
        PEER: ("off", runner(peer, mode, batch)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(10):
        for name, (setting, run) in ways.items():
            settings.WAVEFRONT = setting
            taken = elapsed_us(run)
            if round_ > 2:
                times[name].append(taken)
    settings.WAVEFRONT = "on"
    found = wavefront.plan_of(ours, "relu", ALL_ROWS, STEPS, batch, torch.bfloat16, torch.device("cuda"))
    for name, (setting, run) in ways.items():
        settings.WAVEFRONT = setting
        row: dict[str, Any] = {"layers": layers, "hidden": hidden, "batch": batch, "mode": mode, "way": name}
        row["us"] = statistics.median(times[name])
        try:
            replay = graphed(run)
            replay()
            row["us_graph"] = statistics.median(elapsed_us(replay) for _ in range(7))
        except Exception as error:  # any: what fails must not end the benchmark
            row["note"] = f"no graph: {type(error).__name__}: {error}".splitlines()[0]
        if name == "side by side" and found is not None:
            row |= {"span": found.steps, "gain by the model": found.gain}
        yield row


def constants(hidden: int = 128, batch: int = 8, spans: int = 16) -> dict[str, float]:
    """START and CALL of wavefront.py, microseconds, by a forward sweep of one layer in one piece and in spans."""
    device = device_record(torch.cuda.current_device())
    plan = cuda_plan.plan(batch, 1, hidden, torch.bfloat16, device)
    weight = torch.randn(1, hidden, hidden, device="cuda", dtype=torch.bfloat16) * 0.01
    pre = torch.randn(STEPS, batch, 1, hidden, device="cuda", dtype=torch.bfloat16)
    last = torch.empty(batch, 1, hidden, device="cuda", dtype=torch.bfloat16)
    sweeps, w = cuda.Spans(plan), torch.eye(hidden, device="cuda", dtype=torch.bfloat16)

    def run(count: int) -> Callable[[], None]:
        states = wavefront._States(None, last, count)
        size = STEPS // count

        def sweep() -> None:
            for number in range(count):
                here = pre[number * size : (number + 1) * size]
                sweeps(here, None, states.of(number), weight, here, ALL_ROWS, RIN_RULE)

        return sweep

    def replayed(count: int) -> float:
        replay = graphed(run(count))
        return statistics.median(elapsed_us(replay) for _ in range(15))

    weights = [wavefront.Weights(w, w) for _ in range(2)]
    lanes = lambda count: wavefront.Streams(count, pre.device)  # noqa: E731
    call = wavefront.Call(ALL_ROWS, RIN_RULE, 1, False, STEPS // spans, sweeps, lanes, "cuda")
    x, times = pre[:, :, 0], []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        wavefront.wavefront_forward(call, x, None, weights)
        times.append(1e6 * (time.perf_counter() - begin))
    return {
        "START": (replayed(spans) - replayed(1)) / (spans - 1),
        "CALL": statistics.median(times) / (2 * spans),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    results: dict[str, Any] = {"machine": machine(), "constants": constants(), "rows": []}
    print("wavefront.py assumes", {"START": wavefront.START, "CALL": wavefront.CALL}, "measured", results["constants"])
    for case in CASES:
        if time.monotonic() > end:
            print("no time left for", case)
            continue
        rows = list(time_case(*case))
        results["rows"] += rows
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(case, {row["way"]: (round(row["us"]), round(row.get("us_graph", 0))) for row in rows}, flush=True)


if __name__ == "__main__":
    main()
