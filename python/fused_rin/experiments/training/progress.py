"""Training as a user sees it: a progress bar, a line for every evaluation, and the curves at the end."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timedelta
from typing import Any

from ..bars import Bar, say
from ..errors import INTERRUPTED
from ..plots import draw_curves, save_figure
from .runs import Run, is_main_process
from .trainer import Diverged, Outcome, Trainer

FIRST_SECONDS, LEAST_SECONDS = 5.0, 30.0  # of training before it is said when it will end, and left then


def train_with_progress(folder: Run, *, resume: bool = False, label: str = "", line: int = 0) -> Outcome:
    """Trains and draws the curves, also those of a run that was interrupted or diverged."""
    trainer = Trainer(folder, resume=resume)
    if not trainer.fabric.is_global_zero:
        return trainer.run()
    settings = folder.settings
    label = label or f"{settings.task} {settings.model}"
    latest = {record["split"]: record for record in folder.read_metrics()}
    end = ExpectedEnd(trainer.step, settings.steps)
    # Without a terminal the lines of the evaluations have to do.
    with Bar(label, line, total=settings.steps, initial=trainer.step, unit="step") as bar:

        def report(step: int, record: dict[str, Any] | None) -> None:
            if record is None:
                bar.update()
                if text := end.after(step):
                    say(label, text)
                return
            latest[record["split"]] = record
            shown = {split: f"{_short(values['loss'])}/{values['accuracy']:.1%}" for split, values in latest.items()}
            bar.set_postfix_str(", ".join(f"{split} {value}" for split, value in shown.items()), refresh=False)
            if record["split"] == "test":
                texts = [", ".join(f"{split}{what} {value}" for split, value in shown.items()) for what in LENGTHS]
                say(label, *(f"step {step}/{settings.steps}: {text}" for text in texts))

        trainer.report = report
        try:
            outcome = trainer.run()
        except Diverged:
            draw(folder, trainer.task.baseline)
            raise
    draw(folder, trainer.task.baseline)  # not after a disk that is full: its text would be about the picture
    return outcome


class ExpectedEnd:
    """Says once, from the first steps of a run, when it will end; not of a run that is soon over."""

    def __init__(self, first: int, steps: int):
        self.first, self.steps, self.start, self.said = first, steps, time.monotonic(), False

    def after(self, step: int) -> str:
        """What there is to say after a step; mostly nothing. The evaluations to come are not in it."""
        passed = time.monotonic() - self.start
        if self.said or passed < FIRST_SECONDS:
            return ""
        self.said = True
        rest = timedelta(seconds=round(passed / (step - self.first) * (self.steps - step)))
        if rest.total_seconds() < LEAST_SECONDS:
            return ""
        end = datetime.now() + rest
        return f"{rest} to go without evaluations, until {end:%H:%M}" + (f" on {end:%d %B}" if rest.days else "")


LENGTHS = (" loss/accuracy", "")  # what a line says that the numbers are, where there is room and where there is not


def _short(loss: float) -> str:
    return f"{loss:.1e}" if loss >= 1e4 else f"{loss:.4f}"


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
    test = outcome.test
    print(
        f"{outcome.step} steps, {1e3 * outcome.seconds_per_step:.2f} ms each; "
        f"test loss {_short(test['loss'])}, accuracy {test['accuracy']:.1%}\ncurves: {folder.curves_path}"
    )
    return 0
