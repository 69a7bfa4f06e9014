"""What `fused-rin train --task mnist --recipe best` has reached: its metrics, a table and the curves.

python -m fused_rin.experiments.paper.recipe add NAME RUN_FOLDER   puts the metrics of a run, thinned, beside the others
python -m fused_rin.experiments.paper.recipe                       redraws curves.png and table.md from what lies there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..machine import machine
from ..plots import draw_curves, save_figure
from ..training.checkpoints import read_checkpoint
from ..training.runs import Run
from . import figures

RESULTS = Path("docs/reproduction/mnist-recipe")  # of a checkout
TRAIN_POINTS = 60  # of a run's training records; every test record is kept
SAMPLES = 60_000
# Test accuracy in percent: what the paper has for one layer of 100 units, and the best published for a plain ReLU
# network with identity start (128 units), without and with noise on h_0 (two layers).
GOALS = {
    False: {"paper": figures.SEQUENTIAL[1, 100]["rin"], "target": 97.0, "stretch": 98.7},
    True: {"paper": figures.PERMUTED[1, 100]["rin"], "target": 89.1, "stretch": 92.7},
}


def add(name: str, folder: Path, results: Path = RESULTS) -> None:
    """Writes results/NAME.json: settings, machine and thinned metrics of a run, finished or not."""
    run = Run.open(folder)
    settings = read_checkpoint(run.checkpoint_path)["settings"]  # a run that was resumed may have got other `steps`
    records = run.read_metrics()
    train = [record for record in records if record["split"] == "train"]
    kept = {record["step"] for record in train[:: max(1, len(train) // TRAIN_POINTS)]}
    content = {
        "settings": {key: value for key, value in settings.items() if key != "data_dir"},
        "machine": machine(),
        "metrics": [
            {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}
            for record in records
            if record["split"] == "test" or record["step"] in kept
        ],
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


def table(runs: dict[str, dict[str, Any]]) -> str:
    """One line a run: what was trained, how long, and its last test accuracy beside the figures to pass."""
    rows = []
    for name, run in runs.items():
        settings = run["settings"]
        last = [record for record in run["metrics"] if record["split"] == "test"][-1]
        epochs, planned = (steps * settings["batch_size"] / SAMPLES for steps in (last["step"], settings["steps"]))
        rate, share = settings["learning_rate"], settings["recurrent_rate"]
        own = settings.get("recurrent_optimizer", "same")  # of a run from before there was a choice
        start = settings["recurrent_init"]
        if start == "cycles":
            start += " " + settings["recurrent_cycles"]
        rows.append(
            {
                "run": name,
                "order": "permuted" if settings["permute"] else "sequential",
                "units": settings["hidden_size"],
                "start": "identity" if start == "normal" else start,
                "optimizer": settings["optimizer"] + (", U muon" if own == "muon" else ""),
                "rates": f"{rate:g}, U {rate * share:.3g}",
                "noise": f"pixels {settings['noise']:g}, h_0 {settings['state_noise']:g}",
                "epochs": f"{epochs:.2f}",
                "planned": f"{planned:.2f}",
                "minutes": f"{last['seconds'] / 60:.0f}",
                "test accuracy": f"**{100 * last['accuracy']:.2f} %**",
                **{goal: f"{value} %" for goal, value in GOALS[settings["permute"]].items()},
            }
        )
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0]), *(" | ".join(map(str, r.values())) for r in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def read(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The runs by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}


def draw(results: Path = RESULTS) -> str:
    """Writes curves.png and table.md; returns the table."""
    runs = read(results)
    text = table(runs)
    (results / "table.md").write_text(text + "\n")
    curves = {name: run["metrics"] for name, run in runs.items()}
    several = {n: records for n, records in curves.items() if sum(r["split"] == "test" for r in records) > 1}
    figure = draw_curves(several or curves, "MNIST pixel by pixel, one plain layer, test set", splits=("test",))
    figure.axes[1].set_ylim(0.85, 1)  # all that matters here
    save_figure(figure, results / "curves.png")
    return text


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(sys.argv[2], Path(sys.argv[3]))
    print(draw())
