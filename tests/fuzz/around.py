"""python -m tests.fuzz.around --seconds 600 [--seed S] [--out FILE]: as python -m tests.fuzz, of twists and refusals.

Three in four are twists (twists.py), one is a refusal (refusals.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.fuzz import refusals, run, twisting, twists
from tests.fuzz.cases import Choose

AnyCase = twists.Twisted | refusals.Refused


def draw(choose: Choose) -> AnyCase:
    return choose((twists.draw, twists.draw, twists.draw, refusals.draw))(choose)


def check(case: AnyCase) -> str:
    return (refusals if isinstance(case, refusals.Refused) else twisting).check(case)


def shrunk(case: AnyCase) -> AnyCase:
    if isinstance(case, twists.Twisted):
        return _shrunk(case)
    for field in dataclasses.fields(case):
        if field.default is not dataclasses.MISSING and run.failure(case):
            simpler = dataclasses.replace(case, **{field.name: field.default})
            case = simpler if run.failure(simpler) else case
    return case


def work(seed: int, seconds: float, cases: int, connection: Any) -> None:
    """Of a process of its own, where run.py's cases are these."""
    run.draw, run.check, run.shrunk, run.settled = draw, check, shrunk, twists.settled
    _work(seed, seconds, cases, connection)


_work, _shrunk = run.work, run.shrunk

if __name__ == "__main__":
    from tests.fuzz import around

    run.work = around.work  # by its importable name: it is sent to the process
    run.main()
