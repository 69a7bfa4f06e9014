"""The CPU benchmark from a measured point to the results file: `make bench-cpu` in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import crowd, table
from benchmarks.cpu import OURS, calls, layers
from benchmarks.harness import PEER, Case, Measurement, Results, measurement
from tests import warm

ROOT = Path(__file__).parent.parent
CASES = [
    Case("float32", 1, 64, "forward", threads=1),
    Case("float32", 1, 64, "forward", 1, state=True, start="rnn", threads=1),
    Case("float32", 1, 128, "training", 1, module="RINCell", state=True, start="rnn", threads=1),
]


def test_cases_reach_results_and_table(tmp_path):
    raw, out = tmp_path / "raw.json", tmp_path / "cpu.json"
    # Within a worker of pytest-xdist, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    tests = [f"benchmarks/test_cpu.py::test_case[{case}-{name}]" for case in CASES for name in (OURS, PEER)]
    subprocess.run(
        [*warm.PYTHON, "-m", "pytest", *tests, "-q", "--benchmark-enable", "--benchmark-max-time=0.1",
         f"--benchmark-json={raw}"],
        cwd=ROOT, check=True, capture_output=True, env=environment,
    )  # fmt: skip
    table.main(str(raw), str(out))
    results = Results.load(out)
    assert list(results.by_case()) == CASES
    for row in results.rows:
        assert 0 < row.us_low <= row.us <= row.us_high
        assert (row.zero_states is None) == (row.case.mode == "training")
    # What was timed is what pytest-benchmark has timed.
    medians = [entry["stats"]["median"] for entry in json.loads(raw.read_text())["benchmarks"]]
    timed = [median * 1e6 / row.case.steps for median, row in zip(medians, results.rows, strict=True)]
    assert [row.us for row in results.rows] == pytest.approx(timed)
    text = out.with_suffix(".md").read_text()
    assert text == table.page(results)
    (ours, theirs) = (row.us for row in results.rows[2:4])
    assert f"{ours:7.1f} / {theirs:7.1f} ({theirs / ours:5.2f}x)" in text
    assert "lowest ratio" in text


def test_no_case_is_there_twice_and_results_are_read_as_they_were_written(tmp_path):
    cases = [*layers(), *calls()]
    assert len(set(map(str, cases))) == len(cases) == 84 + 22
    results = Results({"cpu": "one"}, [Measurement(PEER, case, us=1.5, note="n") for case in cases])
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


@pytest.mark.parametrize(("name", "draw"), [("cpu", table.page), ("crowd", crowd.table)], ids=["cpu", "crowd"])
def test_the_committed_table_is_of_the_committed_results(name, draw):
    folder = ROOT / "benchmarks" / "results"
    assert (folder / f"{name}.md").read_text() == draw(Results.load(folder / f"{name}.json"))


def test_a_row_of_the_crowd_is_measured_on_its_processors():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    (case,) = (c for c in crowd.cases() if c.crowd == "4 threads on one core" and c.batch == 1 and c.hidden == 256)
    assert len(set(crowd.cases())) == len(crowd.CROWDS) * len(crowd.SHAPES)
    job = json.dumps({"case": asdict(case), "processors": [min(os.sched_getaffinity(0))]})
    code = "import sys; from benchmarks import crowd; crowd.SECONDS = 0.05; crowd.main()"
    done = subprocess.run([sys.executable, "-c", code, "--row", job], cwd=ROOT, capture_output=True, text=True)
    rows = [measurement(row) for row in json.loads(done.stdout)]
    assert [row.implementation for row in rows] == [crowd.OURS, PEER, crowd.ALONE]
    assert all(row.case == case and 0 < row.us_low <= row.us <= row.us_high for row in rows)
