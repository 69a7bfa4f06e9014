"""What a step takes at least: multiply-adds at the peak of this machine, and bytes from where they lie.

Both are measured by roofline.cpp, compiled on demand for this processor. A share of 1 is the roof; skipping the states
that are 0 can go through it, since all multiply-adds are counted.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.harness import Case
from benchmarks.peers import native
from benchmarks.peers.cases import inputs, lengths

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
Rates = dict[str, dict[str, float]]


def measure(threads: int, seconds: float = 0.01) -> Rates:
    """{"gflops": {dtype: ...}, "read_gbs": {bytes of each thread: ...}}, sums over the threads; about a second.

    Raises native.CannotBuild.
    """
    source = Path(__file__).with_name("roofline.cpp")
    program = native.build(source, [*native.FLAGS, "-pthread"])
    done = subprocess.run([program, str(threads), str(seconds)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _rows(case: Case) -> float:
    """Sequences in a step, the mean over the steps where they end at different ones."""
    return sum(lengths(case)) / case.steps if case.layout == "packed" else case.batch


def flops(case: Case) -> float:
    """Of a step of all layers and directions. Training is three products in place of one: the output, the gradient of
    what came in, the gradient of the weights.
    """
    total = 0.0
    for layer in range(case.layers):
        width = inputs(case) if layer == 0 else case.hidden * case.directions
        total += 2.0 * _rows(case) * case.directions * case.hidden * (width + case.hidden / case.heads)
    return total * (3 if case.mode == "training" else 1)


def seconds(case: Case, rates: Rates) -> tuple[float, str]:
    """(of a step at least, what bounds it). 16-bit floats that have no unit here are computed in float32."""
    compute = flops(case) / 1e9 / rates["gflops"].get(case.dtype, rates["gflops"]["float32"])
    size, ways = BYTES[case.dtype], case.directions * case.layers
    passes = 2 if case.mode == "training" else 1  # the recurrent matrix in every step forward and every step back
    matrix = case.hidden * case.hidden / case.heads * size
    # One sequence: the threads share a matrix's rows. Several: each thread reads all of it for its own.
    share = matrix / case.threads if case.batch == 1 else matrix
    weights = passes * ways * share * case.threads / 1e9 / _bandwidth(rates, share)
    # The output written; training reads it and its gradient, and writes the input's. All steps lie behind each other.
    values = _rows(case) * (inputs(case) + ways * case.hidden) * passes * size
    stream = values / 1e9 / _bandwidth(rates, values * case.steps / case.threads)
    bounds = {"multiply-adds": compute, "reading U": weights, "sequences": stream}
    name = max(bounds, key=bounds.__getitem__)
    return bounds[name], name


def _bandwidth(rates: Rates, needed: float) -> float:
    """GB/s of all threads together where each has so many bytes."""
    known = sorted((int(size), speed) for size, speed in rates["read_gbs"].items())
    return next((speed for size, speed in known if size >= needed), known[-1][1])


def share(case: Case, us: float, rates: dict[str, Any]) -> float | None:
    """Of the roof that a measured step reaches; None if there was no compiler to measure it."""
    found = rates.get(str(case.threads))
    return seconds(case, found)[0] * 1e6 / us if found else None
