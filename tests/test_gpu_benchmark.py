"""What of `make gpu` runs without a GPU: its stages, results, table and plot. Timings are made up."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import fused_rin
import pytest
import torch
from fused_rin import settings

from benchmarks.gpu import layers, measure, report, run, stalls, steps
from benchmarks.gpu.cases import BATCHES, DTYPES, HIDDEN, cases, precisions
from benchmarks.harness import MODES, PEER, Case, Measurement, Results
from tests import warm


def made_up() -> Results:
    """The peer takes 8 us everywhere; ours 1, but 16 for B = 256, D = 384; Triton has no time for float32."""
    results = Results({"gpu": "Made-up GPU", "torch": "0"})
    for case in cases():
        slow = (case.batch, case.hidden) == (256, 384)
        results.rows.append(Measurement("cuda", case, 16.0 if slow else 1.0, 0.9, 17.0, 0.5, 2_000_000))
        results.rows.append(Measurement(PEER, case, 8.0, 7.0, 9.0, None, 4_000_000, "no graph: reason"))
        note = "no time left" if case.dtype == "float32" else ""
        results.rows.append(Measurement("triton", case, None if note else 2.0, note=note))
    return results


def test_the_grid_is_the_one_that_was_asked_for():
    grid = list(cases())
    assert len(grid) == len(set(grid)) == len(DTYPES) * len(BATCHES) * len(HIDDEN) * len(MODES) == 180


def test_the_important_cases_come_first():
    important = [measure.important(case) for case in cases()]
    assert important == sorted(important, reverse=True)
    assert sum(important) == 64


def test_a_step_is_a_difference_of_launches(monkeypatch):
    """What a launch costs, here 50 us, is no part of it."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(steps, "elapsed_us", lambda launch: launch())
    step = object.__new__(steps.Step)
    step.run = lambda count: 50 + 0.2 * count
    assert step.seconds(3) == pytest.approx(0.2e-6)
    assert steps.name_of((2, 0, 1, 0, 128, 8, 1, 128, 0, 0)) == "bfloat16 mma 128x8 backward"
    assert steps.name_of((0, 3, 0, 1, 64, 2, 1, 128, 0, 0)) == "float32 units-fma 64x2 forward"
    assert steps.name_of((3, 0, 0, 0, 1024, 8, 16, 256, 0, 0)) == "float16 cluster-mma 1024x8 forward"
    assert steps.name_of((0, 3, 1, 0, 512, 4, 32, 256, 0, 9)) == "float32 grid-fma 512x4/32 backward"


def test_a_full_gpu_has_a_tile_at_every_place():
    assert [steps.places(ctas, 132) for ctas in (1, 8, 16, 32, 64, 128)] == [132, 15, 7, 4, 2, 1]


def test_results_survive_the_file(tmp_path):
    made_up().save(tmp_path / "bench.json")
    assert Results.load(tmp_path / "bench.json") == made_up()


def test_table():
    text = report.table(made_up())
    lines = text.splitlines()
    assert "# Made-up GPU: one layer, T = 512, us per step" in lines
    assert "Slower than torch.nn.RNN at 2 of 180 points." in lines
    assert "| bfloat16 | 128 | 4 | 1 (0.5) | 2 (-) | 8 (-) | 8.0 | 2 / 4 |" in lines
    assert "| float32 | 384 | 256 | 16 (0.5) | - | 8 (-) | **0.50** | 2 / 4 |" in lines
    assert "| bfloat16 | 384 | 256 | 16 (0.5) | 2 (-) | 8 (-) | 4.0 | - / 4 |" in lines  # Triton is the faster of ours
    assert "- triton: no time left" in lines


def test_table_of_nothing():
    assert report.table(Results({}, [Measurement("cuda", Case("float32", 1, 32, "forward"), note="failed")]))


def test_plot(tmp_path):
    report.plot(made_up(), tmp_path / "speedup.png")
    assert (tmp_path / "speedup.png").stat().st_size > 10_000


def stage(*codes: str, limit: float = 30, name: str = "stage") -> run.Stage:
    return run.Stage(name, [[sys.executable, "-c", code] for code in codes], limit, "log.txt")


