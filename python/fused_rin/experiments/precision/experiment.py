"""`fused-rin experiment precision`: see `trials`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..tasks import Task
from ..trial_folder import Experiment, Records
from . import plots, report
from .trials import PLANS, Trial, run_trial, trials


class Precision(Experiment[Trial]):
    name = "precision"
    version = 1
    plans = PLANS
    trial = Trial
    report, plots = report, plots

    def trials(self, seeds: int) -> Iterator[Trial]:
        return trials(seeds)

    def run_trial(self, trial: Trial, task: Task, updates: int) -> Records:
        return run_trial(trial, task, updates)

    def outcome(self, record: dict[str, Any]) -> str:
        return report.score_text(record["task"], record)
