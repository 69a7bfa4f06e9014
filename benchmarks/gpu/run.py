"""All of `make gpu`, in two parts of at most five minutes each; what is needed most comes first.

    python -m benchmarks.gpu.run [RESULTS] [--part 2]     RESULTS: a folder; benchmarks/results/<gpu>/ if not given

Part 1: build, CUDA tests and a few of Triton's, a step of every kernel, where two of them stall, benchmark, latencies,
table and plot. Part 2: all Triton tests, training, compute-sanitizer, layers side by side; it builds only what part 1
did not.

Needs no network and, beside CUDA, a Python with torch, triton, pybind11, cmake, ninja and pytest (matplotlib for the
plot, Lightning Fabric for training): the build uses what is installed (`pip install --no-build-isolation --no-deps`). A
stage that fails is written down with the end of its output and does not stop the ones after it; the exit code then is
1. It is 2, before anything is done, where there is no GPU. Without nvcc the Triton backend alone is tested and
measured.
Part 1 writes run.json, tests.txt, steps.json, stalls.txt, bench.json, latencies.json, table.md and speedup.png; part 2
run-2.json, tests-2.txt, loop.json, sanitizer.txt and layers.json.
"""

from __future__ import annotations

import argparse
import contextlib
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

from benchmarks.gpu import cubins

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 285.0  # seconds, of the five minutes of a part
AFTER_BENCHMARK = 35.0  # of them, for what comes after it: it takes what is left
INTERRUPT = 4.0  # seconds between a stage's SIGINT, after which pytest still prints its failures, and SIGKILL
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
    first_failed: bool = False  # the first of its commands

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
    try:
        return cubins.find_tool(name)
    except FileNotFoundError:
        return name


LOOK = """
import sys, torch, triton
print("Python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
assert torch.cuda.is_available(), "PyTorch sees no GPU: every test would be skipped"
print(torch.cuda.get_device_name(), "cuDNN", torch.backends.cudnn.version())
"""


def build() -> list[str]:
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    return [sys.executable, "-m", "pip", "install", "-q", *offline, "-e", str(ROOT)]


def without_modules() -> None:
    """Removes CUDA modules of an earlier build, which a build without CUDA would leave in place."""
    for name in ("_cuda*.so", "libfused_rin_operators_cuda.so"):
        for module in (ROOT / "python" / "fused_rin").glob(name):
            module.unlink()