@pytest.mark.parametrize(
    ("code", "limit", "status", "tail"),
    [
        ("print('fine')", 30, "passed", "fine\n"),
        ("import sys; print('bad', file=sys.stderr); sys.exit(3)", 30, "exit code 3", "bad\n"),
        ("import time; print('slow', flush=True); time.sleep(60)", 3, "ended after 3 s", "slow\n"),
    ],
)
def test_stage(tmp_path, code, limit, status, tail):
    done = stage(code, limit=limit)
    run.run(done, tmp_path, time.monotonic() + 100)
    assert done.status == status
    assert done.tail.startswith(tail)  # what an interrupt makes Python say comes behind it
    assert (tmp_path / "log.txt").read_text() == done.tail


def test_what_a_stage_has_started_ends_with_it(tmp_path):
    """A compiler that a build leaves behind would disturb the benchmark."""
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    done = stage(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", limit=2)
    run.run(done, tmp_path, time.monotonic() + 100)
    assert done.status == "ended after 2 s"
    time.sleep(4)
    assert not mark.exists()


def test_commands_of_a_stage_run_side_by_side_and_one_failure_fails_it(tmp_path):
    wait = "import time; time.sleep(1.5); print({})"
    done = stage(wait.format("'one'"), wait.format("'two'") + "; exit(4)", wait.format("'three'"))
    run.run(done, tmp_path, time.monotonic() + 100)
    assert done.status == "exit code 4"
    assert done.failed
    assert done.tail == "one\ntwo\nthree\n"
    assert done.seconds < 4.5


def test_stage_without_its_tool_or_time(tmp_path):
    missing = run.Stage("sanitizer", [["no-such-tool"]], 10)
    run.run(missing, tmp_path, time.monotonic() + 100)
    assert missing.status.startswith("could not be started")
    late = stage("print()")
    run.run(late, tmp_path, time.monotonic() - 1)
    assert late.status == "no time left"
    assert late.failed


@pytest.mark.parametrize("ours", [signal.SIG_IGN, signal.default_int_handler], ids=["in the background", "in front"])
def test_a_stage_without_time_still_says_what_failed(tmp_path, ours):
    """pytest prints its failures when it is interrupted, not when it is killed."""
    done = stage("import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('1 failed')", limit=5)
    before = signal.signal(signal.SIGINT, ours)
    try:
        run.run(done, tmp_path, time.monotonic() + 100)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.status, done.tail) == ("ended after 5 s", "1 failed\n")


def test_a_stage_that_is_deaf_is_killed(tmp_path):
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60); print('survived')"
    done = stage(f"import signal, time; {deaf}", limit=5)
    run.run(done, tmp_path, time.monotonic() + 100)
    assert (done.status, done.tail) == ("ended after 5 s", "deaf\n")


@pytest.mark.parametrize(("left", "seconds"), [(400, 85), (115, 65), (30, 10)])
def test_the_benchmark_is_told_how_long_it_has(tmp_path, left, seconds):
    """It leaves 35 s to what comes after it, and ends 15 s before it would be ended."""
    done = stage("import sys; print(sys.argv[1:])", limit=100, name="benchmark")
    run.run(done, tmp_path, time.monotonic() + left)
    assert done.tail == f"['--seconds', '{seconds}']\n"


def pretend(monkeypatch, tmp_path, planned: list[run.Stage]) -> list[dict]:
    """main() with other stages; returns what it wrote down, its exit code first."""
    monkeypatch.setattr(run, "ROOT", tmp_path)  # where it may remove a module
    monkeypatch.setattr(run, "architecture", lambda: "90a")
    monkeypatch.setattr(run, "stages", lambda *a, **k: planned)
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "results")])
    code = run.main()
    return [{"exit code": code}, *json.loads((tmp_path / "results" / "run.json").read_text())]


def test_a_run_goes_on_after_a_failure_and_writes_everything_down(tmp_path, monkeypatch, capsys):
    code, *record = pretend(monkeypatch, tmp_path, [stage("exit(1)", name="a"), stage("print(2)", name="b")])
    assert code == {"exit code": 1}
    assert [s["status"] for s in record] == ["exit code 1", "passed"]
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "passed"


