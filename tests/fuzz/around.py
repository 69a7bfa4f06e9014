"""python -m tests.fuzz.around --seconds 600 [--seed S] [--out FILE]: as python -m tests.fuzz, of twists and refusals."""

from __future__ import annotations

from typing import Any

from tests.fuzz import run, twists


def work(seed: int, seconds: float, cases: int, connection: Any) -> None:
    """Of a process of its own, where run.py's cases are these."""
    run.draw, run.check, run.settled = twists.draw, twists.check, twists.settled
    _work(seed, seconds, cases, connection)


_work = run.work

if __name__ == "__main__":
    from tests.fuzz import around

    run.work = around.work  # by its importable name: it is sent to the process
    run.main()
