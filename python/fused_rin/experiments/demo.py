"""The demonstration: does a Recurrent Identity Network learn what it should, and how fast is it here?

Under three minutes on two cores. Everything it makes lies in one folder; a second call replaces it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .errors import INTERRUPTED, UserError
from .models import count_parameters
from .plots import draw_curves, save_figure
from .progress import train_with_progress
from .runs import Run, reporting, write_atomically
from .settings import Settings
from .timing import Timing, compare
from .training import Diverged, Outcome

FORMAT = "fused-rin demo"
ADDING_LIMIT = 0.01  # test error RIN has to stay under; always answering 1 gives 0.167
DIGITS_LIMIT = 0.93  # test accuracy RIN has to reach
# One budget, one optimizer, one learning rate and one clipping for the three; see `Settings` for the rest.
ADDING = Settings.for_task("adding", length=200, hidden_size=100)
ADDING_MODELS = {"rin": "RIN", "rnn": "tanh nn.RNN", "lstm": "nn.LSTM"}
DIGITS = Settings.for_task("digits", model="rin")
# (steps, batch, input_size, hidden): what the demo itself trains, one sequence at a time, and a larger batch.
TIMED = ((200, 32, 2, 100), (512, 1, 128, 128), (128, 64, 128, 128))


@dataclasses.dataclass(frozen=True)
class Result:
    """One training run of the demo; `passed` is None where nothing was demanded."""

    task: str
    model: str
    parameters: int
    loss: float
    accuracy: float
    milliseconds: float  # per training step
    passed: bool | None


def demo(out: Path) -> int:
    """Runs everything and prints one table. Returns 0, or 1 when RIN did not reach what it has to."""
    started = time.perf_counter()
    _prepare(out)
    results = []
    curves: dict[str, list[dict[str, Any]]] = {}
    for model, name in ADDING_MODELS.items():
        settings = dataclasses.replace(ADDING, model=model)
        folder = Run.new(out / f"adding-{model}", settings)
        outcome = _train(folder, f"adding T={settings.length}, {name}")
        if outcome is not None and outcome.interrupted:
            return INTERRUPTED
        passed = _loss(outcome) < ADDING_LIMIT if model == "rin" else None
        results.append(_result(f"adding T={settings.length}", name, folder, outcome, passed))
        curves[name] = folder.read_metrics()
    title = f"Adding problem, T={ADDING.length}, {ADDING.hidden_size} units, test set"
    adding_picture = out / "adding.png"
    save_figure(draw_curves(curves, title, baseline=1 / 6, splits=("test",)), adding_picture)

    folder = Run.new(out / "digits-rin", DIGITS)
    outcome = _train(folder, "sequential digits, RIN")
    if outcome is not None and outcome.interrupted:
        return INTERRUPTED
    passed = outcome is not None and outcome.test["accuracy"] >= DIGITS_LIMIT
    results.append(_result("sequential digits", "RIN", folder, outcome, passed))

    timings = [timing for shape in TIMED for timing in compare(*shape)]
    report = {
        "format": FORMAT,
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "results": [dataclasses.asdict(result) for result in results],
        "timings": [dataclasses.asdict(timing) for timing in timings],
    }
    with reporting(out, "write the results"):
        write_atomically(out / "results.json", (json.dumps(report, indent=2) + "\n").encode())
    print("\n" + table(results, timings))
    print(f"\nTook {report['seconds']:.0f} s with {report['threads']} threads.")
    print(f"Pictures: {adding_picture}, {folder.curves_path}; numbers: {out / 'results.json'}")
    failed = [result for result in results if result.passed is False]
    for result in failed:
        print(f"FAILED: {result.model} on {result.task} did not reach what is demanded", file=sys.stderr)
    return 1 if failed else 0


def table(results: list[Result], timings: list[Timing]) -> str:
    """All that was learnt and timed, as text."""
    rows = [("task", "model", "weights", "test loss", "accuracy", "ms/step", "demanded")]
    for result in results:
        demanded = f"loss < {ADDING_LIMIT}" if result.task.startswith("adding") else f"accuracy >= {DIGITS_LIMIT:.0%}"
        verdict = {None: "-", True: f"{demanded}: yes", False: f"{demanded}: NO"}[result.passed]
        loss, accuracy = f"{result.loss:.4f}", f"{result.accuracy:.1%}"
        speed = f"{result.milliseconds:.1f}"
        rows.append((result.task, result.model, f"{result.parameters:,}", loss, accuracy, speed, verdict))
    lines = [
        f"{ADDING.steps} steps of batch {ADDING.batch_size}, Adam, learning rate {ADDING.learning_rate:g} "
        f"({ADDING.schedule}), clip {ADDING.clip:g}: the same for the three on adding; always answering 1 gives 0.1667"
    ]
    lines += _columns(rows)
    rows = [("us per time step", "T", "B", "units", "RIN", "nn.RNN(relu)", "faster")]
    for timing in timings:
        ours, theirs = (1e6 * seconds / timing.steps for seconds in (timing.ours, timing.theirs))
        shape = (str(timing.steps), str(timing.batch), str(timing.hidden))
        rows.append((timing.kind, *shape, f"{ours:.2f}", f"{theirs:.2f}", f"{timing.ratio:.1f}x"))
    return "\n".join([*lines, "", *_columns(rows)])


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [texts[0].rstrip(), "-" * (sum(widths) + 2 * (len(widths) - 1)), *(text.rstrip() for text in texts[1:])]


def _prepare(out: Path) -> None:
    """Empties the folder of an earlier demo; refuses one that is anything else."""
    with reporting(out, "use the demo's folder"):
        if out.exists() and any(out.iterdir()):
            try:
                ours = json.loads((out / "demo.json").read_text())["format"] == FORMAT
            except (OSError, ValueError, KeyError, TypeError):
                ours = False
            if not ours:
                raise UserError(f"{out}: is not empty and not the folder of an earlier demo")
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "demo.json", (json.dumps({"format": FORMAT}) + "\n").encode())


def _train(folder: Run, label: str) -> Outcome | None:
    """None when the training diverged."""
    try:
        return train_with_progress(folder, label=label)
    except Diverged as error:
        print(f"{label}: diverged: {error}", file=sys.stderr)
        return None


def _loss(outcome: Outcome | None) -> float:
    return float("nan") if outcome is None else outcome.test["loss"]


def _result(task: str, model: str, folder: Run, outcome: Outcome | None, passed: bool | None) -> Result:
    settings = folder.settings
    return Result(
        task=task,
        model=model,
        parameters=count_parameters(settings.build_model(settings.build_task())),
        loss=_loss(outcome),
        accuracy=float("nan") if outcome is None else outcome.test["accuracy"],
        milliseconds=float("nan") if outcome is None else 1e3 * outcome.seconds_per_step,
        passed=passed,
    )
