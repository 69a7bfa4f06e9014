"""The settings of the paper's experiments: one trial for each cell of its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ..training.settings import Settings
from . import figures

MODELS = ("rin", "irnn", "lstm")
# The first weights are the paper's in all experiments; its optimizers and its constant learning rates are plain ones.
COMMON = {"input_std": 1e-3, "recurrent_std": 1e-3, "log_every": 50}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One cell of a table: where it stands (row, model), what the paper has there, and how to train it."""

    row: str
    model: str
    paper: str
    settings: Settings  # of seed 0 and the whole number of epochs
    epoch: int  # steps

    @property
    def epochs(self) -> int:
        """The paper's."""
        return self.settings.steps // self.epoch

    def name(self, seed: int) -> str:
        return f"{self.row}-{self.model}-seed{seed}"


def adding() -> Iterator[Trial]:
    """Adam, 300 epochs of 100,000 sequences, batch 32, clip 100; lengths 200, 300, 400, one layer of 100 units."""
    for length, rate in figures.ADDING_RATES.items():
        for model in MODELS:
            settings = _settings(
                "adding", model, samples=100_000, epochs=300, batch_size=32, optimizer="adam", learning_rate=rate,
                clip=100.0, length=length, train_size=100_000, test_size=10_000,
            )  # fmt: skip
            yield Trial(f"T{length}", model, figures.ADDING[length][model], *settings)


def mnist() -> Iterator[Trial]:
    """RMSprop, learning rate 1e-6, 500 epochs, batch 128, not clipped; one to three layers of 100 and 200 units."""
    for order, table in (("sequential", figures.SEQUENTIAL), ("permuted", figures.PERMUTED)):
        for (layers, units), accuracies in table.items():
            for model, accuracy in accuracies.items():
                settings = _settings(
                    "mnist", model, samples=60_000, epochs=500, batch_size=128, optimizer="rmsprop",
                    learning_rate=1e-6, clip=0.0, permute=order == "permuted", num_layers=layers, hidden_size=units,
                )  # fmt: skip
                yield Trial(f"{order}-{layers}-{units}", model, f"{accuracy:.2f} %", *settings)


def babi() -> Iterator[Trial]:
    """Adam, learning rate 1e-3 (IRNN: 1e-4), 100 epochs of 1,000 questions, batch 32, not clipped; 100 units."""
    return _babi(clip=0.0)


def babi_stable() -> Iterator[Trial]:
    """As `babi`, and what keeps a recurrent network from diverging: gradients clipped at 1, a rate that falls to 0."""
    return _babi(clip=1.0, schedule="cosine")


def _babi(**others: Any) -> Iterator[Trial]:
    """Evaluated every fifth epoch: a task has as many test as training questions, a third of the time of an epoch."""
    for task in range(1, 21):
        for model in MODELS:
            settings = _settings(
                "babi", model, samples=1000, epochs=100, batch_size=32, optimizer="adam",
                learning_rate=1e-4 if model == "irnn" else 1e-3, babi_task=task, every=5, **others,
            )  # fmt: skip
            yield Trial(f"task{task:02}", model, f"{figures.BABI[model][task - 1]:.1f} %", *settings)


EXPERIMENTS = {"adding": adding, "mnist": mnist, "babi": babi, "babi-stable": babi_stable}


def _settings(
    task: str, model: str, *, samples: int, epochs: int, batch_size: int, every: int = 1, **others: Any
) -> tuple[Settings, int]:
    """Settings and the steps of an epoch. Evaluated after `every` so many epochs. Nothing comes from what we train a
    task with where the paper is silent.
    """
    epoch = samples // batch_size
    chosen = {**COMMON, "steps": epochs * epoch, "eval_every": every * epoch, "checkpoint_every": every * epoch}
    return Settings(task, model=model, batch_size=batch_size, **{**chosen, **others}), epoch
