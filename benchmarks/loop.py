"""What the training loop adds to a step: Trainer.train_step against forward, loss, backward and update alone.

    python -m benchmarks.loop [RESULTS.json]                  one thread, in turns, medians; about a minute
    python -m benchmarks.loop [RESULTS.json] --device cuda    and an epoch of every RIN in the paper's Table 1

On a GPU both sides are CUDA graphs. The time of its kernels does not depend on the pixels: where MNIST is not at hand
(FUSED_RIN_DATA) they are random, and the results say so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fused_rin.experiments import tasks
from fused_rin.experiments.data import Labelled, data_folder, read_mnist
from fused_rin.experiments.errors import UserError
from fused_rin.experiments.machine import machine
from fused_rin.experiments.paper import trials
from fused_rin.experiments.training.capture import CapturedUpdate
from fused_rin.experiments.training.runs import Run
from fused_rin.experiments.training.settings import Settings
from fused_rin.experiments.training.trainer import Trainer

TASKS = {"cpu": ("mnist", "mnist-rows", "adding", "digits", "babi"), "cuda": ("mnist", "adding", "digits")}
SECONDS = 8.0  # of each task
TOGETHER = {"cpu": 1, "cuda": 20}  # calls that are timed as one: a GPU is waited for at their end


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    for _ in range(TOGETHER[device]):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / TOGETHER[device]


def measure(task: str, folder: Path, device: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Milliseconds of a step of `task` with its default settings, and of the bare work on the same batch."""
    settings = Settings.for_task(task, threads=1, device=device, steps=10**6)
    trainer = Trainer(Run.new(folder / task, settings))
    model, optimizers = trainer.model.module, [wrapper.optimizer for wrapper in trainer.optimizers]
    batch = trainer.task.train_batch(0, settings.batch_size)

    def work(inputs: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        loss = trainer.task.loss(model(*inputs), target)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    update = CapturedUpdate(work) if trainer.captured else work
    calls = {"bare": lambda: update(batch.inputs, batch.target), "step": trainer.train_step}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken["step"]) < 5:
        for name, call in calls.items():
            taken[name].append(timed(call, device))
    bare_ms, step_ms = (1e3 * statistics.median(taken[name][1:]) for name in ("bare", "step"))
    return {
        "task": task,
        "batch": settings.batch_size,
        "units": settings.hidden_size,
        "step_ms": round(step_ms, 3),
        "bare_ms": round(bare_ms, 3),
        "overhead": round(1 - bare_ms / step_ms, 4),
    }


def epochs(folder: Path, device: str, rounds: int = 3) -> list[dict[str, Any]]:
    """Seconds of an epoch, with its evaluation, of every RIN and RIN-DT of Table 1's sequential half."""
    rows = []
    for trial in trials.mnist():
        if not trial.row.startswith("sequential") or not trial.model.startswith("rin"):
            continue
        settings = dataclasses.replace(trial.settings, device=device)
        trainer = Trainer(Run.new(folder / trial.name(0), settings))
        timed(trainer.train_step, device)  # captures
        step = statistics.median(timed(trainer.train_step, device) for _ in range(rounds))
        start = time.perf_counter()
        trainer.evaluate()
        evaluation = time.perf_counter() - start
        steps = settings.eval_every
        rows.append(
            {
                "trial": trial.row,
                "model": trial.model,
                "step_ms": round(1e3 * step, 3),
                "evaluation_s": round(evaluation, 3),
                "epoch_s": round(steps * step + evaluation, 3),
                "epochs": settings.steps // steps,
            }
        )
    return rows


def random_mnist(folder: Path) -> tuple[Labelled, Labelled]:
    """Stands in for `data.read_mnist`: as many images, of random pixels."""
    source = torch.Generator().manual_seed(0)

    def part(size: int) -> Labelled:
        images = torch.randint(256, (size, 28, 28), dtype=torch.uint8, generator=source)
        return images, torch.randint(10, (size,), generator=source)

    return part(60_000), part(10_000)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--device", choices=TASKS, default="cpu")
    options = parser.parse_args(arguments)
    device = options.device
    torch.set_num_threads(1)
    about = machine()
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
        try:
            read_mnist(data_folder(""))
        except UserError as error:
            print(f"random pixels instead of MNIST: {error}")
            about["pixels"] = "random"
            tasks.read_mnist = random_mnist
    content: dict[str, Any] = {"machine": about}
    with tempfile.TemporaryDirectory() as folder:
        content["points"] = [measure(task, Path(folder), device) for task in TASKS[device]]
        for row in content["points"]:
            print("{task:>12}: step {step_ms:8.3f} ms, bare {bare_ms:8.3f} ms, overhead {overhead:6.1%}".format(**row))
        if device == "cuda":
            content["table_1"] = epochs(Path(folder), device)
            for row in content["table_1"]:
                text = "{trial} {model}: epoch {epoch_s:.2f} s, step {step_ms:.3f} ms, evaluation {evaluation_s:.2f} s"
                print(text.format(**row))
            hours = sum(row["epoch_s"] * row["epochs"] for row in content["table_1"]) / 3600
            content["table_1_hours"] = round(hours, 3)
            print(f"Table 1, sequential RIN and RIN-DT, all epochs, one after the other: {hours:.2f} h")
    if options.results:
        options.results.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
