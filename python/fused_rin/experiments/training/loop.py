"""Updates of a model's weights, one batch of a task after the other; and their evaluation.

Everything random comes from (seed, purpose, step).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ..seeding import generator
from ..tasks import Part, Task
from .capture import CapturedUpdate
from .settings import Settings

# Sequences of a batch in evaluation. A GPU wants many; on a CPU the inputs of 100 sequences stay in its caches: for
# 1,000 questions of 464 words 0.75 s in place of 0.97 s with 500 (one thread of an EPYC, L2 1 MB, L3 32 MB).
EVAL_BATCH, EVAL_BATCH_CPU = 500, 100


class Diverged(Exception):
    """No gradient since the last log line was finite, or a weight is not; the last checkpoint is from before."""


class Loop:
    """A model on its way through a task; `step` counts the updates.

    Args:
        module: the model. optimizers: of its weights. The learning rate of a group is that of the settings at this
        step times its "share", if it has one. captured: whether the update becomes a CUDA graph; the learning rates
        are then tensors.
    """

    def __init__(
        self,
        settings: Settings,
        fabric: Fabric,
        task: Task,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        captured: bool = False,
    ):
        self.settings, self.fabric, self.task, self.captured = settings, fabric, task, captured
        self.part = Part(fabric.global_rank, fabric.world_size)
        self.model, *self.optimizers = fabric.setup(module, *optimizers)
        self.update = CapturedUpdate(self._update) if captured else self._update
        self.weights = list(module.parameters())
        # The moving average of the weights, by name; empty if none is asked for.
        names = dict(module.named_parameters()) if settings.ema else {}
        self.average = {name: weight.detach().clone() for name, weight in names.items()}
        # How far it moves towards the weights in a step.
        self.follow = torch.ones((), dtype=self.weights[0].dtype, device=fabric.device)
        self.step = 0
        self.norm = torch.zeros((), device=fabric.device)  # of the newest gradient, before it was clipped
        self.totals = torch.zeros(4, device=fabric.device)  # since they were collected, see `_sums`

    def train_step(self) -> None:
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
                group["lr"].fill_(rate * group.get("share", 1.0))
            else:
                group["lr"] = rate * group.get("share", 1.0)
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
        self.norm = norm
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

    @torch.no_grad()
    def evaluate(self, batches: int | None = None) -> dict[str, float]:
        """Mean loss and accuracy over the test set, or so many batches of it; of the averaged weights where there is an
        average.
        """
        self.model.eval()
        size = EVAL_BATCH_CPU if self.fabric.device.type == "cpu" else EVAL_BATCH
        sums = torch.zeros_like(self.totals)
        with self._averaged():
            for inputs, target in islice(self.task.test_batches(size, self.part), batches):
                output = self.model(*inputs)
                sums += self._sums(output, target, self.task.loss(output, target))
        self.model.train()
        loss, correct, samples, _ = self._over_processes(sums).tolist()
        return {"loss": loss / samples, "accuracy": correct / samples}

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.steps

    def collect(self) -> dict[str, float]:
        """The means over the steps since the last log line. Raises Diverged."""
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

    def _over_processes(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`, which may be overwritten."""
        summed = self.fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed
