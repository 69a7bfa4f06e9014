"""Training as a user sees it: a progress bar, a line for every evaluation, and the curves at the end."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from ..errors import INTERRUPTED
from ..plots import draw_curves, save_figure
from .runs import Run, is_main_process
from .trainer import Diverged, Outcome, Trainer


def train_with_progress(folder: Run, *, resume: bool = False, label: str = "", line: int = 0) -> Outcome:
    """Trains and draws the curves, also those of a run that was interrupted or diverged."""
    trainer = Trainer(folder, resume=resume)
    if not trainer.fabric.is_global_zero:
        return trainer.run()
    settings = folder.settings
    label = label or f"{settings.task} {settings.model}"
    latest = {record["split"]: record for record in folder.read_metrics()}
    # Without a terminal the lines of the evaluations have to do.
    with tqdm(total=settings.steps, initial=trainer.step, desc=label, position=line, unit="step", disable=None) as bar:

        def report(step: int, record: dict[str, Any] | None) -> None:
            if record is None:
                bar.update()
                return
            latest[record["split"]] = record
            shown = {split: f"{latest[split]['loss']:.4f}/{latest[split]['accuracy']:.1%}" for split in latest}
            bar.set_postfix(shown, refresh=False)
            if record["split"] == "test":
                text = ", ".join(f"{split} loss/accuracy {value}" for split, value in shown.items())
                bar.write(f"{label}: step {step}/{settings.steps}: {text}")

        trainer.report = report
        try:
            return trainer.run()
        finally:
            draw(folder, trainer.task.baseline)


def draw(folder: Run, baseline: float | None = None) -> None:
    """Draws loss and accuracy of a run into its folder; nothing when nothing was recorded yet."""
    if records := folder.read_metrics():
        settings = folder.settings
        title = f"{settings.model} on {settings.task}, {settings.hidden_size} units, seed {settings.seed}"
        save_figure(draw_curves({settings.model: records}, title, baseline=baseline), folder.curves_path)


def train_command(folder: Run, *, resume: bool) -> int:
    """`fused-rin train`: trains, says where everything is, and returns the exit code."""
    try:
        outcome = train_with_progress(folder, resume=resume)
    except Diverged as error:
        print(f"fused-rin: training diverged: {error}", file=sys.stderr)
        return 1
    if not is_main_process():
        return INTERRUPTED if outcome.interrupted else 0
    if outcome.interrupted:
        hint = f"go on with: fused-rin train --resume {folder.path}"
        print(f"interrupted after step {outcome.step}; {hint}", file=sys.stderr)
        return INTERRUPTED
    print(
        f"{outcome.step} steps, {1e3 * outcome.seconds_per_step:.2f} ms each; "
        f"test loss {outcome.test['loss']:.4f}, accuracy {outcome.test['accuracy']:.1%}; "
        f"curves: {folder.curves_path}"
    )
    return 0