def test_without_the_cuda_module_triton_goes_on(tmp_path, monkeypatch):
    """A build that fails is made good by one without CUDA, and remains a failure."""
    show = "import os; print(os.environ['FUSED_RIN_CUDA'])"
    stale = tmp_path / "python" / "fused_rin" / "_cuda.so"  # imported in place of what could not be built
    stale.parent.mkdir(parents=True)
    stale.touch()
    monkeypatch.setattr(run, "find_tool", lambda name: sys.executable)
    monkeypatch.setattr(run, "build", lambda: [sys.executable, "-c", show])
    code, *record = pretend(monkeypatch, tmp_path, [stage("exit(1)", name="build"), stage("print(2)", name="tests")])
    assert code == {"exit code": 1}
    assert [s["name"] for s in record] == ["build", "build without CUDA", "tests"]
    assert record[1]["tail"] == "off\n"
    assert not stale.exists()


def test_latencies_that_do_not_compile_are_no_build_without_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "find_tool", lambda name: sys.executable)
    _, *record = pretend(monkeypatch, tmp_path, [stage("print(1)", "exit(1)", name="build"), stage("1", name="tests")])
    assert [s["status"] for s in record] == ["exit code 1", "passed"]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    for code in ("exit 9", "echo No devices were found >&2; exit 6"):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{code}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "results")])
        assert run.main() == 2
        assert "make gpu needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_real_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(run.shutil, "which", lambda tool, path=None: f"/bin/{tool}")
    first = run.stages(tmp_path, "90a", tmp_path / "scratch")
    assert [s.name for s in first] == [
        "look", "build", "tests", "steps", "stalls", "benchmark", "latencies", "report",
    ]  # fmt: skip
    second = run.stages(tmp_path, "90a", tmp_path / "scratch", part=2, shards=3)
    names = ["look", "build", "tests", "memcheck", "racecheck", "training loop", "layers"]
    assert [s.name for s in second] == names
    # With run.json, steps.json, bench.json, table.md and speedup.png those are eight files; with run-2.json, loop.json
    # and layers.json five.
    assert {s.log for s in first} == {"", "tests.txt", "stalls.txt", "latencies.json"}
    assert {s.log for s in second} == {"", "tests-2.txt", "sanitizer.txt"}
    build = next(s for s in first if s.name == "build")
    assert {"--no-build-isolation", "--no-deps"} <= set(build.commands[0])
    assert "arch=compute_90a,code=sm_90a" in build.commands[1]
    assert [len(next(s for s in part if s.name == "tests").commands) for part in (first, second)] == [5, 4]
    assert not any(s.failed for s in first + second if s.status.startswith(run.LEFT_OUT))
    without = [s for part in (1, 2) for s in run.stages(tmp_path, "90a", tmp_path, part=part, nvcc=False)]
    left_out = {s.name for s in without if s.status == f"{run.LEFT_OUT}: no nvcc, so no CUDA kernels"}
    assert left_out == {"steps", "stalls", "latencies", "memcheck", "racecheck", "layers"}


def test_layers_are_timed_as_they_say(monkeypatch, tmp_path):
    """All of it but the GPU, whose clock says 7 us with layers side by side, and 30 and 9 of other ways."""
    seen = []

    def elapsed(_):
        seen.append(settings.WAVEFRONT)
        return {"on": 7.0, "off": 30.0}[settings.WAVEFRONT]

    def runner(module, mode, batch):
        return lambda: seen.append((type(module).__name__, mode, batch, settings.WAVEFRONT))

    monkeypatch.setattr(settings, "WAVEFRONT", "")
    monkeypatch.setattr(layers, "elapsed_us", elapsed)
    monkeypatch.setattr(layers, "runner", runner)
    monkeypatch.setattr(layers, "graphed", lambda run: run)
    monkeypatch.setattr(layers.wavefront, "plan_of", lambda *_: layers.wavefront.Wave(128, None, 1.7))
    monkeypatch.setattr(layers, "RIN", lambda *a, **k: fused_rin.RIN(8, 8, 2))
    monkeypatch.setattr(torch.nn, "RNN", lambda *a, rnn=torch.nn.RNN, **k: rnn(8, 8, 2))
    rows = list(layers.time_case(2, 128, 8, "forward"))
    assert [(row["way"], row["us"], row["us_graph"]) for row in rows] == [
        ("side by side", 7.0, 7.0), ("in turn", 30.0, 30.0), (PEER, 30.0, 30.0),
    ]  # fmt: skip
    assert [row.get("span") for row in rows] == [128, None, None]
    replayed = [call for call in seen if isinstance(call, tuple)]
    assert replayed == [("RIN", "forward", 8, "on"), ("RIN", "forward", 8, "off"), ("RNN", "forward", 8, "off")]


