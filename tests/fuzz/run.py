"""python -m tests.fuzz --seconds 600 [--seed S] [--out FILE]: random cases, failures shrunk and listed.

A process of its own draws and runs the cases, so that one that crashes is known and the others go on.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing
import platform
import random
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from fused_rin import cpu

from tests.fuzz.cases import Case, draw, settled
from tests.fuzz.checks import check


def failure(case: Case) -> str | None:
    """What is wrong with a case, or None."""
    try:
        check(case)
    except Exception as error:  # an error where none was expected is a failure too
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})"
    return None


def shrunk(case: Case) -> Case:
    """A smaller case that fails too: each field by itself to its default, as long as that helps."""
    simplest, changed = Case(kind=case.kind, seed=case.seed), True
    while changed:
        changed = False
        for field in dataclasses.fields(Case):
            value = getattr(simplest, field.name)
            if field.name in ("kind", "mistake") or getattr(case, field.name) == value:
                continue
            simpler = settled(dataclasses.replace(case, **{field.name: value}))
            if simpler.hidden % simpler.heads == 0 and simpler != case and failure(simpler):
                case, changed = simpler, True
    return case


def work(seed: int, seconds: float, cases: int, connection: Any) -> None:
    """Draws and runs cases; tells the parent each before it runs."""
    warnings.simplefilter("ignore")
    generator, end = random.Random(seed), time.monotonic() + seconds
    for _ in range(cases):
        if time.monotonic() > end:
            break
        case = draw(generator.choice)
        connection.send(("case", case))
        try:
            connection.send(("done", check(case)))
        except Exception:
            connection.send(("failed", (shrunk(case), failure(case))))
    connection.send(("end", None))


def run(seed: int, seconds: float, cases: int) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, str]] = []
    start, ended, last = time.monotonic(), False, None
    while not ended and time.monotonic() - start < seconds and sum(counts.values()) < cases:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        left = seconds - (time.monotonic() - start)
        child = multiprocessing.get_context("spawn").Process(
            target=work, args=(seed + 1_000_003 * len(failures), left, cases - sum(counts.values()), theirs)
        )
        child.start()
        theirs.close()
        try:
            while not ended:
                kind, value = ours.recv()
                if kind == "case":
                    last = value
                elif kind == "done":
                    counts[value] += 1
                elif kind == "failed":
                    counts["failed"] += 1
                    failures.append({"case": repr(value[0]), "error": value[1]})
                    print(failures[-1], flush=True)
                ended = kind == "end"
        except EOFError:
            child.join()
            counts["crashed"] += 1
            failures.append({"case": repr(last), "error": f"the process ended with {child.exitcode}"})
            print(failures[-1], flush=True)
        child.join()
    return {
        "cases": sum(counts.values()),
        "seconds": round(time.monotonic() - start, 1),
        "seed": seed,
        "checked": dict(sorted(counts.items())),
        "failures": failures,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": cpu.instruction_sets(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--cases", type=int, default=1 << 60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = run(given.seed, given.seconds, given.cases)
    print(json.dumps({key: value for key, value in result.items() if key != "failures"}))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["failures"]))
