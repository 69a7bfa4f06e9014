"""What of `make gpu` runs without a GPU: its stages, results, table and plot. Timings are made up."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks.gpu import report, run
from benchmarks.gpu.cases import BATCHES, DTYPES, HIDDEN, MODES, PEER, Case, Measurement, Results, cases


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


def stage(code: str, limit: float = 30, name: str = "stage") -> run.Stage:
    return run.Stage(name, [sys.executable, "-c", code], limit, "log.txt")


@pytest.mark.parametrize(
    ("code", "limit", "status", "tail"),
    [
        ("print('fine')", 30, "passed", "fine\n"),
        ("import sys; print('bad', file=sys.stderr); sys.exit(3)", 30, "exit code 3", "bad\n"),
        ("import time; print('slow', flush=True); time.sleep(60)", 1.5, "ended after 2 s", "slow\n"),
    ],
)
def test_stage(tmp_path, code, limit, status, tail):
    done = stage(code, limit)
    run.run(done, tmp_path, time.monotonic() + 100)
    assert (done.status, done.tail) == (status, tail)
    assert (tmp_path / "log.txt").read_text() == tail


def test_stage_without_its_tool_or_time(tmp_path):
    missing = run.Stage("sanitizer", ["no-such-tool"], 10)
    run.run(missing, tmp_path, time.monotonic() + 100)
    assert missing.status.startswith("could not be started")
    late = stage("print()")
    run.run(late, tmp_path, time.monotonic() - 1)
    assert late.status == "no time left"


def test_the_benchmark_is_told_how_long_it_has(tmp_path):
    done = stage("import sys; print(sys.argv[1:])", 100, "benchmark")
    run.run(done, tmp_path, time.monotonic() + 60)
    assert done.tail.startswith("['--seconds', '2")  # 60 s, less 30 for the report, less what has passed


def test_a_run_goes_on_after_a_failure_and_writes_everything_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "architecture", lambda: "90a")
    monkeypatch.setattr(run, "stages", lambda results, arch: [stage("exit(1)", name="a"), stage("print(2)", name="b")])
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "results")])
    assert run.main() == 1
    record = json.loads((tmp_path / "results" / "run.json").read_text())
    assert [s["status"] for s in record] == ["exit code 1", "passed"]
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "passed"


def test_the_real_stages(tmp_path):
    planned = run.stages(tmp_path, "90a")
    assert next(s.name for s in planned) == "build"
    assert {s.log for s in planned} == {"", "tests.txt", "sanitizer.txt", "latencies.json"}
    assert "arch=compute_90a,code=sm_90a" in next(s for s in planned if s.name == "compile latencies").command
    assert "--no-build-isolation" in planned[0].command
    assert "--no-deps" in planned[0].command


SASS = """
	.section	.text._Z4stepv,"ax",@progbits
        /*0000*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_0:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   LDS.128 R4, [R2] ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   LDG.E R8, desc[UR4][R6.64] ;
        /*0050*/                   IADD3 R8, R8, 0x1, RZ ;
.L_x_1:
        /*0060*/                   HMMA.16816.F32.BF16 R12, R16, R4, RZ ;
        /*0070*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0080*/                   HMMA.16816.F32.BF16 R12, R20, R6, R12 ;
        /*0090*/               @P1 EXIT ;
        /*00a0*/                   STS [R3], R12 ;
        /*00b0*/                   BRA `(.L_x_0) ;
	.section	.nv.info,"",@"SHT_CUDA_INFO"
        /*0000*/                   .word 0
"""


def test_a_step_is_counted_along_the_shortest_way_around_the_loop():
    from benchmarks.gpu import predict

    code = predict.functions(SASS)
    assert set(code) == {"_Z4stepv"}
    step = predict.shortest_step(code["_Z4stepv"])
    assert [line.split()[0] for line in step] == [
        "LDS.128", "@!P0", "HMMA.16816.F32.BF16", "IADD3", "HMMA.16816.F32.BF16", "@P1", "STS", "BRA",
        "BAR.SYNC.DEFER_BLOCKING",
    ]  # fmt: skip
    counted = predict.count(step)
    assert counted == predict.Step(before=2, products=2, between=1, after=4, loads=1, kind="HMMA")
    kernel = predict.cuda_plan.Kernel("mma", 64, 8, 4, 4)
    # 30 for the barrier, 33 for the load, two dependent mma of 24, 24 again for the last one's result, 4 to issue.
    chain = 2 / 1 / 2 * 24
    shared = 4 * 8 / 2 * (64 * 2 / 64)
    assert predict.cycles(counted, kernel, (9, 0)) == 30 + 33 + max(chain, shared) + 24 + 4
