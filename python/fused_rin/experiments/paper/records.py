"""The paper's experiments as far as they were rerun: results, tables and a picture of each.

python -m fused_rin.experiments.paper.records add FOLDER...  takes over what `fused-rin reproduce` left in these folders
python -m fused_rin.experiments.paper.records time NAME...   times a step of what experiments have in their results; the
                                                             runs themselves share a machine with who knows what
python -m fused_rin.experiments.paper.records                redraws table.md and the picture beside every results.json,
                                                             and the tables in docs/reproduction.md
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..machine import machine
from ..plots import save_figure
from ..training.runs import Run
from ..training.settings import Settings
from ..training.trainer import Trainer
from .tables import draw, table
from .trials import EXPERIMENTS

RESULTS, PAGE = Path("docs/reproduction"), Path("docs/reproduction.md")  # of a checkout
CURVE_POINTS = 60  # that are kept of a run


def add(folder: Path, results: Path = RESULTS) -> None:
    """Puts the runs of a folder among those in results/EXPERIMENT/results.json; see `merged`."""
    record: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for run in (run for entry in record["results"] for run in entry["runs"]):
        run["curve"] = thinned(run["curve"])
        run["machine"] = machine()
    place = results / record["experiment"]
    place.mkdir(parents=True, exist_ok=True)
    if (place / "results.json").exists():
        record = merged(record, json.loads((place / "results.json").read_text()))
    (place / "results.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")


def thinned(curve: list[list[float]]) -> list[list[float]]:
    """So many points of a curve, the last among them, with as many digits as a picture needs."""
    stride = -(-len(curve) // CURVE_POINTS)
    kept = [point for number, point in enumerate(curve, 1) if number % stride == 0 or number == len(curve)]
    return [[int(step), *(float(f"{value:.5g}") for value in values)] for step, *values in kept]


def merged(record: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The runs of both, in the experiment's order; of two with the same seed the one with more epochs, or the newer."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in (*before["results"], *record["results"]):
        key = entry["row"], entry["model"]
        runs = {run["seed"]: run for run in entries[key]["runs"]} if key in entries else {}
        for run in entry["runs"]:
            if run["seed"] not in runs or run["epochs"] >= runs[run["seed"]]["epochs"]:
                runs[run["seed"]] = run
        entries[key] = {**entries.get(key, {}), **entry, "runs": [runs[seed] for seed in sorted(runs)]}
    trials = EXPERIMENTS[record["experiment"]]()
    return {**record, "results": [entries[key] for t in trials if (key := (t.row, t.model)) in entries]}


def time_steps(place: Path, seconds: float = 2.0) -> None:
    """Writes into a results.json, for each of its models in each row, the milliseconds of a training step ("step_ms"):
    the median over rounds in which the models of a row take turns, on one thread, so many seconds for each.
    """
    record = json.loads((place / "results.json").read_text())
    trials = {(trial.row, trial.model): trial for trial in EXPERIMENTS[record["experiment"]]()}
    for row in dict.fromkeys(entry["row"] for entry in record["results"]):
        entries = [entry for entry in record["results"] if entry["row"] == row]
        times = milliseconds([trials[row, entry["model"]].settings for entry in entries], seconds)
        for entry, value in zip(entries, times, strict=True):
            entry["step_ms"] = float(f"{value:.3g}")
    (place / "results.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")


def milliseconds(settings: Sequence[Settings], seconds: float) -> list[float]:
    """Of a training step with each of these settings, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            Trainer(Run.new(Path(folder) / str(number), dataclasses.replace(of, threads=1, device="cpu")))
            for number, of in enumerate(settings)
        ]
    times: list[list[float]] = [[] for _ in trainers]
    for trainer in trainers:
        trainer.train_step()
    end = time.perf_counter() + seconds * len(trainers)
    while len(times[0]) < 5 or time.perf_counter() < end:
        for trainer, taken in zip(trainers, times, strict=True):
            start = time.perf_counter()
            trainer.train_step()
            taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken) for taken in times]


def redraw(place: Path) -> str:
    """Writes table.md and figure.png beside a results.json; returns the table."""
    record = json.loads((place / "results.json").read_text())
    text = table(record)
    (place / "table.md").write_text(text + "\n")
    save_figure(draw(record), place / "figure.png")
    return text


def with_table(page: str, experiment: str, text: str) -> str:
    """The page with this table between its marks."""
    first, last = f"<!-- table: {experiment} -->", "<!-- end -->"
    changed, count = re.subn(f"{first}.*?{last}", lambda _: f"{first}\n\n{text}\n\n{last}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must have {first} ... {last} once, found {count}")
    return changed


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        for folder in sys.argv[2:]:
            add(Path(folder))
    if sys.argv[1:2] == ["time"]:
        for name in sys.argv[2:]:
            time_steps(RESULTS / name)
    for path in sorted(RESULTS.glob("*/results.json")):
        text = redraw(path.parent)
        PAGE.write_text(with_table(PAGE.read_text(), path.parent.name, text))
        print(text, end="\n\n")
