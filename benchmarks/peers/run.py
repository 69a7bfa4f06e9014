"""Runs blocks, one process after the other, and writes the results as they come."""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Measurement, Results, measurement
from benchmarks.peers import cases, native, roofline
from benchmarks.peers.block import Block
from benchmarks.peers.machine import Load, description
from benchmarks.peers.registry import PEERS

ROOT = Path(__file__).resolve().parents[2]
PAUSE = 0.2  # seconds between two processes
MISSING = ROOT / "build" / "peers" / "missing.json"  # why install.py could not install a package


@dataclass(frozen=True)
class Choice:
    """What is to be run. `only`: a pattern of labels (cases.label), as in a shell."""

    peers: tuple[str, ...] = tuple(PEERS)
    threads: tuple[int, ...] = cases.THREADS
    only: str = "*"
    quick: bool = False
    passes: int = 1

    def cases(self, group: str) -> list[Case]:
        found = cases.quick(group) if self.quick else cases.group(group)
        return [case for case in found if fnmatch.fnmatchcase(cases.label(case), self.only)]


def missing(peer: str) -> str:
    """Why it cannot be had here, or ""; with what its installation said, if it was tried."""
    reason = PEERS[peer](1).missing()
    if reason and MISSING.exists():
        said = json.loads(MISSING.read_text())
        reason += "".join(f" ({text})" for package, text in said.items() if package in reason)
    return reason


def run(choice: Choice, out: Path) -> Results:
    """Threads outermost, then groups, then peers, so that those of a case follow on each other within a minute.

    With several passes all of that once more: of a row the fastest counts (`best`).
    """
    about = description()
    absent = {peer: reason for peer in choice.peers if (reason := missing(peer))}
    there = [peer for peer in choice.peers if peer not in absent]
    about |= {"missing": absent, "peers": {}, "settings": {}, "load": []}
    for peer in there:
        made = PEERS[peer](1)
        try:
            about["peers"][peer] = made.versions()
        except (native.CannotBuild, OSError) as error:
            absent[peer] = str(error)
            continue
        about["settings"][peer] = made.setting
    about["roofline"] = roofs(choice)
    about["passes"] = choice.passes
    results = Results(about)
    for _, threads, groups in itertools.product(range(choice.passes), choice.threads, cases.BLOCKS):
        chosen = cases.on_threads([case for group in groups for case in choice.cases(group)], threads)
        for peer in [name for name in there if name not in absent] if chosen else []:
            began = time.monotonic()
            rows, load = block(peer, threads, chosen, quick=choice.quick)
            results.rows = best(results.rows + rows)
            if load:
                about["load"].append({"peer": peer, "threads": threads, "group": "+".join(groups), **load})
            results.save(out)
            said = f"{sum(row.us is not None for row in rows)} of {len(rows)} timed, {time.monotonic() - began:.0f} s"
            print(f"{threads} thread(s), {'+'.join(groups)}, {peer}: {said}", flush=True)
            for row in failures(rows):
                print(f"    {cases.label(row.case)}: {row.note}", flush=True)
    about["roofline_after"] = roofs(choice)
    results.save(out)
    return results


def best(rows: Iterable[Measurement]) -> list[Measurement]:
    """Of the measurements of an implementation and a case the fastest; one that failed, if there is one.

    What a virtual machine loses to its neighbours is on no counter of its own, and lasts for seconds: whole blocks of
    rows took twice their time in one pass and not in the next.
    """
    found: dict[tuple[str, Case], Measurement] = {}
    for row in rows:
        key = (row.implementation, row.case)
        other = found.get(key)
        if other is None or row.us is None or (other.us is not None and row.us < other.us):
            found[key] = row
    return list(found.values())


def roofs(choice: Choice) -> dict[str, Any]:
    """Of each number of threads; before and after a run, which shows a drifting clock."""
    try:
        return {str(n): roofline.measure(n, 0.002 if choice.quick else 0.01) for n in choice.threads}
    except native.CannotBuild as error:
        return {"missing": str(error)}


REFUSED = "not run: "


def failures(rows: Iterable[Measurement]) -> list[Measurement]:
    """Those that were to be timed and were not."""
    return [row for row in rows if row.us is None and not row.note.startswith(REFUSED)]


def block(
    peer: str, threads: int, chosen: list[Case], *, quick: bool = False
) -> tuple[list[Measurement], dict[str, Any]]:
    """(a row for each case, what else the machine did meanwhile)."""
    implementation = PEERS[peer](threads)
    refused = {case: implementation.refuses(case) for case in chosen}
    rows = {case: Measurement(peer, case, note=REFUSED + why) for case, why in refused.items() if why}
    wanted = [case for case in chosen if not refused[case]]
    loads: dict[str, Any] = {}
    if wanted:
        time.sleep(PAUSE)
        with tempfile.TemporaryDirectory() as folder:
            job = Block(peer, threads, wanted, Path(folder) / "rows", seconds=0.05 if quick else 0.2)
            job.save(Path(folder) / "job.json")
            load = Load()
            # Imports go by the root; whatever pytest-xdist says to its workers is not for this process.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
            paths = [str(ROOT), str(ROOT / "python"), *filter(None, [environment.get("PYTHONPATH")])]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.peers.block", str(Path(folder) / "job.json")],
                cwd=ROOT, env={**environment, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
            )  # fmt: skip
            loads = {"others": load.others(), "load_1min": round(os.getloadavg()[0], 2)}
            lines = job.file.read_text().splitlines() if job.file.exists() else []
        rows |= {row.case: row for row in map(measurement, map(json.loads, lines))}
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [""]
        for case in wanted:
            ended = f"its process ended with {done.returncode} before: {last[0]}"
            rows.setdefault(case, Measurement(peer, case, note=ended))
    return [rows[case] for case in chosen], loads
