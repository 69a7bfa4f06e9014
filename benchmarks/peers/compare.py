"""What got slower from one results file to another, beyond what the rounds of both scatter.

A machine's clock drifts and others use it. What is not ours is the control: the median of how all other implementations
changed is taken out, if they have the same versions in both files. A row is slower if what is left is more than its
margin, the larger of 5 percent and both relative interquartile ranges together, and if the ranges do not overlap. A row
whose process did not have a processor to itself, in either file, is no measurement and is not judged.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Case, Measurement, Results
from benchmarks.peers.cases import label

LEAST = 0.05
CONTROL = 5  # rows of others that a drift is judged by, at least


@dataclass
class Change:
    case: Case
    implementation: str
    old: float  # us a step
    new: float | None
    ratio: float  # new to old, the drift taken out; infinite if it does not run any more
    margin: float

    def __str__(self) -> str:
        name = f"{label(self.case)}, {self.case.threads} thread(s), {self.implementation}"
        if self.new is None:
            return f"{name}: {self.old:.2f} us a step, now none"
        times = f"{self.old:.2f} -> {self.new:.2f} us a step, {self.ratio:.2f}x"
        return f"{name}: {times} (noise up to {1 + self.margin:.2f}x)"


def spread(row: Measurement) -> float:
    """Interquartile range by the median."""
    if not row.us or row.us_low is None or row.us_high is None:
        return 0.0
    return (row.us_high - row.us_low) / row.us


def drift(old: Results, new: Results, ours: str) -> float:
    """How many times as long what did not change takes now; 1 where that cannot be said."""
    if old.machine.get("torch") != new.machine.get("torch"):
        return 1.0
    before = {(row.case, row.implementation): row for row in old.rows}
    ratios = []
    for row in new.rows:
        known = before.get((row.case, row.implementation))
        versions = [results.machine.get("peers", {}).get(row.implementation) for results in (old, new)]
        if row.implementation.startswith(ours) or versions[0] != versions[1] or known is None:
            continue
        if known.us and row.us and not known.starved and not row.starved:
            ratios.append(row.us / known.us)
    return statistics.median(ratios) if len(ratios) >= CONTROL else 1.0


def changes(old: Results, new: Results, ours: str) -> list[Change]:
    """Of all rows of `ours` that have a number in `old`, were to be run in `new`, and had a processor in both."""
    common = drift(old, new, ours)
    after = {(row.case, row.implementation): row for row in new.rows}
    found = []
    for row in old.rows:
        now = after.get((row.case, row.implementation))
        if row.implementation != ours or not row.us or now is None or row.starved or now.starved:
            continue
        if not now.us:
            found.append(Change(row.case, ours, row.us, None, math.inf, 0.0))
            continue
        margin = max(LEAST, math.hypot(spread(row), spread(now)))
        found.append(Change(row.case, ours, row.us, now.us, now.us / row.us / common, margin))
    return found


def slower(old: Results, new: Results, ours: str) -> list[Change]:
    """The worst first."""
    common = drift(old, new, ours)
    before, after = ({row.case: row for row in results.rows if row.implementation == ours} for results in (old, new))

    def apart(case: Case) -> bool:
        low, high = after[case].us_low, before[case].us_high
        return low is None or high is None or low / common > high

    found = [c for c in changes(old, new, ours) if c.ratio > 1 + c.margin and (c.new is None or apart(c.case))]
    return sorted(found, key=lambda change: -change.ratio)


def compare(old_file: Path, new_file: Path, ours: str) -> int:
    """Prints what got slower; 1 if anything did, or if there is nothing to compare."""
    old, new = Results.load(old_file), Results.load(new_file)
    for name in ("cpu", "instruction_sets", "processors"):
        if old.machine.get(name) != new.machine.get(name):
            print(f"not the same machine: {name} {old.machine.get(name)}, then {new.machine.get(name)}")
    all_rows = changes(old, new, ours)
    for file, results in ((old_file, old), (new_file, new)):
        if starved := sum(row.starved for row in results.rows if row.implementation == ours):
            print(f"{file}: {starved} rows shared their processor with others and are not judged")
    if not all_rows:
        print(f"no case of {ours} can be compared: in both files, with a time in {old_file}")
        return 1
    found = slower(old, new, ours)
    faster = sum(change.ratio * (1 + change.margin) < 1 for change in all_rows)
    common = drift(old, new, ours)
    print(f"{len(all_rows)} rows: {len(found)} slower, {faster} faster; others take {common:.2f}x, which is taken out")
    for change in found:
        print(f"  {change}")
    return 1 if found else 0
