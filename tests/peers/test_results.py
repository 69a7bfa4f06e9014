"""From a run to its file, table and pictures; what a comparison of two files finds; the command."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from fused_rin.experiments import cli

from benchmarks.harness import PEER, Case, Measurement, Results
from benchmarks.peers import compare, report, run
from benchmarks.peers.cases import label
from benchmarks.peers.registry import OURS, PEERS
from tests import warm

ROOT = Path(__file__).parents[2]
SAMPLE = Path(__file__).with_name("sample.json")  # rows of a real run
JAX = "JAX lax.scan"


def command(capsys, *arguments):
    """(exit code, what was printed)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *map(str, arguments)])
    text = capsys.readouterr()
    return ended.value.code, text.out + text.err


def measured(scale: float = 1.0, *, scatter: float = 0.02, noise: float = 0.0, seed: int = 0) -> Results:
    """Twelve shapes of ours and two peers, times of `scale`, medians off by up to `noise`."""
    draw = random.Random(seed)
    rows = []
    for i, name in enumerate((OURS, PEER, JAX)):
        for j in range(12):
            case = Case("float32", 1, 64 * (j + 1), "forward", 100, input_size=64, threads=1)
            us = (1 + i + j) * scale * (1 + draw.uniform(-noise, noise))
            rows.append(
                Measurement(name, case, us=us, us_low=us * (1 - scatter / 2), us_high=us * (1 + scatter / 2), rounds=9)
            )
    machine = {"cpu": "x", "torch": "2", "peers": {name: {"it": "1"} for name in (OURS, PEER, JAX)}}
    return Results(machine, rows)


def changed(results: Results, number: int, factor: float) -> Results:
    results = copy.deepcopy(results)
    row = [row for row in results.rows if row.implementation == OURS][number]
    row.us, row.us_low, row.us_high = (value * factor for value in (row.us, row.us_low, row.us_high))
    return results


def test_a_slowdown_by_half_is_found_and_noise_is_not():
    old, new = measured(scatter=0.2, seed=1), measured(scatter=0.2, noise=0.08, seed=2)
    assert compare.slower(old, new, OURS) == []
    (found,) = compare.slower(old, changed(new, 7, 1.5), OURS)
    assert found.case.hidden == 64 * 8
    assert 1.35 < found.ratio < 1.65
    assert "1.28x" in str(found)  # the noise that is granted: both ranges, 0.2 each
    # A quiet machine: 8 percent is noise above, and is found here.
    (found,) = compare.slower(measured(), changed(measured(), 3, 1.08), OURS)
    assert found.ratio == pytest.approx(1.08)
    assert compare.slower(measured(), changed(measured(), 3, 1.04), OURS) == []


def test_a_slower_machine_is_not_a_slower_kernel_and_hides_none():
    old, new = measured(), measured(1.3)
    assert compare.drift(old, new, OURS) == pytest.approx(1.3)
    assert compare.slower(old, new, OURS) == []
    (found,) = compare.slower(old, changed(new, 2, 1.5), OURS)
    assert found.ratio == pytest.approx(1.5)
    # A faster machine does not hide a kernel that is slower by as much.
    (found,) = compare.slower(old, changed(measured(1 / 1.5), 2, 1.5), OURS)
    assert found.ratio == pytest.approx(1.5)


def test_another_release_of_a_peer_is_no_control():
    old, new = measured(), measured(1.3)
    new.machine["peers"][PEER] = new.machine["peers"][JAX] = {"it": "2"}
    assert compare.drift(old, new, OURS) == 1
    assert len(compare.slower(old, new, OURS)) == 12


def test_what_had_no_processor_of_its_own_is_not_judged(tmp_path, capsys):
    new = changed(changed(measured(), 4, 3.0), 6, 1.5)
    mine = [row for row in new.rows if row.implementation == OURS]
    mine[4].cores, mine[6].cores = 0.4, 0.99
    (found,) = compare.slower(measured(), new, OURS)
    assert found.case == mine[6].case
    measured().save(tmp_path / "old.json")
    for row in mine:
        row.cores = 0.5
    new.save(tmp_path / "new.json")
    code, text = command(capsys, "--compare", tmp_path / "old.json", tmp_path / "new.json")
    assert code == 1
    assert "12 rows shared their processor with others" in text
    assert "no case of fused-rin can be compared" in text


