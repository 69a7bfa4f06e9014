"""The CPU benchmark from a measured point to the results file: `make bench-cpu` in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import table

ROOT = Path(__file__).parent.parent


def test_points_of_both_files_reach_results_and_table(tmp_path):
    raw, results = tmp_path / "raw.json", tmp_path / "cpu.json"
    # Within a worker of pytest-xdist, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(
        [
            sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-enable", f"--benchmark-json={raw}",
            "-k", "(inference-1-512-64-1-rin) or (streaming-RIN-1-64-True) or (training-RINCell)",
        ],
        cwd=ROOT, check=True, capture_output=True, env=environment,
    )  # fmt: skip
    table.main(str(raw), str(results))
    written = json.loads(results.read_text())
    assert set(written) == {"machine", "points", "calls"}
    assert [(p["what"], p["B"], p["T"], p["H"]) for p in written["points"]] == [("inference", 1, 512, 64)]
    kinds = [(c["what"], c["module"], c["T"], c["H"], c["state"]) for c in written["calls"]]
    assert kinds == [("streaming", "RIN", 1, 64, True), ("training", "RINCell", 1, 128, True)]
    for row in written["calls"]:
        assert row["ratio"] == row["torch_us_per_call"] / row["us_per_call"] > 0.1
    page = results.with_suffix(".md").read_text()
    for row in written["calls"]:
        assert f"{row['us_per_call']:7.1f} / {row['torch_us_per_call']:7.1f}" in page
    assert "lowest ratio" in page
