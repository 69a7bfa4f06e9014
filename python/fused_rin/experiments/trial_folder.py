"""The folder of `fused-rin experiment`, and the command: trials are run, reported and drawn.

    config.json      what is run, and the versions it started with
    records.jsonl    one JSON object for every record of every trial
    results.json     what the report keeps of them, table.md and *.png made of it

A trial's lines are written together when it is finished, so what is there is whole, and the same command goes
on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from .bars import Bar, say
from .errors import INTERRUPTED, UserError
from .files import FolderLock, is_free, read_results, reporting, write_atomically
from .plots import save_figure
from .tasks import Task
from .training.settings import Settings

Records = list[dict[str, Any]]


class Plan(Protocol):
    """What is trained on one task; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def updates(self) -> int: ...

    def to_settings(self, task: str, seed: int = 0, **others: Any) -> Settings: ...


class Trial(Protocol):
    """One training run; a dataclass whose fields are in each of its records."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def task(self) -> str: ...

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Trial)


class Experiment(Generic[T]):
    """What `fused-rin experiment` runs. Subclasses define the constants, the trials and what is made of their records.

    Raising one of the versions refuses what was written before.
    """

    name: str
    version: int  # of the folder
    plans: Mapping[str, Plan]  # by task
    trial: type[T]
    report: Any  # a module: FORMAT and VERSION of the results file; summarise(trials, budget), its text; table(content)
    plots: Any  # a module: draw(content), pictures by the names of their files

    @property
    def format(self) -> str:
        return f"fused-rin {self.name}"

    def trials(self, seeds: int) -> Iterator[T]:
        """All training runs, seed after seed, so that an interrupted experiment has whole seeds."""
        raise NotImplementedError

    def run_trial(self, trial: T, task: Task, updates: int) -> Records:
        """The records of a trial, the last one with "last": True, and "diverged": True where it was lost."""
        raise NotImplementedError

    def outcome(self, record: dict[str, Any]) -> str:
        """What the last record of a trial that did not diverge says, in a few words."""
        raise NotImplementedError


def note(content: dict[str, Any]) -> str:
    """How much of a plan a results file has, in one sentence."""
    counts = sorted({len(cell["seeds"]) for cell in content["cells"]})
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[-1]} seed{'s' * (counts[-1] > 1)}"
    updates = ", ".join(f"{task} {plan['updates']}" for task, plan in content["plans"].items())
    if content["budget"] == 1:
        return f"The whole plan ({updates} updates), {seeds} a cell."
    return f"**{content['budget']:g} of the planned updates ({updates}): not the experiment**; {seeds} a cell."


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    budget: float = 1.0,
    seeds: int = 3,
    only: str = "*",
    data_dir: str = "",
    threads: int = 0,
) -> int:
    """Runs the trials that are not finished, and reports all that are. Returns the exit code.

    Args:
        budget: share of the planned updates, over 0. seeds: 0, 1, ... only: a pattern of trial names, as in a
        shell, e.g. "digits-adam-*". data_dir: see `data.data_folder`. threads: of the CPU; 0: as PyTorch
        chooses.
    """
    if not 0 < budget < math.inf:
        raise UserError(f"budget must be positive and finite, got {budget}")
    for name, value, least in (("seeds", seeds, 1), ("threads", threads, 0)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    chosen = [trial for trial in experiment.trials(seeds) if fnmatch.fnmatch(trial.name, only)]
    if not chosen:
        raise UserError(f"no trial matches {only!r}; the first is {next(experiment.trials(1)).name!r}")
    if threads:
        torch.set_num_threads(threads)
    tasks = {
        name: experiment.plans[name].to_settings(name, data_dir=data_dir).build_task()
        for name in dict.fromkeys(trial.task for trial in chosen)
    }
    with closing(Folder(experiment, out, budget)) as folder:
        return _run(folder, chosen, tasks)


def _run(folder: Folder, chosen: Sequence[Trial], tasks: Mapping[str, Task]) -> int:
    finished, out, budget, experiment = folder.open(), folder.path, folder.budget, folder.experiment
    try:
        waiting = [trial for trial in chosen if trial.name not in finished]
        with Bar(total=len(chosen), initial=len(chosen) - len(waiting), unit="trial") as bar:
            for trial in waiting:
                bar.set_description(trial.name)
                updates = max(1, round(budget * experiment.plans[trial.task].updates))
                records = experiment.run_trial(trial, tasks[trial.task], updates)
                folder.append(records)
                finished[trial.name] = records
                bar.update()
                say(trial.name, "diverged" if "diverged" in records[-1] else experiment.outcome(records[-1]))
    except KeyboardInterrupt:
        print(f"interrupted after {len(finished)} trials; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    with reporting(out, "write the results"):
        write_atomically(folder.results_path, experiment.report.summarise(finished.values(), budget).encode())
    return redraw(experiment, folder.results_path, out)


def redraw(experiment: Experiment, results: Path, out: Path) -> int:
    """Writes table.md and the pictures of a results file into `out`; runs nothing. Returns the exit code."""
    content = read_results(results, experiment.report.FORMAT, experiment.report.VERSION, "cells")
    try:
        text, figures = experiment.report.table(content) + "\n", experiment.plots.draw(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{results}: is damaged: {error!r}") from error
    with reporting(out, "write the table"):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "table.md", text.encode())
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    print(f"{len(content['cells'])} cells of the table: {out / 'table.md'}; {len(figures)} pictures beside it")
    return 0


class Folder:
    """Where the records of finished trials are. Every method raises UserError when the disk refuses."""

    def __init__(self, experiment: Experiment, path: Path, budget: float):
        self.experiment, self.path, self.budget = experiment, path, budget
        self.records_path, self.results_path = path / "records.jsonl", path / "results.json"
        self._lock = FolderLock(path)

    def open(self) -> dict[str, Records]:
        """Makes the folder, or reads the records of the finished trials in it, by name; until `close` it is ours.

        Raises UserError for a folder that holds anything else, or trials with another budget or plan, or that another
        process runs trials in.
        """
        plans = {name: json.loads(json.dumps(dataclasses.asdict(plan))) for name, plan in self.experiment.plans.items()}
        asked = {
            "format": self.experiment.format,
            "version": self.experiment.version,
            "budget": self.budget,
            "plans": plans,
        }
        with reporting(self.path, "use the folder"):
            new = is_free(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock.take("runs this experiment")
        with reporting(self.path, "use the folder"):
            if new and is_free(self.path):
                config = {**asked, "torch": torch.__version__, "python": platform.python_version()}
                write_atomically(self.path / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        try:
            there = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError):
            there = None
        if not isinstance(there, dict) or there.get("format") != self.experiment.format:
            raise UserError(f"{self.path}: is not empty and not a folder of this experiment")
        for name, value in asked.items():
            if there.get(name) != value:
                hint = f"{there.get(name)}, {value} is asked for" if name != "plans" else "other settings"
                raise UserError(f"{self.path}: was started with {name} {hint}; name another folder")
        self._lock.tidy()
        return self._read()

    def close(self) -> None:
        """Leaves the folder to other processes."""
        self._lock.release()

    def append(self, records: Records) -> None:
        with reporting(self.path, "write the records"), self.records_path.open("a") as file:
            file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> dict[str, Records]:
        """Drops, also on the disk, the lines of a trial that are not whole: a process was killed over them."""
        lines = []
        if self.records_path.exists():
            with reporting(self.path, "read the records"):
                lines = self.records_path.read_text().splitlines()
        trials: dict[str, Records] = {}
        make = self.experiment.trial
        fields = [field.name for field in dataclasses.fields(make)]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                name = make(**{field: record[field] for field in fields}).name
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break
                raise UserError(f"{self.records_path}: line {number} is damaged: {error}") from error
            trials.setdefault(name, []).append(record)
        whole = {name: records for name, records in trials.items() if records[-1].get("last")}
        kept = [record for records in whole.values() for record in records]
        if len(kept) < len(lines):
            with reporting(self.path, "write the records"):
                write_atomically(self.records_path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return whole