def test_all_of_a_part_with_fakes(tmp_path, monkeypatch):
    """A dry run: every stage of both parts, each of whose commands is replaced by one that writes what it would."""
    real = run.stages

    def fakes(results, *rest, **options):
        planned = real(results, *rest, **options)
        for each in planned:
            each.status = "not run"
            written = [a for c in each.commands for a in c if a.startswith(str(results)) and a.endswith(".json")]
            code = f"import sys, pathlib; print({each.name!r}); [pathlib.Path(p).touch() for p in {written}]"
            each.commands = [[sys.executable, "-c", code] for _ in each.commands]
        return planned

    monkeypatch.setattr(run, "architecture", lambda: "90a")
    monkeypatch.setattr(run, "stages", fakes)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for part in ("1", "2"):
        monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "results"), "--part", part])
        assert run.main() == 0
    written = {path.name for path in (tmp_path / "results").iterdir()}
    # The report makes its own two of bench.json.
    first = {"run.json", "tests.txt", "steps.json", "stalls.txt", "bench.json", "latencies.json"}
    assert written == first | {"run-2.json", "tests-2.txt", "sanitizer.txt", "loop.json", "layers.json"}


NCU = """==PROF== Disconnected
"Address","Source","# Samples","Instructions Executed","stall_wait","stall_short_sb","stall_wait (Not Issued)"
"0x10","MOV R1, c[0x0]","5","4","5","0","5"
"0x20","LDS.128 R4, [R2]","20","400","20","0","9"
"0x30","HMMA.16816 R8","75","400","15","60","9"
"""


def test_stalls_are_read_from_the_profilers_table():
    rows = list(csv.reader(NCU.splitlines()))
    whole, load, product = stalls.lines(rows)
    assert whole == "100 samples: short_sb 60.0%, wait 40.0%"
    assert load.split() == ["LDS.128", "R4,", "[R2]", "20.0%", "wait", "20.0%"]
    assert product.split() == ["HMMA.16816", "R8", "75.0%", "short_sb", "60.0%"]
    assert stalls.lines([["==PROF== no kernels were profiled"]]) == []


def test_float32_is_measured_both_ways():
    """cuDNN runs float32 in TF32 unless told otherwise: against ours in float32 that would be no comparison."""
    case = Case("float32", 1, 64, "forward")
    assert precisions(["cuda", PEER], case) == ["cuda", PEER, "cuda tf32", PEER + " tf32"]
    assert precisions(["cuda", PEER], Case("bfloat16", 1, 64, "forward")) == ["cuda", PEER]
    times = {"cuda": 2.0, PEER: 4.0, "cuda tf32": 1.0, PEER + " tf32": 3.0}
    lines = report.table(Results({}, [Measurement(name, case, us) for name, us in times.items()])).splitlines()
    assert "| float32 | 64 | 1 | 2 (-) | - | 4 (-) | 2.0 | - / - |" in lines
    assert "| float32 tf32 | 64 | 1 | 1 (-) | - | 3 (-) | 3.0 | - / - |" in lines


