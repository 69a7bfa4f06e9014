"""Times RIN on the CUDA and Triton backends against torch.nn.RNN (cuDNN), by CUDA events.

    python -m benchmarks.gpu.measure OUT.json [--seconds 200]

Same work for all: one layer, the input projection included, T = 512. Implementations alternate run by run, so that a
clock that changes changes it for all of them. Triton compiles a kernel per size, so its grid is filled last, for as
long as the time lasts; what is left out is in the results as "no time left".

The GPU is used by a process of its own: one that loses its context (an illegal access ends all work of the process) or
hangs is replaced, what it was at has the reason in its note, and the rest is measured all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.cases import TF32, cases, important, precisions, wide_cases
from benchmarks.harness import PEER, STEPS, Case, Measurement, Results, measurement

PATIENCE = 60.0  # seconds without a word from the process that measures
MOST_LOSSES = 3  # after so many lost processes an implementation is left out
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


def allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def layer(implementation: str, case: Case) -> Run:
    """A function that runs the case once; its `kept` attribute is the memory held between forward and backward."""
    import fused_rin

    tf32 = implementation.endswith(TF32)
    implementation = implementation.removesuffix(TF32)
    dtype = getattr(torch, case.dtype)
    options = {"device": "cuda", "dtype": dtype}
    torch.manual_seed(0)
    if implementation == PEER:
        module: torch.nn.Module = torch.nn.RNN(case.hidden, case.hidden, nonlinearity="relu", **options)
        module.flatten_parameters()  # one block of weights, as in use after .cuda()
    else:
        module = fused_rin.RIN(case.hidden, case.hidden, backend=implementation, **options)
    inputs = torch.randn(STEPS, case.batch, case.hidden, **options)
    grad = torch.randn(STEPS, case.batch, case.hidden, **options)

    if case.mode == "forward":
        module.eval()

        def run() -> None:
            allow_tf32(tf32)
            with torch.no_grad():
                module(inputs)
    else:
        inputs.requires_grad_()
        parameters = (inputs, *module.parameters())

        def run() -> None:
            allow_tf32(tf32)
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


class ContextLost(RuntimeError):
    """The process can no longer use the GPU; says by whose fault and why."""

    def __init__(self, implementation: str, why: str) -> None:
        super().__init__(implementation, why)
        self.implementation, self.why = implementation, why


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def settle(row: Measurement, error: Exception) -> None:
    """Notes an implementation's error; raises ContextLost if it was the kind after which nothing works."""
    row.note = reason(error)
    try:
        torch.cuda.synchronize()
    except Exception:
        raise ContextLost(row.implementation, row.note) from None


def measure(case: Case, implementations: list[str], at: Callable[[str], None], runs: int = 15) -> list[Measurement]:
    """All implementations on one case, alternating; one that fails has the reason in its note.

    `at` is told whose turn it is. Raises ContextLost.
    """
    measured = {name: Measurement(name, case) for name in implementations}
    ready: dict[str, Run] = {}
    for name, row in measured.items():
        at(name)
        try:
            run = layer(name, case)
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            row.kept_bytes = run.kept  # type: ignore[attr-defined]
            ready[name] = run
        except Exception as error:  # any: a peer that fails must not end the benchmark
            settle(row, error)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(runs):
        for name, run in list(ready.items()):
            try:
                times[name].append(elapsed_us(run) / STEPS)
            except Exception as error:
                settle(measured[name], error)
                del ready[name], times[name]
    for name, samples in times.items():
        low, middle, high = statistics.quantiles(samples, n=4)
        measured[name].us, measured[name].us_low, measured[name].us_high = middle, low, high
    for name, run in ready.items():
        at(name)
        try:
            replay = graphed(run)
            replay()
            measured[name].us_graph = statistics.median(elapsed_us(replay) / STEPS for _ in range(7))
        except Exception as error:
            settle(measured[name], error)
            measured[name].note = f"no graph: {measured[name].note}"
    return list(measured.values())


def worker() -> None:
    """Takes jobs, one a line, from standard input; says whose turn it is, and what was measured, line by line."""

    def say(**message: object) -> None:
        print(json.dumps(message), flush=True)

    for line in sys.stdin:
        job = json.loads(line)
        try:
            rows = measure(Case(**job["case"]), job["implementations"], lambda name: say(at=name))
        except ContextLost as lost:
            say(at=lost.implementation)
            say(lost=lost.why)
            sys.exit(3)
        say(rows=[asdict(row) for row in rows])


