"""`fused-rin experiment identity-prior`: see `trials`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..tasks import Classification, Task
from ..trial_folder import Experiment, Records
from . import plots, report
from .trials import PLANS, Trial, run_trial, trials


class IdentityPrior(Experiment[Trial]):
    name = "identity-prior"
    version = 1
    plans = PLANS
    trial = Trial
    report, plots = report, plots

    def trials(self, seeds: int) -> Iterator[Trial]:
        return trials(seeds)

    def run_trial(self, trial: Trial, task: Task, updates: int) -> Records:
        assert isinstance(task, Classification)
        return run_trial(trial, task, PLANS[trial.task], updates)

    def outcome(self, record: dict[str, Any]) -> str:
        return f"accuracy {record['accuracy']:.1%}"