def test_the_sanitizer_is_given_tests_that_exist(tmp_path):
    """Its tests are chosen by their names: a renaming would leave it with none."""
    memcheck = next(s for s in run.stages(tmp_path, "90a", tmp_path, part=2) if s.name == "memcheck")
    command = memcheck.commands[0][memcheck.commands[0].index(sys.executable) + 1 :]
    listed = subprocess.run([*warm.PYTHON, *command, "--collect-only"], cwd=run.ROOT, capture_output=True, text=True)
    assert re.search(r"^12/\d+ tests collected", listed.stdout, re.MULTILINE), listed.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_torch_does_not_see_is_no_page_of_skipped_tests(tmp_path):
    tests = next(s for s in run.stages(tmp_path, "90a", tmp_path, shards=1) if s.name == "tests")
    assert all(command[0] == sys.executable for command in tests.commands)
    tests.commands = [[*warm.PYTHON, *command[1:]] for command in tests.commands]
    run.run(tests, tmp_path, time.monotonic() + 300)
    assert tests.status == "exit code 3"
    assert "PyTorch sees no GPU" in tests.tail


def test_results_name_no_paths_of_the_machine(tmp_path):
    done = stage(f"import sys; print(sys.executable, sys.prefix + '/lib', {str(run.ROOT)!r} + '/csrc')")
    run.run(done, tmp_path, time.monotonic() + 100)
    assert done.tail == "python PYTHON/lib ./csrc\n"
    run.record([done], tmp_path, tmp_path / "scratch")
    assert str(run.ROOT) not in (tmp_path / "run.json").read_text()


def test_shards_of_the_gpu_tests_are_all_of_them():
    def collected(*options: str) -> list[str]:
        command = [*warm.PYTHON, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only", "tests/gpu/test_triton.py"]
        listed = subprocess.run([*command, *options], cwd=run.ROOT, capture_output=True, text=True)
        assert listed.returncode == 0, listed.stdout
        return [line for line in listed.stdout.splitlines() if "::" in line]

    parts = [collected("--shard", f"{i}/2") for i in (1, 2)]
    assert sorted(test for part in parts for test in part) == sorted(collected())
    assert min(map(len, parts)) > 30


FAKE_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    print("a library says hello", flush=True)
    rows = []
    for name in job["implementations"]:
        print(json.dumps({"at": name}), flush=True)
        size = job["case"]["hidden"]
        if name == "cuda" and size == 64:
            os.abort()
        if name == "cuda" and size == 100:
            print(json.dumps({"lost": "an illegal memory access"}), flush=True)
            sys.exit(3)
        if name == "cuda" and size == 128:
            time.sleep(60)
        rows.append({"implementation": name, "case": job["case"], "us": 1.0})
    print(json.dumps({"rows": rows}), flush=True)
"""


def test_the_benchmark_outlives_the_processes_that_measure(tmp_path, monkeypatch):
    """One that crashes, one that loses its context, one that hangs: each costs its own point alone; and what has
    lost three of them is left out."""
    monkeypatch.setattr(measure, "PATIENCE", 2.0)
    results = Results({})
    jobs = [(["cuda", PEER], Case("bfloat16", 1, hidden, "forward")) for hidden in (32, 64, 100, 128, 256)]
    measure.supervise(
        jobs, results, tmp_path / "bench.json", time.monotonic() + 60, [sys.executable, "-c", FAKE_WORKER]
    )
    assert Results.load(tmp_path / "bench.json") == results
    found = {(row.implementation, row.case.hidden): row for row in results.rows}
    assert len(found) == len(results.rows) == 10
    assert all(found[PEER, hidden].us == 1.0 for hidden in (32, 64, 100, 128, 256))
    assert found["cuda", 32].us == 1.0
    assert found["cuda", 64].note == "process lost: the process ended with exit code -6"
    assert found["cuda", 100].note == "process lost: an illegal memory access"
    assert found["cuda", 128].note == "process lost: no answer within 2 s"
    assert found["cuda", 256].note == "left out: 3 processes were lost"
    assert measure.complaints(results) == {"cuda": "3 processes lost"}


def test_no_time_is_no_complaint_but_nothing_measured_is(tmp_path):
    results = Results({})
    case = Case("bfloat16", 1, 32, "forward")
    measure.supervise([(["cuda"], case)], results, tmp_path / "bench.json", time.monotonic() - 1, ["no-such-tool"])
    assert [row.note for row in results.rows] == ["no time left"]
    assert measure.complaints(results) == {}
    results.rows.append(Measurement("triton", case, note="NoPlan: too wide"))
    assert measure.complaints(results) == {"triton": "nothing measured (NoPlan: too wide)"}