def test_a_row_that_does_not_run_any_more_is_found():
    new = measured()
    new.rows[4].us, new.rows[4].note = None, "NotEqual: output: 1e-2"
    (found,) = compare.slower(measured(), new, OURS)
    assert "now none" in str(found)
    del new.rows[4]  # not asked for
    assert compare.slower(measured(), new, OURS) == []


def test_compare_on_the_command_line(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    measured().save(old)
    changed(measured(), 5, 1.5).save(new)
    assert command(capsys, "--compare", old, old)[0] == 0
    code, text = command(capsys, "--compare", old, new)
    assert code == 1
    assert "12 rows: 1 slower, 0 faster" in text
    assert "forward-B1-T100-D384-I64-float32, 1 thread(s), fused-rin: 6.00 -> 9.00 us a step, 1.50x" in text
    assert "12 rows: 0 slower, 1 faster" in command(capsys, "--compare", new, old)[1]
    other = measured()
    other.machine["cpu"] = "y"
    other.save(new)
    assert "not the same machine: cpu x, then y" in command(capsys, "--compare", old, new)[1]
    new.write_text("{}")
    code, text = command(capsys, "--compare", old, new)
    assert code == 2
    assert "new.json: not a file of results" in text


def test_results_of_bench_cpu_can_be_compared(capsys):
    path = ROOT / "benchmarks" / "results" / "cpu.json"
    code, text = command(capsys, "--compare", path, path)
    assert (code, "0 slower" in text) == (0, True)


# ---- the table ----


def test_the_table_says_who_is_fastest_and_who_is_missing():
    results = measured()
    results.machine |= {
        "instruction_sets": ["avx2"], "caches": {"L1": "32K"}, "missing": {"OpenVINO": "openvino not installed"},
        "settings": dict.fromkeys((OURS, PEER, JAX), "a setting"), "roofline": {},
        "load": [{"others": 0.5}, {"others": 0.01}, {}],
    }  # fmt: skip
    results.rows[0].cores, results.rows[12].cores = 0.91, 0.5
    results.rows[1].us = 5.0  # ours at D = 128: slower than nn.RNN's 3
    results.rows[-1] = dataclasses.replace(results.rows[-1], us=None, note=run.REFUSED + "too long")
    results.rows[-2] = dataclasses.replace(results.rows[-2], us=None, note="NotEqual: output: 1e-2")
    text = report.table(results)
    assert "| B1-T100-D64-I64-float32 | **1** | 2? | 3 | 2.00 | - |" in text
    assert "| B1-T100-D128-I64-float32 | 5 | **3** | 4 | 0.60 | - |" in text
    assert "| B1-T100-D768-I64-float32 | **12** | 13 | - | 1.08 | - |" in text
    assert "A question mark: others had the processor" in text
    assert "- OpenVINO: openvino not installed." in text
    assert "- JAX lax.scan, 1 rows: not run: too long." in text
    assert "- JAX lax.scan, forward-B1-T100-D704-I64-float32, 1 thread(s): NotEqual: output: 1e-2" in text
    assert "used 0.01 to 0.50 processors while a block ran: not a quiet run" in text
    assert [row.note for row in run.failures(results.rows)] == ["NotEqual: output: 1e-2"]


def test_table_and_pictures_of_the_sample(tmp_path, capsys):
    path = tmp_path / "peers.json"
    path.write_bytes(SAMPLE.read_bytes())
    code, text = command(capsys, "--draw", path)
    names = ["peers.md", "peers-ratio.png", "peers-roofline.png"]
    assert (code, text.split()) == (0, [str(tmp_path / name) for name in names])
    for name in names[1:]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "peers.md").read_text()
    results = Results.load(SAMPLE)
    timed = [row for row in results.rows if row.us]
    for row in timed:
        assert f"| {label(row.case).removeprefix(row.case.mode + '-')} |" in table
    for case, row in results.by_case().items():
        others = [m.us for name, m in row.items() if name != OURS and m.us]
        assert report.ratio(row) == pytest.approx(min(others) / row[OURS].us), case
    assert {row.implementation for row in results.rows} == set(PEERS)
    assert all(row.distance is not None and row.rounds for row in timed)