class Worker:
    """The process that measures, as the one that supervises it sees it."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def messages(self, case: Case, implementations: list[str]) -> Iterator[dict]:
        """What it says about a job; last of all its rows, or {"lost": why}."""
        job = {"case": asdict(case), "implementations": implementations}
        with contextlib.suppress(OSError):  # it has ended: there will be no line either
            print(json.dumps(job), file=self.process.stdin, flush=True)
        while True:
            try:
                line = self.lines.get(timeout=PATIENCE)
            except queue.Empty:
                yield {"lost": f"no answer within {PATIENCE:.0f} s"}
                return
            if line is None:
                yield {"lost": f"the process ended with exit code {self.process.wait()}"}
                return
            if not line.startswith("{"):
                continue  # a library that prints
            message = json.loads(line)
            yield message
            if "rows" in message or "lost" in message:
                return

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def supervise(
    jobs: list[tuple[list[str], Case]], results: Results, out: Path, deadline: float, command: list[str]
) -> None:
    """Has every job measured by processes of `command`; `results` gets a row for each implementation of each job."""
    waiting, losses, process = deque(jobs), Counter[str](), None
    while waiting:
        implementations, case = waiting.popleft()
        left_out = [name for name in implementations if losses[name] >= MOST_LOSSES]
        results.rows += [Measurement(n, case, note=f"left out: {losses[n]} processes were lost") for n in left_out]
        implementations = [name for name in implementations if name not in left_out]
        if not implementations:
            continue
        if time.monotonic() > deadline:
            results.rows += [Measurement(name, case, note="no time left") for name in implementations]
            continue
        process = process or Worker(command)
        turn = implementations[0]
        for message in process.messages(case, implementations):
            if "at" in message:
                turn = message["at"]
            elif "rows" in message:
                results.rows += map(measurement, message["rows"])
            else:
                process.end()
                process = None
                losses[turn] += 1
                print(f"{turn} on {case}: {message['lost']}", flush=True)
                results.rows.append(Measurement(turn, case, note=f"process lost: {message['lost']}"))
                rest = [name for name in implementations if name != turn]
                if rest:
                    waiting.appendleft((rest, case))
        if len(results.rows) % 20 < 2:
            results.save(out)
    if process:
        process.end()
    results.save(out)


def complaints(results: Results) -> dict[str, str]:
    """{implementation: what went wrong} for those that lost a process, or of which nothing could be measured."""
    found = {}
    for name in dict.fromkeys(row.implementation for row in results.rows):
        rows = [row for row in results.rows if row.implementation == name and row.note != "no time left"]
        lost = [row for row in rows if row.note.startswith("process lost")]
        if lost:
            found[name] = f"{len(lost)} processes lost"
        elif rows and all(row.us is None for row in rows):
            found[name] = f"nothing measured ({rows[0].note})"
    return found


def cuda_is_built() -> bool:
    from fused_rin import cuda

    if cuda._cuda is None:
        print(f"the CUDA backend is not measured: {cuda.unavailable_reason(torch.device('cuda'), torch.float32)}")
    return cuda._cuda is not None


def wide(case: Case) -> list[str]:
    """What runs a case beyond one block: the CUDA kernels too where clusters hold it."""
    from fused_rin import cuda

    backend = cuda.unavailable_reason(torch.device("cuda"), getattr(torch, case.dtype), case.hidden)
    return ["triton", PEER] if backend else ["cuda", "triton", PEER]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--worker", action="store_true", help="measure what standard input asks for")
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    if arguments.out is None:
        parser.error("OUT.json is missing")
    deadline = time.monotonic() + arguments.seconds
    results = Results(machine())
    first = ["cuda", PEER] if cuda_is_built() else [PEER]
    jobs = [(first, case) for case in cases() if important(case)]
    jobs += [(wide(case), case) for case in wide_cases() if case.dtype == "bfloat16"]
    jobs += [(["triton"], case) for case in cases() if important(case)]
    jobs += [(wide(case), case) for case in wide_cases() if case.dtype != "bfloat16"]
    jobs += [([*first, "triton"], case) for case in cases() if not important(case)]
    jobs = [(precisions(implementations, case), case) for implementations, case in jobs]
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "--worker"]
    supervise(jobs, results, arguments.out, deadline, command)
    missing = sum(row.us is None for row in results.rows)
    print(f"{len(results.rows) - missing} measured, {missing} not; {arguments.out}")
    problems = [f"{name}: {why}" for name, why in complaints(results).items()]
    if problems:
        sys.exit("; ".join(problems))


if __name__ == "__main__":
    main()
