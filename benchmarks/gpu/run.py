"""All of `make gpu`: build, tests, latencies, training, benchmark, table and plot, compute-sanitizer; nine minutes.

    python -m benchmarks.gpu.run [RESULTS]      RESULTS: a folder; benchmarks/results/<gpu>/ if not given

Needs no network and, beside CUDA, a Python with torch, triton, pybind11, cmake, ninja and pytest (matplotlib for the
plot, Lightning Fabric for training): the build uses what is installed (`pip install --no-build-isolation --no-deps`). A
stage that fails is written down with the end of its output and does not stop the ones after it; the exit code then is
1. It is 2, before anything is done, where there is no GPU. Without nvcc the Triton backend alone is tested and
measured.
Writes run.json, tests.txt, sanitizer.txt, latencies.json, loop.json, bench.json, table.md and speedup.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 510.0  # seconds, of the nine minutes
AFTER_BENCHMARK = 60.0  # of them, for what comes after it: it takes what is left
LEFT_OUT = "left out"


@dataclass
class Stage:
    """What became of one stage: commands that run side by side. `limit`: seconds after which they are ended."""

    name: str
    commands: list[list[str]]
    limit: float
    log: str = ""  # file under RESULTS that its output goes to
    environment: dict[str, str] = field(default_factory=dict)
    status: str = "not run"
    seconds: float = 0.0
    tail: str = ""

    @property
    def failed(self) -> bool:
        return self.status != "passed" and not self.status.startswith(LEFT_OUT)


class NoGpu(RuntimeError):
    """There is no NVIDIA GPU to run on; the message is for the user."""


def ask_gpu(what: str) -> str:
    """What nvidia-smi says of the first GPU. Raises NoGpu."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoGpu(f"make gpu needs an NVIDIA GPU, and nvidia-smi does not answer: {error}") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise NoGpu(f"make gpu needs an NVIDIA GPU; nvidia-smi says: {said[0] if said else 'nothing'}")
    return lines[0].strip()


def gpu_name() -> str:
    return re.sub(r"[^a-z0-9]+", "-", ask_gpu("name").lower()).strip("-")


def architecture() -> str:
    number = ask_gpu("compute_cap").replace(".", "")
    return "90a" if number == "90" else number


