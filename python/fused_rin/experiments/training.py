"""The training loop: one process or several, on any device and in any precision of Lightning Fabric.

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
from torch import Tensor

from .capture import CapturedUpdate
from .checkpoints import AtomicCheckpointIO, check_model_state
from .errors import UserError
from .optimizers import load_optimizer, make_optimizers
from .runs import Run
from .seeding import generator
from .settings import MAY_DIFFER, Settings
from .tasks import Part

EVAL_BATCH = 500  # sequences: large enough that latency does not matter, small enough for T=784 at 200 units
Report = Callable[[int, "dict[str, Any] | None"], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training run stands when `Trainer.run` returns."""

    step: int
    interrupted: bool
    test: dict[str, Any]  # the newest test record of the metrics; empty if there is none
    seconds_per_step: float  # of this call, without evaluation and checkpoints


class Diverged(Exception):
    """No gradient since the last log line was finite, or a weight is not; the last checkpoint is from before."""


class Trainer:
    """Trains the model of a run up to `folder.settings.steps`, leaving metrics and checkpoints in its folder.

    Args:
        folder: the run's folder. Made by `run()` unless `resume`, which goes on from the checkpoint in it.
        report: called as `report(step, record)` with every record added to the metrics, and with None after
        every step.

    Raises UserError when settings, checkpoint or device cannot be used.
    """

    def __init__(self, folder: Run, resume: bool = False, report: Report | None = None):
        self.folder, self.settings = folder, folder.settings
        self.report = report or (lambda step, record: None)
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        self.fabric = make_fabric(self.settings)
        self.fabric.launch()
        self.part = Part(self.fabric.global_rank, self.fabric.world_size)
        if self.settings.batch_size % self.part.world:
            raise UserError(
                f"batch_size must be a multiple of the number of processes, {self.part.world}, "
                f"got {self.settings.batch_size}"
            )
        self.task = self.settings.build_task(self.fabric.device)
        if self.settings.batch_size > (self.task.train_size or math.inf):
            raise UserError(
                f"batch_size must be at most {self.task.train_size}, the samples of {self.settings.task}, "
                f"got {self.settings.batch_size}"
            )
        module = self.settings.build_model(self.task)
        self.captured = can_capture(self.settings, self.fabric)
        optimizers = make_optimizers(self.settings, module, self.fabric.device if self.captured else None)
        self.model, *self.optimizers = self.fabric.setup(module, *optimizers)
        self.update = CapturedUpdate(self._update) if self.captured else self._update
        self.weights = list(module.parameters())
        # The moving average of the weights, by name; empty if none is asked for.
        names = dict(module.named_parameters()) if self.settings.ema else {}
        self.average = {name: weight.detach().clone() for name, weight in names.items()}
        # How far it moves towards the weights in a step.
        self.follow = torch.ones((), dtype=self.weights[0].dtype, device=self.fabric.device)
        self.step, self.seconds = 0, 0.0
        self.totals = torch.zeros(4, device=self.fabric.device)  # since the last log line, see `_sums`
        self.resume = resume
        if resume:
            if self.fabric.is_global_zero:
                folder.claim()
            self._load()

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
                self._train_step()
                self.report(self.step, None)
                pause = time.perf_counter()
                self.seconds = before + pause - start
                if self._due(settings.log_every):
                    self._record("train", self._collect())
                if self._due(settings.eval_every):
                    self._record("test", self.evaluate())
                stop = self._agree_to_stop(bool(received))
                if stop or self._due(settings.checkpoint_every):
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

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and accuracy over the test set; of the averaged weights where there is an average."""
        self.model.eval()
        sums = torch.zeros_like(self.totals)
        with self._averaged():
            for inputs, target in self.task.test_batches(EVAL_BATCH, self.part):
                output = self.model(*inputs)
                sums += self._sums(output, target, self.task.loss(output, target))
        self.model.train()
        loss, correct, samples, _ = self._over_processes(sums).tolist()
        return {"loss": loss / samples, "accuracy": correct / samples}

    def _train_step(self) -> None:
        settings = self.settings
        inputs, target = self.task.train_batch(self.step, settings.batch_size, self.part)
        self._set_rates()
        if settings.state_noise:
            inputs = (*inputs, self._noisy_state(target.shape[0]))
        self.update(inputs, target)
        self.step += 1

    def _set_rates(self) -> None:
        """What differs from step to step beside the batch. In tensors where a captured update reads them."""
        rate = self.settings.learning_rate_at(self.step)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if self.captured:
                group["lr"].fill_(rate * group["share"])
            else:
                group["lr"] = rate * group["share"]
        if self.average:  # closely at first: a fixed decay would hold on to the first weights
            self.follow.fill_(1 - min(self.settings.ema, (self.step + 1) / (self.step + 10)))

    def _update(self, inputs: tuple[Tensor, ...], target: Tensor) -> None:
        """One update of the weights, their average and the sums; all that `CapturedUpdate` asks for."""
        output = self.model(*inputs)
        loss = self.task.loss(output, target)
        for weight in self.weights:  # what optimizer.zero_grad() does, without its 0.1 ms in Fabric's wrapper
            weight.grad = None
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.model, self.optimizers[0], max_norm=self.settings.clip or math.inf, error_if_nonfinite=False
        )
        assert norm is not None
        # Where a sequence made the network overflow, clipping has left zeros and NaNs: such a gradient counts as
        # zero. Looking at the norm tells where that is free; elsewhere every step would wait for the device.
        if self.captured or self.fabric.device.type != "cpu" or not norm.isfinite():
            for weight in self.weights:
                if weight.grad is not None:
                    torch.nan_to_num_(weight.grad, nan=0.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self._update_average()
        self.totals += self._sums(output.detach(), target, loss.detach(), norm)

    def _noisy_state(self, batch: int) -> Tensor:
        """h_0 of this step: Gaussian noise, [num_layers, batch, hidden_size] of this process's samples."""
        settings, part = self.settings, self.part
        source = generator(settings.seed, "state noise", self.step)
        noise = torch.randn(settings.num_layers, batch * part.world, settings.hidden_size, generator=source)
        return settings.state_noise * noise[:, part.rank :: part.world].contiguous().to(self.fabric.device)

    @torch.no_grad()
    def _update_average(self) -> None:
        for mean, weight in zip(self.average.values(), self.weights if self.average else (), strict=True):
            mean.lerp_(weight, self.follow)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within, the model has the averaged weights, if there are such."""
        weights = self.weights if self.average else []
        own = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, mean in zip(weights, self.average.values(), strict=True):
                weight.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, own, strict=True):
                    weight.copy_(value)

    def _sums(self, output: Tensor, target: Tensor, loss: Tensor, norm: Tensor | None = None) -> Tensor:
        """Loss, right answers, samples and norm of the gradient, each summed over the samples of a batch.
        With a norm, a batch whose gradient was not finite gives zeros.
        """
        right = self.task.correct(output, target).float().mean()
        sums = torch.stack([loss, right, torch.ones_like(loss), torch.zeros_like(loss) if norm is None else norm])
        sums *= target.shape[0]
        return sums if norm is None else sums.masked_fill(~norm.isfinite(), 0.0)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.steps

    def _collect(self) -> dict[str, float]:
        """The means since the last log line."""
        loss, correct, samples, norm = self._over_processes(self.totals).tolist()
        self.totals.zero_()
        steps = self.step % self.settings.log_every or self.settings.log_every
        skipped = steps - round(samples / self.settings.batch_size)
        if not samples:
            raise Diverged(f"no gradient of the {steps} steps before step {self.step} was finite")
        return {
            "loss": loss / samples,
            "accuracy": correct / samples,
            "gradient_norm": norm / samples,
            "skipped": skipped,
            "learning_rate": self.settings.learning_rate_at(self.step - 1),
        }

    def _record(self, split: str, values: dict[str, float]) -> None:
        if self.fabric.is_global_zero:
            record = {"step": self.step, "split": split, **values, "seconds": round(self.seconds, 3)}
            self.folder.append_metrics(record)
            self.report(self.step, record)

    def _agree_to_stop(self, received: bool) -> bool:
        """Whether to stop now. Processes see a signal at different steps: they vote, with the log lines."""
        if self.part.world == 1:
            return received
        if not self._due(self.settings.log_every):
            return False
        vote = torch.tensor(float(received), device=self.fabric.device)
        return bool(self._over_processes(vote))

    def _over_processes(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`, which may be overwritten."""
        summed = self.fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed

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
        self.fabric.save(self.folder.checkpoint_path, state)

    def _load(self) -> None:
        path = self.folder.checkpoint_path
        if not path.exists() and not self.folder.read_metrics():
            return  # interrupted before its first checkpoint
        checkpoint = self.fabric.load(path)
        try:
            made_with = Settings.from_dict(checkpoint["settings"])
            for field in dataclasses.fields(Settings):
                ours, theirs = getattr(self.settings, field.name), getattr(made_with, field.name)
                if ours != theirs and field.name not in MAY_DIFFER:
                    raise UserError(f"made with {field.name} {theirs}, the run has {ours}")
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
