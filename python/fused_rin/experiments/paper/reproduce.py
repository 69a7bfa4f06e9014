"""The paper's experiments, each by one command: its settings, its tables, and what comes out here beside them.

An experiment is a list of trials (`trials.py`), one training run each, in a folder of its own under one folder.
The same command goes on where it was interrupted. A budget below 1 scales the number of epochs down, and every
table says so.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import INTERRUPTED, UserError
from ..files import reporting, write_atomically
from ..plots import draw_curves, save_figure
from ..tasks import Classification
from ..training.progress import train_with_progress
from ..training.runs import Run, is_main_process
from ..training.settings import Settings
from ..training.trainer import Diverged
from .tables import draw, table
from .trials import EXPERIMENTS, Trial

Quantities = dict[str, Any]


def reproduce(
    experiment: str,
    out: Path,
    *,
    budget: float = 1.0,
    seeds: int = 1,
    only: str = "*",
    overrides: dict[str, Any] | None = None,
) -> int:
    """Runs the trials that are not finished, prints the table, draws the curves. Returns the exit code.

    Args:
        budget: share of the paper's epochs, over 0; every trial makes at least one step. seeds: runs of
        every trial, seeds 0, 1, ... only: a pattern of trial names, as in a shell, e.g.
        "sequential-1-100-*". overrides: settings of every trial that are not the paper's concern (device,
        precision, threads, data_dir).
    """
    if not 0 < budget < math.inf:
        raise UserError(f"budget must be positive and finite, got {budget}")
    if seeds < 1:
        raise UserError(f"seeds must be a positive integer, got {seeds}")
    trials = list(EXPERIMENTS[experiment]())
    chosen = [(t, seed) for t in trials for seed in range(seeds) if fnmatch.fnmatch(t.name(seed), only)]
    if not chosen:
        known = (", ".join(dict.fromkeys(getattr(trial, part) for trial in trials)) for part in ("row", "model"))
        raise UserError(
            f"no trial of {experiment!r} matches {only!r}; their names are ROW-MODEL-seedN, with row {next(known)}, "
            f"model {next(known)} and N up to {seeds - 1}"
        )
    least = min(trial.settings.steps for trial, _ in chosen)
    if round(budget * least) <= 1:
        print(f"budget {budget:g} is a single step of {least:,}: this trains nothing", file=sys.stderr)
    folders = {}
    for trial, seed in chosen:
        steps = max(1, round(budget * trial.settings.steps))
        settings = dataclasses.replace(trial.settings, steps=steps, seed=seed, **(overrides or {}))
        folders[trial, seed] = _open(out / trial.name(seed), settings)
    results: dict[Trial, list[Quantities]] = {}
    interrupted = False
    for number, (trial, seed) in enumerate(chosen, 1):
        folder, started = folders[trial, seed]
        try:
            label = f"[{number}/{len(chosen)}] {trial.name(seed)}"
            outcome = train_with_progress(folder, resume=started, label=label)
        except Diverged as error:
            print(f"{trial.name(seed)}: diverged: {error}", file=sys.stderr)
            results.setdefault(trial, []).append({**_outcome(trial, folder), "diverged": str(error)})
            continue
        results.setdefault(trial, []).append(_outcome(trial, folder))
        if interrupted := outcome.interrupted:
            break
    if is_main_process():
        _report(experiment, out, results, folders)
        if interrupted:
            print(f"interrupted in {trial.name(seed)}; the same command goes on", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _outcome(trial: Trial, folder: Run) -> Quantities:
    """How far a run has come: its last evaluation whose loss was finite, and all of them as a curve."""
    records = folder.read_metrics()
    points = [
        tuple(record[name] for name in ("step", "loss", "accuracy", "seconds"))
        for record in records
        if record["split"] == "test" and math.isfinite(record["loss"])
    ]
    run = {"seed": folder.settings.seed, "batch_size": folder.settings.batch_size, "curve": points}
    if points:
        step, loss, accuracy, seconds = points[-1]
        run |= {"epochs": step / trial.epoch, "loss": loss, "accuracy": accuracy, "seconds": seconds}
    else:
        run |= {"epochs": records[-1]["step"] / trial.epoch if records else 0.0}
    return run


def _open(path: Path, settings: Settings) -> tuple[Run, bool]:
    """The folder of a trial and whether it has been started; one with other settings is refused."""
    if not (path / "config.json").exists():
        return Run.new(path, settings), False
    settings.refuse_change(Run.open(path).settings, f"{path}: the run")
    return Run(path, settings), True


def _report(
    experiment: str,
    out: Path,
    results: dict[Trial, list[Quantities]],
    folders: dict[tuple[Trial, int], tuple[Run, bool]],
) -> None:
    record = {
        "experiment": experiment,
        "results": [
            {
                "row": trial.row,
                "model": trial.model,
                "paper": trial.paper,
                "epochs": trial.epochs,
                "constants": constants,
                "runs": runs,
            }
            for (trial, runs), constants in zip(results.items(), _constants(results, folders), strict=True)
        ],
    }
    text = table(record)
    with reporting(out, "write the results"):
        write_atomically(out / "results.json", (json.dumps(record, indent=1) + "\n").encode())
        write_atomically(out / "table.md", (text + "\n").encode())
    pictures = [out / "figure.png"]
    save_figure(draw(record), pictures[0])
    for row in dict.fromkeys(trial.row for trial in results):
        curves = {
            f"{trial.model}, seed {seed}": folder.read_metrics()
            for (trial, seed), (folder, _) in folders.items()
            if trial.row == row
        }
        pictures.append(out / f"{row}.png")
        save_figure(draw_curves(curves, f"{experiment} {row}, test set", splits=("test",)), pictures[-1])
    print(f"\n{text}\n\nTable: {out / 'table.md'}; curves: {', '.join(map(str, pictures))}")


def _constants(trials: Iterable[Trial], folders: dict[tuple[Trial, int], tuple[Run, bool]]) -> Iterator[list[float]]:
    """For each trial, the shares of its test set that each constant answer gets right."""
    found: dict[str, list[float]] = {}
    settings = {trial: folder.settings for (trial, _), (folder, _) in folders.items()}
    for trial in trials:
        if trial.row not in found:
            task = settings[trial].build_task()
            found[trial.row] = task.constant_accuracies if isinstance(task, Classification) else []
        yield found[trial.row]
