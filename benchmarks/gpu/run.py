"""All of `make gpu`: build, tests, compute-sanitizer, latencies, benchmark, table and plot; under eight minutes.

    python -m benchmarks.gpu.run [RESULTS]      RESULTS: a folder; benchmarks/results/<gpu>/ if not given

Needs no network: the build uses what is installed (`pip install --no-build-isolation --no-deps`). A stage that fails
is written down with the end of its output and does not stop the ones after it; the exit code then is 1. Writes
run.json, tests.txt, sanitizer.txt, latencies.json, bench.json, table.md and speedup.png.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 450.0  # seconds, of the eight minutes


@dataclass
class Stage:
    """What became of one stage. `limit`: seconds after which it is ended."""

    name: str
    command: list[str]
    limit: float
    log: str = ""  # file under RESULTS that its output goes to
    status: str = "not run"
    seconds: float = 0.0
    tail: str = ""


def gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return re.sub(r"[^a-z0-9]+", "-", first.lower()).strip("-")


def architecture() -> str:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capability = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    number = capability.strip().replace(".", "")
    return "90a" if number == "90" else number


def find_tool(name: str) -> str:
    """The path of a CUDA tool, or its bare name, so that the stage fails and says which one is missing."""
    homes = [os.environ.get(v) for v in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    search = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return shutil.which(name, path=search) or name


def stages(results: Path, arch: str) -> list[Stage]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]
    small = [*pytest, "-x", "tests/gpu/test_cuda.py", "-k", "test_layouts and lengths and resets"]
    sanitizer = find_tool("compute-sanitizer")
    program = results / "latencies"
    nvcc = [find_tool("nvcc"), "-std=c++17", "-O2", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    build = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    return [
        Stage("build", build, 240),
        Stage("tests", [*pytest, "tests/gpu"], 150, "tests.txt"),
        Stage("memcheck", [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *small], 75, "sanitizer.txt"),
        Stage("racecheck", [sanitizer, "--tool", "racecheck", "--error-exitcode", "9", *small], 75, "sanitizer.txt"),
        Stage(
            "compile latencies",
            [*nvcc, "-I", str(ROOT / "csrc/cuda"), str(ROOT / "benchmarks/gpu/latencies.cu"), "-o", str(program)],
            60,
        ),
        Stage("latencies", [str(program)], 30, "latencies.json"),
        Stage("benchmark", [python, "-m", "benchmarks.gpu.measure", str(results / "bench.json")], 300),
        Stage("report", [python, "-m", "benchmarks.gpu.report", str(results / "bench.json")], 60),
    ]


def run(stage: Stage, results: Path, deadline: float) -> None:
    """Runs a stage within its limit and the time left."""
    limit = min(stage.limit, deadline - time.monotonic())
    if limit <= 0:
        stage.status = "no time left"
        return
    command = list(stage.command)
    if stage.name == "benchmark":  # it spends what is left, and keeps some for the report
        command += ["--seconds", str(max(10.0, limit - 30))]
    print(f"== {stage.name}", flush=True)
    env = {**os.environ, "FUSED_RIN_CUDA": "on", "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=limit, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, stage.status = done.stdout, "passed" if done.returncode == 0 else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        stage.status = f"ended after {limit:.0f} s"
    except OSError as error:
        output, stage.status = "", f"could not be started: {error}"
    stage.seconds = round(time.monotonic() - start, 1)
    stage.tail = output[-2000:]
    if stage.log:
        with (results / stage.log).open("a") as file:
            file.write(output[-200_000:])
    print(f"{stage.tail}\n-- {stage.name}: {stage.status} in {stage.seconds} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path)
    results = parser.parse_args().results or ROOT / "benchmarks" / "results" / gpu_name()
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    planned = stages(results, architecture())
    for log in {stage.log for stage in planned} - {""}:
        (results / log).unlink(missing_ok=True)
    deadline = time.monotonic() + BUDGET
    for stage in planned:
        run(stage, results, deadline)
        record = [{k: v for k, v in asdict(s).items() if k != "limit"} for s in planned]
        # Paths of this machine are of no use to a reader of the results.
        (results / "run.json").write_text(json.dumps(record, indent=1).replace(str(ROOT), ".") + "\n")
    (results / "latencies").unlink(missing_ok=True)
    for stage in planned:
        print(f"{stage.status:>20}  {stage.seconds:6.1f} s  {stage.name}")
    return int(any(stage.status != "passed" for stage in planned))


if __name__ == "__main__":
    sys.exit(main())
