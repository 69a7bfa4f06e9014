"""A training run: one process or several, on any device and in any precision of Lightning Fabric.

A run resumes bit for bit. Everything random comes from (seed, purpose, step), so what a run has to remember
is the model, the optimizer, the step and the sums since the last log line; a checkpoint holds just these.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from ..errors import UserError
from .checkpoints import AtomicCheckpointIO, check_model_state
from .loop import Diverged, Loop
from .optimizers import load_optimizer, make_optimizers
from .runs import Run
from .settings import Settings

Report = Callable[[int, "dict[str, Any] | None"], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training run stands when `Trainer.run` returns."""

    step: int
    interrupted: bool
    test: dict[str, Any]  # the newest test record of the metrics; empty if there is none
    seconds_per_step: float  # of this call, without evaluation and checkpoints


class Trainer(Loop):
    """Trains the model of a run up to `folder.settings.steps`, leaving metrics and checkpoints in its folder.

    Args:
        folder: the run's folder. Made by `run()` unless `resume`, which goes on from the checkpoint in it.
        report: called as `report(step, record)` with every record added to the metrics, and with None after
        every step.

    Raises UserError when settings, checkpoint or device cannot be used.
    """

    def __init__(self, folder: Run, resume: bool = False, report: Report | None = None):
        settings = folder.settings
        self.folder, self.report = folder, report or (lambda step, record: None)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        fabric = make_fabric(settings)
        fabric.launch()
        if settings.batch_size % fabric.world_size:
            raise UserError(
                f"batch_size must be a multiple of the number of processes, {fabric.world_size}, "
                f"got {settings.batch_size}"
            )
        task = settings.build_task(fabric.device)
        if settings.batch_size > (task.train_size or math.inf):
            raise UserError(
                f"batch_size must be at most {task.train_size}, the samples of {settings.task}, "
                f"got {settings.batch_size}"
            )
        module = settings.build_model(task)
        captured = can_capture(settings, fabric)
        optimizers = make_optimizers(settings, module, fabric.device if captured else None)
        super().__init__(settings, fabric, task, module, optimizers, captured)
        self.seconds = 0.0
        self.resume = resume
        if resume:
            if self.fabric.is_global_zero:
                folder.claim()
            try:
                self._load()
            except BaseException:
                folder.release()
                raise

    def run(self) -> Outcome:
        """Runs the remaining steps. SIGINT and SIGTERM end it after the step in hand, with a checkpoint of that step.

        Raises UserError when the disk refuses or another process trains in the folder, and Diverged.
        """
        try:
            return self._run()
        finally:
            self.folder.release()

    def _run(self) -> Outcome:
        settings = self.settings
        first, pauses = self.step, 0.0
        start, before = time.perf_counter(), self.seconds
        if not self.resume and self.fabric.is_global_zero:
            self.folder.create()
        with _deferred_signals() as received:
            if self.step == 0:
                self._save()  # so that a run interrupted in its first steps can go on, too
            while self.step < settings.steps:
                self.train_step()
                self.report(self.step, None)
                pause = time.perf_counter()
                self.seconds = before + pause - start
                if self.due(settings.log_every):
                    self._record("train", self.collect())
                if self.due(settings.eval_every):
                    self._record("test", self.evaluate())
                stop = self._agree_to_stop(bool(received))
                if stop or self.due(settings.checkpoint_every):
                    self._save()
                pauses += time.perf_counter() - pause
                if stop:
                    break
        steps = self.step - first
        tests = [record for record in self.folder.read_metrics() if record["split"] == "test"]
        return Outcome(
            step=self.step,
            interrupted=self.step < settings.steps,
            test=tests[-1] if tests else {},
            seconds_per_step=(time.perf_counter() - start - pauses) / steps if steps else 0.0,
        )

    def _record(self, split: str, values: dict[str, float]) -> None:
        if self.fabric.is_global_zero:
            record = {"step": self.step, "split": split, **values, "seconds": round(self.seconds, 3)}
            self.folder.append_metrics(record)
            self.report(self.step, record)

    def _agree_to_stop(self, received: bool) -> bool:
        """Whether to stop now. Processes see a signal at different steps: they vote, with the log lines."""
        if self.part.world == 1:
            return received
        if not self.due(self.settings.log_every):
            return False
        vote = torch.tensor(float(received), device=self.fabric.device)
        return bool(self._over_processes(vote))

    def _save(self) -> None:
        if not all(bool(weight.isfinite().all()) for weight in self.weights):
            raise Diverged(f"a weight became infinite or NaN shortly before step {self.step}")
        state = {
            "settings": self.settings.to_dict(),
            "model": self.model,
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "totals": self._over_processes(self.totals.clone()),
        }
        if self.fabric.is_global_zero:
            self.folder.sync_metrics()  # what a run that goes on from this checkpoint will not record again
        self.fabric.save(self.folder.checkpoint_path, state)

    def _load(self) -> None:
        path = self.folder.checkpoint_path
        if not path.exists() and not self.folder.read_metrics():
            return  # interrupted before its first checkpoint
        checkpoint = self.fabric.load(path)
        try:
            self.settings.refuse_change(Settings.from_dict(checkpoint["settings"]), "it")
            check_model_state(checkpoint["model"], self.model)
            self.model.load_state_dict(checkpoint["model"])
            for name, mean in self.average.items():
                mean.copy_(checkpoint["average"][name])
            for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                load_optimizer(optimizer, state)
            if self.fabric.is_global_zero:  # they are the sums of all processes
                self.totals.copy_(checkpoint["totals"])
            self.step, self.seconds = int(checkpoint["step"]), float(checkpoint["seconds"])
        except (UserError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: does not fit this run: {error}") from error
        if self.fabric.is_global_zero:
            self.folder.rewind_metrics(self.step)


def make_fabric(settings: Settings) -> Fabric:
    """Fabric for these settings: one device, or as many processes as torchrun has started."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    precision: Any = settings.precision  # Fabric names every one in a type
    try:
        return Fabric(
            accelerator=settings.device,
            devices=local,
            num_nodes=world // local,
            # A RIN has no buffers; there is nothing to broadcast before a step.
            strategy=DDPStrategy(broadcast_buffers=False) if world > 1 else "auto",
            precision=precision,
            plugins=[AtomicCheckpointIO()],
        )
    except Exception as error:  # Fabric has several kinds of its own for a device that is not there
        raise UserError(f"device {settings.device!r} cannot be used: {str(error).splitlines()[0]}") from error


def can_capture(settings: Settings, fabric: Fabric) -> bool:
    """Whether the update becomes a CUDA graph: on a GPU, unless several processes share it out or it is unwanted."""
    return settings.graph and fabric.device.type == "cuda" and fabric.world_size == 1


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of acting on them; the second one acts as it does outside.

    Only the main thread may set handlers; elsewhere nothing is collected.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def collect(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, collect)
    try:
        yield received
    finally:
        restore()
