"""What the training loop adds to a step: Trainer._train_step against forward, loss, backward and update alone.

python -m benchmarks.loop [RESULTS.json]     one thread, in turns, medians; about a minute
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from fused_rin.experiments.runs import Run
from fused_rin.experiments.settings import Settings
from fused_rin.experiments.training import Trainer

from .table import machine

TASKS = ("mnist", "mnist-rows", "adding", "digits", "babi")
SECONDS = 8.0  # of each task


def measure(task: str, folder: Path) -> dict[str, object]:
    """Milliseconds of a step of `task` with its default settings, and of the bare work on the same batch."""
    settings = Settings.for_task(task, threads=1, device="cpu", steps=10**6)
    trainer = Trainer(Run.new(folder / task, settings))
    model, optimizer = trainer.model.module, trainer.optimizer.optimizer
    batch = trainer.task.train_batch(0, settings.batch_size)

    def bare() -> None:
        loss = trainer.task.loss(model(*batch.inputs), batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    taken: dict[str, list[float]] = {"bare": [], "step": []}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(taken["step"]) < 5:
        for name, call in (("bare", bare), ("step", trainer._train_step)):
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    bare_ms, step_ms = (1e3 * statistics.median(taken[name][1:]) for name in ("bare", "step"))
    return {
        "task": task,
        "batch": settings.batch_size,
        "units": settings.hidden_size,
        "step_ms": round(step_ms, 3),
        "bare_ms": round(bare_ms, 3),
        "overhead": round(1 - bare_ms / step_ms, 4),
    }


def main(results: str = "") -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(task, Path(folder)) for task in TASKS]
    for row in rows:
        print("{task:>12}: step {step_ms:8.3f} ms, bare {bare_ms:8.3f} ms, overhead {overhead:6.1%}".format(**row))
    if results:
        Path(results).write_text(json.dumps({"machine": machine(), "points": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
