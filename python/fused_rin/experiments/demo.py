"""The demonstration: does a Recurrent Identity Network learn what it should, and how fast is it here?

Under three minutes on two cores. Everything it makes lies in one folder; a second call replaces it.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .bars import WIDTH
from .errors import INTERRUPTED, UserError, drop_output
from .files import FolderLock, is_free, reporting, write_atomically
from .models import count_parameters
from .plots import draw_curves, save_figure
from .timing import Timing, compare
from .training.progress import train_with_progress
from .training.runs import Run
from .training.settings import Settings
from .training.trainer import Diverged

FORMAT = "fused-rin demo"
ADDING_LIMIT = 0.01  # test error RIN has to stay under; always answering 1 gives 0.167
DIGITS_LIMIT = 0.93  # test accuracy RIN has to reach
# One budget, one optimizer, one learning rate and one clipping for the three; see `Settings` for the rest. One
# thread each, so that the numbers do not depend on the machine's cores.
ADDING = Settings.for_task("adding", length=200, hidden_size=100, threads=1)
DIGITS = Settings.for_task("digits", model="rin", threads=1)
NAMES = {"rin": "RIN", "rnn": "tanh nn.RNN", "lstm": "nn.LSTM"}
# (steps, batch, input_size, hidden): what the demo itself trains, one sequence at a time, and a larger batch.
TIMED = ((200, 32, 2, 100), (512, 1, 128, 128), (128, 64, 128, 128))


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run of the demo, and what RIN has to reach in it."""

    folder: Path
    settings: Settings
    line: int  # where its progress bar is shown

    @property
    def label(self) -> str:
        return f"{self.settings.task}, {NAMES[self.settings.model]}"

    @property
    def demanded(self) -> str | None:
        if self.settings.model != "rin":
            return None
        return f"loss < {ADDING_LIMIT}" if self.settings.task == "adding" else f"accuracy >= {DIGITS_LIMIT:.0%}"


@dataclasses.dataclass(frozen=True)
class Result:
    """How a job ended; NaN where it diverged. `passed` is None where nothing was demanded."""

    label: str
    parameters: int
    demanded: str | None
    loss: float = float("nan")
    accuracy: float = float("nan")
    milliseconds: float = float("nan")  # per training step
    interrupted: bool = False

    @property
    def passed(self) -> bool | None:
        if self.demanded is None:
            return None
        return self.loss < ADDING_LIMIT if self.demanded.startswith("loss") else self.accuracy >= DIGITS_LIMIT


def demo(out: Path) -> int:
    """Runs everything and prints one table. Returns 0, or 1 when RIN did not reach what it has to."""
    lock = FolderLock(out)
    try:
        _prepare(out, lock)
        return _demo(out)
    finally:
        lock.release()


def _demo(out: Path) -> int:
    started = time.perf_counter()
    jobs = _jobs(out)
    # The longest first. Spawned, not forked: torch's thread pool does not survive a fork.
    workers = ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    try:
        results = list(workers.map(run_job, jobs))
    finally:
        workers.shutdown(cancel_futures=True)
    if any(result.interrupted for result in results):
        return INTERRUPTED

    adding, digits = out / "adding.png", out / "digits.png"
    curves = {job.label: Run.open(job.folder).read_metrics() for job in jobs}
    several = {label: records for label, records in curves.items() if label.startswith("adding")}
    title = f"Adding problem, T={ADDING.length}, {ADDING.hidden_size} units, test set"
    save_figure(draw_curves(several, title, baseline=1 / 6, splits=("test",)), adding)
    one = {label: records for label, records in curves.items() if label not in several}
    save_figure(draw_curves(one, f"Sequential digits, {DIGITS.hidden_size} units"), digits)

    timings = [timing for shape in TIMED for timing in compare(*shape)]
    report = {
        "format": FORMAT,
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "results": [{**dataclasses.asdict(result), "passed": result.passed} for result in results],
        "timings": [dataclasses.asdict(timing) for timing in timings],
    }
    with reporting(out, "write the results"):
        write_atomically(out / "results.json", (json.dumps(report, indent=2) + "\n").encode())
    print("\n" + table(results, timings))
    print(f"\nPictures: {adding}, {digits}\nNumbers: {out / 'results.json'}. Took {report['seconds']:.0f} s.")
    failed = [result for result in results if result.passed is False]
    for result in failed:
        print(f"FAILED: {result.label} has to reach {result.demanded}", file=sys.stderr)
    return 1 if failed else 0


