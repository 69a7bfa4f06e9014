"""The paper's experiments as far as they were rerun: results, tables and a picture of each.

python -m fused_rin.experiments.paper.records add FOLDER   takes over results.json of a `fused-rin reproduce` folder
python -m fused_rin.experiments.paper.records              redraws table.md and the picture beside every results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..machine import machine
from ..plots import draw_curves, save_figure
from ..training.runs import Run
from .reproduce import draw_beside_paper, table
from .trials import EXPERIMENTS

RESULTS = Path("docs/reproduction")  # of a checkout


def add(folder: Path, results: Path = RESULTS) -> None:
    """Writes results/EXPERIMENT/results.json: the folder's, the machine, and what the curves need. What is
    there of other trials at the same budget stays.
    """
    record: dict[str, Any] = json.loads((folder / "results.json").read_text())
    record["machine"] = machine()
    for entry in record["results"]:
        entry["curves"] = [
            [
                {key: point[key] for key in ("step", "split", "loss", "accuracy")}
                for point in Run.open(folder / f"{entry['row']}-{entry['model']}-seed{run['seed']}").read_metrics()
                if point["split"] == "test"
            ]
            for run in entry["runs"]
        ]
    place = results / record["experiment"]
    place.mkdir(parents=True, exist_ok=True)
    if (place / "results.json").exists():
        record = merged(record, json.loads((place / "results.json").read_text()))
    (place / "results.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")


def merged(record: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """`record`, and the trials that only `before` has, if their budget is the same; in the experiment's order."""
    results = {(entry["row"], entry["model"]): entry for entry in record["results"]}
    if before["budget"] == record["budget"]:
        results = {(entry["row"], entry["model"]): entry for entry in before["results"]} | results
    trials = EXPERIMENTS[record["experiment"]]()
    return {**record, "results": [results[key] for t in trials if (key := (t.row, t.model)) in results]}


def draw(place: Path) -> str:
    """Writes table.md and figure.png beside a results.json; returns the table."""
    record = json.loads((place / "results.json").read_text())
    text = table(record)
    (place / "table.md").write_text(text + "\n")
    if record["experiment"] == "babi":
        figure = draw_beside_paper(record)
    else:
        curves = {
            f"{entry['row']} {entry['model']}": records
            for entry in record["results"]
            for records in entry["curves"][:1]
        }
        title = f"{record['experiment']}: {record['budget']:g} of the paper's epochs, test set"
        figure = draw_curves(curves, title, splits=("test",))
    save_figure(figure, place / "figure.png")
    return text


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(Path(sys.argv[2]))
    for path in sorted(RESULTS.glob("*/results.json")):
        print(draw(path.parent), end="\n\n")