def find_tool(name: str) -> str:
    """The path of a CUDA tool, or its bare name, so that the stage fails and says which one is missing."""
    homes = [os.environ.get(v) for v in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    search = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return shutil.which(name, path=search) or name


LOOK = """
import sys, torch, triton
print("Python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
assert torch.cuda.is_available(), "PyTorch sees no GPU: every test would be skipped"
print(torch.cuda.get_device_name(), "cuDNN", torch.backends.cudnn.version())
"""


def build() -> list[str]:
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    return [sys.executable, "-m", "pip", "install", "-q", *offline, "-e", str(ROOT)]


def stages(results: Path, arch: str, scratch: Path, *, nvcc: bool = True, shards: int = 8) -> list[Stage]:
    """Everything, in order. `shards`: processes among which the Triton tests, most of whose time is the compiler's
    on one core, are divided. `scratch`: a folder for what is not a result."""
    python = sys.executable
    # Not the addopts of pyproject.toml: they need plug-ins. The traceback of a test that hangs comes after a minute.
    pytest = [python, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-o", "addopts="]
    pytest += ["-o", "faulthandler_timeout=60", "-W", "ignore::pytest.PytestConfigWarning"]
    small = [*pytest, "-x", "tests/gpu/test_cuda.py", "-k", "test_layouts and lengths and resets"]
    sanitizer = [find_tool("compute-sanitizer"), "--error-exitcode", "9", "--target-processes", "all", "--tool"]
    # Each tensor an allocation of its own, so that memcheck knows where it ends; and errors of CUDA calls that torch
    # makes in order to find something out are none of ours.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    memcheck = [*sanitizer, "memcheck", "--report-api-errors", "no", *small]
    program = str(scratch / "latencies")
    compile_latencies = [find_tool("nvcc"), "-std=c++17", "-O2", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    compile_latencies += ["-I", str(ROOT / "csrc/cuda"), str(ROOT / "benchmarks/gpu/latencies.cu"), "-o", program]
    cuda = [[*pytest, "tests/gpu/test_cuda.py"]] if nvcc else []
    triton = [[*pytest, "tests/gpu/test_triton.py", "--shard", f"{i}/{shards}"] for i in range(1, shards + 1)]
    training = [[*pytest, "tests/gpu/test_training.py"]]
    planned = [
        Stage("look", [[python, "-c", LOOK]], 60),
        Stage("build", [build()], 150, environment={"FUSED_RIN_CUDA": "on" if nvcc else "off"}),
        Stage("tests", cuda + triton + training, 120, "tests.txt"),
        Stage("compile latencies", [compile_latencies], 40),
        Stage("latencies", [[program]], 20, "latencies.json"),
        Stage("training loop", [[python, "-m", "benchmarks.loop", str(results / "loop.json"), "--device", "cuda"]], 80),
        Stage("benchmark", [[python, "-m", "benchmarks.gpu.measure", str(results / "bench.json")]], 180),
        Stage("report", [[python, "-m", "benchmarks.gpu.report", str(results / "bench.json")]], 40),
        Stage("memcheck", [memcheck], 75, "sanitizer.txt", alone),
        Stage("racecheck", [[*sanitizer, "racecheck", *small]], 75, "sanitizer.txt"),
    ]
    if importlib.util.find_spec("lightning_fabric") is None:
        next(stage for stage in planned if stage.name == "training loop").status = f"{LEFT_OUT}: no Lightning Fabric"
    if not nvcc:
        for stage in planned:
            if stage.name in ("compile latencies", "latencies", "memcheck", "racecheck"):
                stage.status = f"{LEFT_OUT}: no nvcc, so no CUDA kernels"
    return planned


def run(stage: Stage, results: Path, deadline: float) -> None:
    """Runs a stage within its limit and the time left."""
    if stage.status.startswith(LEFT_OUT):
        return
    left = deadline - time.monotonic()
    limit = min(stage.limit, left)
    commands = [list(command) for command in stage.commands]
    if stage.name == "benchmark":  # it ends by itself, in good order, before its limit
        limit = min(stage.limit, max(20.0, left - AFTER_BENCHMARK))
        commands[0] += ["--seconds", f"{max(10.0, limit - 15):.0f}"]
    if left <= 0:
        stage.status = "no time left"
        return
    print(f"== {stage.name}", flush=True)
    # One thread compiles for torch.compile: the tests are many processes already.
    fixed = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env = {**os.environ, **fixed, "FUSED_RIN_NEEDS_GPU": "1", **stage.environment}
    start = time.monotonic()
    running: list[subprocess.Popen[bytes]] = []
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(i) for i in range(len(commands))]
        for command, output in zip(commands, outputs, strict=True):
            try:
                with output.open("wb") as file:
                    running.append(
                        subprocess.Popen(
                            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file,
                            stderr=subprocess.STDOUT, start_new_session=True,
                        )
                    )  # fmt: skip
            except OSError as error:
                problems.append(f"could not be started: {error}")
        for process in running:
            try:
                code = process.wait(max(0.0, start + limit - time.monotonic()))
                if code:
                    problems.append(f"exit code {code}")
            except subprocess.TimeoutExpired:
                problems.append(f"ended after {limit:.0f} s")
                # With what it has started: a compiler or a test left behind would disturb the stages after it.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = [public(output.read_text(errors="replace")) for output in outputs if output.exists()]
    stage.seconds = round(time.monotonic() - start, 1)
    stage.status = ", ".join(sorted(set(problems))) or "passed"
    # A failure's reason may stand before a page of the tools that passed it on.
    room = (6000 if stage.failed else 2000) // max(1, len(texts))
    stage.tail = "".join(text[-room:] for text in texts)
    if stage.log:
        with (results / stage.log).open("a") as file:
            file.write("".join(text[-200_000:] for text in texts))
    print(f"{stage.tail}\n-- {stage.name}: {stage.status} in {stage.seconds} s", flush=True)


def public(text: str) -> str:
    """Without this machine's paths, which are of no use to a reader of the results."""
    prefixes = [(path, "PYTHON") for path in (sys.prefix, sys.base_prefix) if path not in ("/usr", "/usr/local")]
    for path, name in ((sys.executable, "python"), *prefixes, (str(ROOT), "."), (str(Path.home()), "HOME")):
        text = text.replace(path, name)
    return text


def record(planned: list[Stage], results: Path, scratch: Path) -> None:
    keep = ("name", "commands", "log", "environment", "status", "seconds", "tail")
    text = json.dumps([{k: v for k, v in asdict(stage).items() if k in keep} for stage in planned], indent=1)
    text = text.replace(str(scratch), "SCRATCH").replace(str(results), "RESULTS")
    (results / "run.json").write_text(public(text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path)
    given = parser.parse_args().results
    try:
        results = given or ROOT / "benchmarks" / "results" / gpu_name()
        arch = architecture()
    except NoGpu as error:
        print(error, file=sys.stderr)
        return 2
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    nvcc = shutil.which(find_tool("nvcc")) is not None
    deadline = time.monotonic() + BUDGET
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        shards = min(8, max(1, (os.cpu_count() or 2) // 2))
        planned = stages(results, arch, scratch, nvcc=nvcc, shards=shards)
        for log in {stage.log for stage in planned} - {""}:
            (results / log).unlink(missing_ok=True)
        at = 0
        while at < len(planned):
            stage = planned[at]
            run(stage, results, deadline)
            if (
                stage.name == "build" and stage.failed and nvcc
            ):  # the Triton part can be tested and measured all the same
                planned.insert(at + 1, Stage("build without CUDA", [build()], 120, "", {"FUSED_RIN_CUDA": "off"}))
            record(planned, results, scratch)
            at += 1
    for stage in planned:
        print(f"{stage.status:>20}  {stage.seconds:6.1f} s  {stage.name}")
    return int(any(stage.failed for stage in planned))


if __name__ == "__main__":
    sys.exit(main())