def run_job(job: Job) -> Result:
    """Trains one run, in a process of its own."""
    task = job.settings.build_task()
    result = Result(job.label, count_parameters(job.settings.build_model(task)), job.demanded)
    try:
        outcome = train_with_progress(Run.new(job.folder, job.settings), label=job.label, line=job.line)
    except Diverged as error:
        print(f"{job.label}: diverged: {error}", file=sys.stderr)
        return result
    except OSError:
        drop_output()
        raise
    if outcome.interrupted:
        return dataclasses.replace(result, interrupted=True)
    return dataclasses.replace(
        result,
        loss=outcome.test["loss"],
        accuracy=outcome.test["accuracy"],
        milliseconds=1e3 * outcome.seconds_per_step,
    )


def table(results: list[Result], timings: list[Timing]) -> str:
    """All that was learnt and timed, as text."""
    rows: list[tuple[str, ...]] = [("trained", "weights", "test loss", "accuracy", "ms/step", "demanded")]
    for result in results:
        verdict = {None: "", True: f"{result.demanded}: yes", False: f"{result.demanded}: NO"}[result.passed]
        measured = (f"{result.loss:.4f}", f"{result.accuracy:.1%}", f"{result.milliseconds:.1f}")
        rows.append((result.label, f"{result.parameters:,}", *measured, verdict))
    lines = _columns(rows)
    lines += textwrap.wrap(
        f"Adding, T={ADDING.length}: {ADDING.steps} steps of batch {ADDING.batch_size}, Adam (eps {ADDING.eps:g}), "
        f"learning rate {ADDING.learning_rate:g} (rising over {ADDING.warmup:.0%} of the steps, then "
        f"{ADDING.schedule}), gradient clipped at {ADDING.clip:g}, seed {ADDING.seed}: the same for all three. "
        "Always answering 1 gives a loss of 0.1667. Digits: pixel after pixel.",
        WIDTH,
    )
    lines.append("")
    rows = [("us per time step", "T", "B", "units", "RIN", "nn.RNN(relu)", "ratio")]
    for timing in timings:
        ours, theirs = (1e6 * seconds / timing.steps for seconds in (timing.ours, timing.theirs))
        shape = (str(timing.steps), str(timing.batch), str(timing.hidden))
        rows.append((timing.kind, *shape, f"{ours:.2f}", f"{theirs:.2f}", f"{timing.ratio:.1f}x"))
    lines += _columns(rows)
    lines.append(f"Same weights (V = U + I), same results; medians, in turns, {torch.get_num_threads()} threads.")
    return "\n".join(lines)


def _jobs(out: Path) -> list[Job]:
    adding = [
        Job(out / f"adding-{model}", dataclasses.replace(ADDING, model=model), line)
        for line, model in enumerate(("lstm", "rnn", "rin"))
    ]
    return [*adding, Job(out / "digits-rin", DIGITS, len(adding))]


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [texts[0].rstrip(), "-" * (sum(widths) + 2 * len(widths) - 2), *(text.rstrip() for text in texts[1:])]


def _prepare(out: Path, lock: FolderLock) -> None:
    """Takes the folder and empties it; refuses one that is anything but that of an earlier demo."""
    with reporting(out, "use the demo's folder"):
        if not is_free(out) and not _is_demo(out):
            raise UserError(f"{out}: is not empty and not the folder of an earlier demo")
        out.mkdir(parents=True, exist_ok=True)
    lock.take("runs a demo")
    with reporting(out, "use the demo's folder"):
        # First, and it stays: a demo that is killed from here on can be run again.
        write_atomically(out / "demo.json", (json.dumps({"format": FORMAT}) + "\n").encode())
        for path in out.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "demo.json":
                path.unlink()


def _is_demo(out: Path) -> bool:
    try:
        return bool(json.loads((out / "demo.json").read_text())["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False