# ---- the command ----


def test_the_list(capsys):
    code, text = command(capsys, "--list")
    assert code == 0
    for name in PEERS:
        assert name in text
    for part in ("shapes:", "modes:", "calls:", "  training-B16-T128-D128-I128-float32-tanh"):
        assert part in text
    code, text = command(capsys, "--list", "--only", "*-B1-T512-*", "--peers", f"{OURS}, {PEER}")
    assert text.count("B1-T512") == text.count("-B") == 6
    assert "oneDNN" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "cuDNN"), "--peers: unknown 'cuDNN'; known: fused-rin, torch.nn.RNN"),
        (("--threads", "0"), "--threads must be numbers above 0 with commas between, got '0'"),
        (("--threads", "two"), "--threads must be numbers above 0 with commas between, got 'two'"),
        (("--only", "B9"), "--only: no case is like 'B9'"),
        (("--draw", "none.json"), "none.json: not a file of results"),
    ],
)
def test_what_cannot_be_run_is_said(capsys, arguments, message):
    code, text = command(capsys, *arguments)
    assert code == 2
    assert message in text
    assert text.count("\n") == 1


def test_without_a_checkout_the_command_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "a" / "b" / "c" / "cli.py"))
    code, text = command(capsys, "--list")
    assert code == 2
    assert "bench needs the folder benchmarks, which is in a checkout" in text


def test_a_run_reaches_file_and_table(tmp_path):
    """Ours and one that is not there, in a process of its own, with pytest-benchmark's clock."""
    out = tmp_path / "sub" / "peers.json"
    script = "from benchmarks.peers.registry import PEERS\nPEERS['OpenVINO'].modules = ('no_such_module',)\n"
    script += "from fused_rin.experiments.cli import main\nmain()"
    arguments = ["bench", "--quick", "--threads", "1", "--only", "*-B1-T1-*-float32-state", "--out", out]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    done = subprocess.run(
        [*warm.PYTHON, "-c", script, *arguments, "--peers", f"{OURS},OpenVINO"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.load(out)
    assert results.machine["missing"] == {"OpenVINO": "no_such_module not installed"}
    assert "missing: OpenVINO: no_such_module not installed" in done.stdout
    assert [(row.implementation, row.case.mode) for row in results.rows] == [
        (OURS, mode) for mode in ("forward", "training")
    ]
    for row in results.rows:
        assert 0 < row.us_low <= row.us <= row.us_high
        assert row.rounds >= 5
        assert row.distance < 1e-5
        assert row.cores > 0
    assert {"cpu", "instruction_sets", "caches", "processors", "torch", "peers"} <= results.machine.keys()
    assert [entry["peer"] for entry in results.machine["load"]] == [OURS]
    assert out.with_suffix(".md").read_text() == report.table(results)
    assert not list(out.parent.glob("*.png"))  # no shape was among them
    assert str(ROOT) not in json.dumps(results.machine)


def test_a_process_that_dies_leaves_a_reason(monkeypatch):
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    case = Case("float32", 1, 64, "forward", 1, input_size=64, threads=1)
    (row,), load = run.block(PEER, 1, [case])
    assert row.us is None
    assert row.note.startswith("its process ended with 1 before")
    assert run.failures([row]) == [row]
    assert "load_1min" in load


def test_of_several_passes_the_fastest_row_counts_and_a_failure_stays():
    first, second = measured(noise=0.3, seed=1), measured(noise=0.3, seed=2)
    second.rows.reverse()
    rows = run.best(first.rows + second.rows)
    assert len(rows) == len(first.rows)
    others = {(row.implementation, row.case): row.us for row in second.rows}
    for row, before in zip(rows, first.rows, strict=True):
        assert row.us == min(before.us, others[row.implementation, row.case])
    failed = dataclasses.replace(first.rows[3], us=None, note="not equal")
    for pair in ([failed, first.rows[3]], [first.rows[3], failed]):
        assert run.failures(run.best(pair)) == [failed]