def stages(
    results: Path, arch: str, scratch: Path, *, part: int = 1, nvcc: bool = True, shards: int = 8
) -> list[Stage]:
    """A part's, in order. `shards`: processes among which the Triton tests, most of whose time is the compiler's
    on one core, are divided. `scratch`: a folder for what is not a result."""
    python = sys.executable
    # Not the addopts of pyproject.toml: they need plug-ins. The traceback of a test that hangs comes after a minute.
    pytest = [python, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-o", "addopts="]
    pytest += ["-o", "faulthandler_timeout=60", "-W", "ignore::pytest.PytestConfigWarning"]
    # Beside the layouts, a kernel that has a part of U in shared memory.
    small = [*pytest, "-x", "tests/gpu/test_cuda.py", "-k", "(test_layouts and lengths and resets) or mma-384x8"]
    sanitizer = [find_tool("compute-sanitizer"), "--error-exitcode", "9", "--target-processes", "all", "--tool"]
    # Each tensor an allocation of its own, so that memcheck knows where it ends; and errors of CUDA calls that torch
    # makes in order to find something out are none of ours.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    memcheck = [*sanitizer, "memcheck", "--report-api-errors", "no", *small]
    program = str(scratch / "latencies")
    compile_latencies = [find_tool("nvcc"), "-std=c++17", "-O2", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    compile_latencies += ["-I", str(ROOT / "csrc/cuda"), str(ROOT / "benchmarks/gpu/latencies.cu"), "-o", program]
    of_cuda = ["tests/gpu/test_cuda.py", "tests/gpu/test_wavefront.py"]
    cuda = [[*pytest, *of_cuda, "--shard", f"{i}/4"] for i in range(1, 5)] if nvcc else []
    smoke = [[*pytest, "tests/gpu/test_triton.py", "-k", "test_sizes and 257 and (64 or 512)"]]
    triton = [[*pytest, "tests/gpu/test_triton.py", "--shard", f"{i}/{shards}"] for i in range(1, shards + 1)]
    training = [[*pytest, "tests/gpu/test_training.py"]]
    # Kept, so that the second part and a second try build only what has changed.
    building = {"FUSED_RIN_CUDA": "on" if nvcc else "off", "FUSED_RIN_BUILD_DIR": str(ROOT / "build" / "gpu")}
    measure = [python, "-m", "benchmarks.gpu.measure", str(results / "bench.json")]
    stalls = [python, "-m", "benchmarks.gpu.stalls", "bfloat16 mma 128x8 forward"]
    stalls += ["bfloat16 cluster-mma 512x8 forward", "float32 fma 128x1 forward"]
    look = Stage("look", [[python, "-c", LOOK]], 60)
    if part == 1:
        planned = [
            look,
            Stage("build", [build(), *([compile_latencies] if nvcc else [])], 130, environment=building),
            Stage("tests", cuda + smoke, 60, "tests.txt"),
            Stage("steps", [[python, "-m", "benchmarks.gpu.steps", str(results / "steps.json")]], 40),
            Stage("stalls", [stalls], 30, "stalls.txt"),
            Stage("benchmark", [measure], 130),
            Stage("latencies", [[program]], 20, "latencies.json"),
            Stage("report", [[python, "-m", "benchmarks.gpu.report", str(results / "bench.json")]], 15),
        ]
    else:
        loop = [python, "-m", "benchmarks.loop", str(results / "loop.json"), "--device", "cuda"]
        planned = [
            look,
            Stage("build", [build()], 130, environment=building),
            Stage("tests", triton + training, 120, "tests-2.txt"),
            Stage("memcheck", [memcheck], 60, "sanitizer.txt", alone),
            Stage("racecheck", [[*sanitizer, "racecheck", *small]], 60, "sanitizer.txt"),
            Stage("training loop", [loop], 60),
            Stage("layers", [[python, "-m", "benchmarks.gpu.layers", str(results / "layers.json")]], 55),
        ]
        if importlib.util.find_spec("lightning_fabric") is None:
            planned[-2].status = f"{LEFT_OUT}: no Lightning Fabric"
    for stage in planned:
        if not nvcc and stage.name in ("steps", "stalls", "latencies", "memcheck", "racecheck", "layers"):
            stage.status = f"{LEFT_OUT}: no nvcc, so no CUDA kernels"
        if stage.name == "stalls" and shutil.which(find_tool("ncu")) is None:
            stage.status = f"{LEFT_OUT}: no ncu"
    return planned


def interruptible() -> None:
    """In a stage's process: a shell starts what runs in the background deaf to SIGINT, and that is handed on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen[bytes]) -> None:
    """With what it has started: a compiler or a test left behind would disturb the stages after it."""
    for way, patience in ((signal.SIGINT, INTERRUPT), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, way)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


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
                            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=interruptible,
                        )
                    )  # fmt: skip
            except OSError as error:
                problems.append(f"could not be started: {error}")
                stage.first_failed |= not running
        for process in running:
            try:
                code = process.wait(max(0.0, start + limit - time.monotonic()))
                if code:
                    problems.append(f"exit code {code}")
                    stage.first_failed |= process is running[0]
            except subprocess.TimeoutExpired:
                problems.append(f"ended after {limit:.0f} s")
                stage.first_failed |= process is running[0]
                end(process)
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


def record(planned: list[Stage], results: Path, scratch: Path, file: str = "run.json") -> None:
    keep = ("name", "commands", "log", "environment", "status", "seconds", "tail")
    text = json.dumps([{k: v for k, v in asdict(stage).items() if k in keep} for stage in planned], indent=1)
    text = text.replace(str(scratch), "SCRATCH").replace(str(results), "RESULTS")
    (results / file).write_text(public(text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--part", type=int, choices=(1, 2), default=1)
    arguments = parser.parse_args()
    try:
        results = arguments.results or ROOT / "benchmarks" / "results" / gpu_name()
        arch = architecture()
    except NoGpu as error:
        print(error, file=sys.stderr)
        return 2
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    nvcc = shutil.which(find_tool("nvcc")) is not None
    if not nvcc:
        without_modules()
    deadline = time.monotonic() + BUDGET
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        shards = min(8, max(1, (os.cpu_count() or 2) // 2))
        planned = stages(results, arch, scratch, part=arguments.part, nvcc=nvcc, shards=shards)
        for log in {stage.log for stage in planned} - {""}:
            (results / log).unlink(missing_ok=True)
        at = 0
        while at < len(planned):
            stage = planned[at]
            run(stage, results, deadline)
            if stage.name == "build" and stage.first_failed and nvcc:
                # The Triton part can be tested and measured all the same.
                without_modules()
                planned.insert(at + 1, Stage("build without CUDA", [build()], 120, "", {"FUSED_RIN_CUDA": "off"}))
            record(planned, results, scratch, "run.json" if arguments.part == 1 else "run-2.json")
            at += 1
    for stage in planned:
        print(f"{stage.status:>20}  {stage.seconds:6.1f} s  {stage.name}")
    return int(any(stage.failed for stage in planned))


if __name__ == "__main__":
    sys.exit(main())
