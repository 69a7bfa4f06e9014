"""The table of docs/speed.md is that of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import where

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_table_of_the_results():
    results = json.loads((ROOT / "benchmarks/results/where.json").read_text())
    assert where.table(results) in (ROOT / "docs/speed.md").read_text()
    for row in results["rows"]:
        assert abs(sum(row["parts"].values()) - 1) < 0.01
