"""RIN and torch.nn.RNN where threads do not have a processor each: too few of them, a neighbour, several callers.

    make bench-crowd [RESULTS=FILE.json]     three minutes; two cores at least; a table beside it, FILE.md

A call of a layer's forward pass, float32, input_size = hidden_size. Each row is a process of its own whose processors
are chosen before torch is loaded, as a container or `taskset` does it; the medians are of calls one after the other,
1.5 seconds of each implementation. "alone" is the RIN with one thread in the same crowd.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness import PEER, Case, Measurement, Results, measurement

SECONDS = 1.5
OURS, ALONE = "cpu", "cpu, one thread"
# name: (threads, processors)
CROWDS = {
    "2 threads on one core": (2, 1),
    "4 threads on one core": (4, 1),
    "8 threads on one core": (8, 1),
    "8 threads on two cores": (8, 2),
    "a busy neighbour on one of two cores": (2, 2),
    "four callers on two cores": (2, 2),
    "a DataLoader with two workers": (2, 2),
}
# (B, T, D, directions)
SHAPES = [(1, 200, 256, 1), (1, 200, 512, 1), (1, 200, 128, 2), (32, 200, 128, 1)]


def cases() -> list[Case]:
    return [
        Case("float32", batch, hidden, "forward", steps, threads=threads, directions=directions, crowd=crowd)
        for crowd, (threads, _) in CROWDS.items()
        for batch, steps, hidden, directions in SHAPES
    ]


@contextlib.contextmanager
def neighbour(processor: int) -> Iterator[None]:
    """A process that never rests."""
    code = f"import os; os.sched_setaffinity(0, {{{processor}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def batches() -> Iterator[None]:
    """A DataLoader whose two workers make batches all the time."""
    import torch

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1 << 30

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.randn(200, 128).cumsum(0)

    loader = iter(torch.utils.data.DataLoader(Samples(), batch_size=32, num_workers=2, prefetch_factor=8))
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            next(loader)

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        yield
    finally:
        done.set()
        drawing.join()


def milliseconds(call: Callable[[], object], callers: int) -> list[float]:
    """Of each call in SECONDS, from so many Python threads at once."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS

    def work() -> None:
        import torch

        with torch.no_grad():
            while time.perf_counter() < end or len(times) < 5:
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))

    workers = [threading.Thread(target=work) for _ in range(callers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return times


def measure(case: Case, processors: list[int]) -> list[Measurement]:
    """In this process, whose processors they become."""
    os.sched_setaffinity(0, processors)
    import torch
    from fused_rin import RIN

    torch.manual_seed(0)
    rin = RIN(case.hidden, case.hidden, bidirectional=case.directions == 2)
    x = torch.randn(case.steps, case.batch, case.hidden)
    around = contextlib.nullcontext()
    if "neighbour" in case.crowd:
        around = neighbour(processors[-1])
    elif "DataLoader" in case.crowd:
        around = batches()
    rows = []
    with around:
        for name, module in ((OURS, rin), (PEER, rin.to_rnn()), (ALONE, rin)):
            torch.set_num_threads(1 if name == ALONE else case.threads)
            with torch.no_grad():
                for _ in range(3):
                    module(x)
            times = milliseconds(lambda module=module: module(x), 4 if "callers" in case.crowd else 1)
            low, middle, high = (1e3 * t / case.steps for t in statistics.quantiles(times, n=4))
            rows.append(Measurement(name, case, us=middle, us_low=low, us_high=high))
    return rows


def table(results: Results) -> str:
    """Markdown; milliseconds of a call, and how many times as long as nn.RNN's and as alone."""
    about = results.machine
    where = f"{about['cpu']} ({', '.join(about['instruction_sets'])}), torch {about['torch']}"
    lines = [
        "# RIN and torch.nn.RNN on a crowded machine",
        "",
        f"{where}; forward pass of a layer, ms a call (median); `make bench-crowd`.",
        "",
        "| crowd | B, T, D | directions | RIN | nn.RNN | RIN, one thread | of nn.RNN | of one thread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, row in results.by_case().items():
        ours, theirs, alone = ((row[name].us or 0.0) * case.steps / 1e3 for name in (OURS, PEER, ALONE))
        cells = [case.crowd, f"{case.batch}, {case.steps}, {case.hidden}", case.directions]
        cells += [f"{value:.2f}" for value in (ours, theirs, alone, ours / theirs, ours / alone)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--row"]:
        job = json.loads(sys.argv[2])
        print(json.dumps([asdict(row) for row in measure(Case(**job["case"]), job["processors"])]))
        return
    from fused_rin.experiments.machine import machine

    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/crowd.json")
    here = sorted(os.sched_getaffinity(0))
    if len(here) < 2:
        raise SystemExit("two processors are needed")
    results = Results(machine())
    for case in cases():
        job = json.dumps({"case": asdict(case), "processors": here[: CROWDS[case.crowd][1]]})
        command = [sys.executable, "-m", "benchmarks.crowd", "--row", job]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        results.rows += map(measurement, json.loads(done.stdout.splitlines()[-1]))
        results.save(out)
    text = table(results)
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
