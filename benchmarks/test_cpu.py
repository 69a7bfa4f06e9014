"""RIN against torch.nn.RNN(relu) on this CPU: the same function, the same weights, in one process.

    make bench-cpu                 all points, a table, JSON under benchmarks/results/
    pytest benchmarks/test_cpu.py --benchmark-enable -k "1-512-64"

Rounds of the two alternate, so that a drifting clock meets both; medians are compared.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks.cpu_cases import INFERENCE, TRAINING, inference, make_pair, training

SECONDS = 0.5  # for each side of a point
ROUND = 0.01  # seconds a round lasts at least: the first call after the other's round finds its caches taken


def alternate(first, second, seconds: float) -> tuple[list[float], list[float]]:
    """Durations of a call of `first` and of `second`, one figure for each of their alternating rounds."""
    calls = []
    for run in (first, second):
        run(), run()
        start = time.perf_counter()
        run()
        calls.append(1 + int(ROUND / (time.perf_counter() - start)))
    durations: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while time.perf_counter() - begin < 2 * seconds or len(durations[0]) < 5:
        for run, count, kept in zip((first, second), calls, durations, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                run()
            kept.append((time.perf_counter() - start) / count)
    return durations


def point_name(point) -> str:
    return "-".join(map(str, point))


@pytest.mark.parametrize("start", ["rnn", "rin"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("what", "point"),
    [("inference", p) for p in INFERENCE] + [("training", p) for p in TRAINING],
    ids=lambda v: v if isinstance(v, str) else point_name(v),
)
def test_step(benchmark, what, point, threads, start):
    batch, steps, hidden, *rest = point
    input_size = rest[0] if rest else hidden
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    rnn, rin = make_pair(hidden, input_size, start)
    x = torch.randn(steps, batch, input_size)
    grad = torch.randn(steps, batch, hidden)
    ours, theirs = ((inference(m, x) if what == "inference" else training(m, x, grad)) for m in (rin, rnn))

    # A unit that stops at 1e-8 in one rounding and not in the other moves gradients by about 1e-3.
    a, b = ours(), theirs()
    assert (a - b).norm() <= (1e-4 if what == "inference" else 1e-2) * b.norm(), "not the same function"

    if benchmark.disabled:
        benchmark(ours)
        return
    mine, peers = alternate(ours, theirs, SECONDS)
    times = iter(mine)
    # pytest-benchmark keeps the statistics; the durations are those of the alternating run.
    clock = [0.0]

    def timer() -> float:
        return clock[0]

    def replay() -> None:
        clock[0] += next(times)

    benchmark._timer = timer
    benchmark.pedantic(replay, rounds=len(mine), iterations=1)
    mine_us, peer_us = (statistics.median(t) / steps * 1e6 for t in (mine, peers))
    benchmark.extra_info.update(
        what=what, B=batch, T=steps, H=hidden, input_size=input_size, threads=threads, start=start,
        us_per_step=mine_us, nn_rnn_us_per_step=peer_us, ratio=peer_us / mine_us,
        zero_states=float((ours() == 0).float().mean()) if what == "inference" else None,
    )  # fmt: skip
