"""RIN against torch.nn.RNN(relu) on this CPU: the same function, the same weights, in one process.

    make bench-cpu                 all cases, a table, JSON under benchmarks/results/
    pytest benchmarks/test_cpu.py --benchmark-enable -k "forward-512-rnn and 64"

The two implementations of a case follow on each other, so that a drifting clock meets both alike; medians are compared.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.cpu import IMPLEMENTATIONS, OURS, both, calls, layers
from benchmarks.harness import PEER, Measurement


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [*layers(), *calls()], ids=str)
def test_case(benchmark, case, implementation):
    runs = both(case)
    # A unit that stops at 1e-8 in one rounding and not in the other moves gradients by about 1e-3.
    a, b = runs[OURS](), runs[PEER]()
    assert (a - b).norm() <= (1e-4 if case.mode == "forward" else 1e-2) * b.norm(), "not the same function"

    out = benchmark(runs[implementation])
    row = Measurement(implementation, case)
    if case.mode == "forward":
        row.zero_states = float((out == 0).float().mean())
    if not benchmark.disabled:
        scale = 1e6 / case.steps
        stats = benchmark.stats.stats
        row.us, row.us_low, row.us_high = stats.median * scale, stats.q1 * scale, stats.q3 * scale
    benchmark.extra_info.update(asdict(row))
