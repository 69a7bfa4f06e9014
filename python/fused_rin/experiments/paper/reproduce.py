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
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import INTERRUPTED, UserError
from ..files import reporting, write_atomically
from ..plots import draw_curves, save_figure
from ..training.progress import train_with_progress
from ..training.runs import Run, is_main_process
from ..training.settings import Settings
from ..training.trainer import Diverged
from .trials import EXPERIMENTS, Trial


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
        raise UserError(f"no trial of {experiment!r} matches {only!r}; the first is {trials[0].name(0)!r}")
    folders = {}
    for trial, seed in chosen:
        steps = max(1, round(budget * trial.settings.steps))
        settings = dataclasses.replace(trial.settings, steps=steps, seed=seed, **(overrides or {}))
        folders[trial, seed] = _open(out / trial.name(seed), settings)
    results: dict[Trial, list[dict[str, Any]]] = {}
    for number, (trial, seed) in enumerate(chosen, 1):
        folder, started = folders[trial, seed]
        try:
            label = f"[{number}/{len(chosen)}] {trial.name(seed)}"
            outcome = train_with_progress(folder, resume=started, label=label)
        except Diverged as error:
            print(f"{trial.name(seed)}: diverged: {error}", file=sys.stderr)
            results.setdefault(trial, []).append({"seed": seed, "diverged": str(error)})
            continue
        if outcome.interrupted:
            print(f"interrupted in {trial.name(seed)}; the same command goes on", file=sys.stderr)
            return INTERRUPTED
        results.setdefault(trial, []).append({"seed": seed, **outcome.test})
    if is_main_process():
        _report(experiment, out, budget, results, folders)
    return 0


def _open(path: Path, settings: Settings) -> tuple[Run, bool]:
    """The folder of a trial and whether it has been started; one with other settings is refused."""
    if not (path / "config.json").exists():
        return Run.new(path, settings), False
    settings.refuse_change(Run.open(path).settings, f"{path}: the run")
    return Run(path, settings), True


def table(record: dict[str, Any]) -> str:
    """What came out beside the paper's, as Markdown: mean over the seeds, and their range when there are several.

    Args:
        record: the content of a results.json: experiment, budget, and results, each with row, model, paper
            and runs.
    """
    experiment, budget = record["experiment"], record["budget"]
    lines = [
        f"Reproduction of {experiment}: " + ("the paper's number of epochs." if budget == 1 else
        f"**{budget:g} of the paper's number of epochs; do not compare the figures as equals.**"),
        "",
        "| trial | model | seeds | here | paper |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    quantity = "loss" if experiment == "adding" else "accuracy"
    for entry in record["results"]:
        values, count = _finished(entry, quantity), len(entry["runs"])
        text = f"diverged ({count - len(values)} of {count})" if len(values) < count else ""
        if values:
            texts = [_show(experiment, value) for value in (statistics.mean(values), min(values), max(values))]
            spread = f" ({texts[1]} to {texts[2]})" if len(values) > 1 else ""
            text = texts[0] + spread + (text and f"; {text}")
        lines.append(f"| {entry['row']} | {entry['model']} | {count} | {text} | {entry['paper']} |")
    if experiment == "adding":
        lines += ["", "Test error; always answering 1 gives 0.1667. The paper shows curves only."]
        return "\n".join(lines)
    for model in dict.fromkeys(entry["model"] for entry in record["results"]):
        entries = [e for e in record["results"] if e["model"] == model and _finished(e, quantity)]
        if len(entries) > 1:
            here = statistics.mean(statistics.mean(_finished(entry, quantity)) for entry in entries)
            theirs = statistics.mean(float(entry["paper"].split()[0]) for entry in entries)
            text = f"| **mean of {len(entries)}** | {model} | | {_show(experiment, here)} | {theirs:.2f} % |"
            lines.append(text)
    return "\n".join(lines)


def _finished(entry: dict[str, Any], quantity: str) -> list[float]:
    return [run[quantity] for run in entry["runs"] if "diverged" not in run]


def _show(experiment: str, value: float) -> str:
    return f"{value:.4f}" if experiment == "adding" else f"{100 * value:.2f} %"


def draw_beside_paper(record: dict[str, Any]) -> Figure:
    """The accuracies of a results.json (not of adding, for which the paper has none) as dots, the paper's as rings."""
    rows = list(dict.fromkeys(entry["row"] for entry in record["results"]))
    models = list(dict.fromkeys(entry["model"] for entry in record["results"]))
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    for colour, model in enumerate(models):
        place = 0.15 * (colour - (len(models) - 1) / 2)
        for entry in record["results"]:
            if entry["model"] == model:
                x = rows.index(entry["row"]) + place
                for value in _finished(entry, "accuracy"):
                    axis.plot(x, 100 * value, "o", color=f"C{colour}", markersize=5)
                axis.plot(x, float(entry["paper"].split()[0]), "o", color=f"C{colour}", fillstyle="none", markersize=9)
        axis.plot([], [], "o", color=f"C{colour}", label=model)
    axis.plot([], [], "o", color="grey", fillstyle="none", markersize=9, label="the paper")
    axis.set_xticks(range(len(rows)), rows, rotation=60 if len(rows) > 6 else 0)
    axis.set_ylabel("test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    share = "the paper's epochs" if record["budget"] == 1 else f"{record['budget']:g} of the paper's epochs"
    figure.suptitle(f"{record['experiment']}: {share}")
    return figure


def _report(
    experiment: str,
    out: Path,
    budget: float,
    results: dict[Trial, list[dict[str, Any]]],
    folders: dict[tuple[Trial, int], tuple[Run, bool]],
) -> None:
    record = {
        "experiment": experiment,
        "budget": budget,
        "results": [
            {"row": trial.row, "model": trial.model, "paper": trial.paper, "runs": runs}
            for trial, runs in results.items()
        ],
    }
    text = table(record)
    pictures = []
    with reporting(out, "write the results"):
        write_atomically(out / "results.json", (json.dumps(record, indent=1) + "\n").encode())
        write_atomically(out / "table.md", (text + "\n").encode())
    if experiment != "adding":
        pictures.append(out / "beside-paper.png")
        save_figure(draw_beside_paper(record), pictures[-1])
    for row in dict.fromkeys(trial.row for trial in results):
        curves = {
            f"{trial.model}, seed {seed}": folder.read_metrics()
            for (trial, seed), (folder, _) in folders.items()
            if trial.row == row
        }
        pictures.append(out / f"{row}.png")
        note = "" if budget == 1 else f", {budget:g} of the paper's epochs"
        save_figure(draw_curves(curves, f"{experiment} {row}, test set{note}", splits=("test",)), pictures[-1])
    print(f"\n{text}\n\nTable: {out / 'table.md'}; curves: {', '.join(map(str, pictures))}")
