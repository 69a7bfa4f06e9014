"""Times RIN on the CUDA and Triton backends against torch.nn.RNN (cuDNN), by CUDA events, in one process.

    python -m benchmarks.gpu.measure OUT.json [--seconds 200]

Same work for all: one layer, the input projection included, T = 512. Implementations alternate run by run, so that a
clock that changes changes it for all of them. Triton compiles a kernel per size, so its grid is filled last, for as
long as the time lasts; what is left out is in the results as "no time left".
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.cases import PEER, STEPS, Case, Measurement, Results, cases

Run = Callable[[], object]


def machine() -> dict[str, str]:
    query = "name,driver_version,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    smi = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        f"nvidia-smi {query}": smi,
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
    }


def layer(implementation: str, case: Case) -> Run:
    """A function that runs the case once; its `kept` attribute is the memory held between forward and backward."""
    import fused_rin

    dtype = getattr(torch, case.dtype)
    options = {"device": "cuda", "dtype": dtype}
    torch.manual_seed(0)
    if implementation == PEER:
        module: torch.nn.Module = torch.nn.RNN(case.hidden, case.hidden, nonlinearity="relu", **options)
    else:
        module = fused_rin.RIN(case.hidden, case.hidden, backend=implementation, **options)
    inputs = torch.randn(STEPS, case.batch, case.hidden, **options)
    grad = torch.randn(STEPS, case.batch, case.hidden, **options)

    if case.mode == "forward":
        module.eval()

        def run() -> None:
            with torch.no_grad():
                module(inputs)
    else:
        inputs.requires_grad_()
        parameters = (inputs, *module.parameters())

        def run() -> None:
            before = torch.cuda.memory_allocated()
            out, _ = module(inputs)
            run.kept = torch.cuda.memory_allocated() - before  # type: ignore[attr-defined]
            torch.autograd.grad(out, parameters, grad)

    run.kept = None  # type: ignore[attr-defined]
    return run


def elapsed_us(run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def graphed(run: Run) -> Run:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(case: Case, implementations: list[str], runs: int = 15) -> list[Measurement]:
    """All implementations on one case, alternating; one that fails has the reason in its note."""
    measured = {name: Measurement(name, case) for name in implementations}
    ready: dict[str, Run] = {}
    for name, row in measured.items():
        try:
            run = layer(name, case)
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            row.kept_bytes = run.kept  # type: ignore[attr-defined]
            ready[name] = run
        except Exception as error:  # any: a peer that fails must not end the benchmark
            row.note = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(runs):
        for name, run in ready.items():
            times[name].append(elapsed_us(run) / STEPS)
    for name, samples in times.items():
        low, middle, high = statistics.quantiles(samples, n=4)
        measured[name].us, measured[name].us_low, measured[name].us_high = middle, low, high
    for name, run in ready.items():
        try:
            replay = graphed(run)
            replay()
            measured[name].us_graph = statistics.median(elapsed_us(replay) / STEPS for _ in range(7))
        except Exception as error:
            measured[name].note = f"no graph: {type(error).__name__}: {error}".splitlines()[0][:200]
            torch.cuda.synchronize()
    return list(measured.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    results = Results(machine())
    for implementations in (["cuda", PEER], ["triton"]):
        for case in cases():
            if time.monotonic() > deadline:
                results.rows += [Measurement(name, case, note="no time left") for name in implementations]
                continue
            results.rows += measure(case, implementations)
            if len(results.rows) % 20 == 0:
                results.save(arguments.out)
    results.save(arguments.out)
    missing = sum(row.us is None for row in results.rows)
    print(f"{len(results.rows) - missing} measured, {missing} not; {arguments.out}")


if __name__ == "__main__":
    main()
