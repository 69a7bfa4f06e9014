"""One peer on one number of threads: the cases that block.py chose, each checked, then timed by pytest-benchmark."""

from __future__ import annotations

import resource
import time

from benchmarks.peers.block import Block


def test_case(benchmark, block: Block, case):
    with block.row(case) as row:
        run = block.checked(case, row)
        before, began = _processor_time(), time.perf_counter()
        benchmark(run.call)
        took = time.perf_counter() - began
        row.cores = round((_processor_time() - before) / took, 2)
        stats, scale = benchmark.stats.stats, 1e6 / case.steps
        row.us, row.us_low, row.us_high = stats.median * scale, stats.q1 * scale, stats.q3 * scale
        row.rounds = stats.rounds


def _processor_time() -> float:
    """Of all threads of the process, system calls too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
