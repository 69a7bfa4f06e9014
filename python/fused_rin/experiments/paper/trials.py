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
            yield Trial(f"T{length}", model, figures.ADDING[length][model], settings)


def mnist() -> Iterator[Trial]:
    """RMSprop, learning rate 1e-6, 500 epochs, batch 128, not clipped; one to three layers of 100 and 200 units."""
    for order, table in (("sequential", figures.SEQUENTIAL), ("permuted", figures.PERMUTED)):
        for (layers, units), accuracies in table.items():
            for model, accuracy in accuracies.items():
                settings = _settings(
                    "mnist", model, samples=60_000, epochs=500, batch_size=128, optimizer="rmsprop",
                    learning_rate=1e-6, clip=0.0, permute=order == "permuted", num_layers=layers, hidden_size=units,
                )  # fmt: skip
                yield Trial(f"{order}-{layers}-{units}", model, f"{accuracy:.2f} %", settings)


def babi() -> Iterator[Trial]:
    """Adam, learning rate 1e-3 (IRNN: 1e-4), 100 epochs of 1,000 questions, batch 32, not clipped; 100 units."""
    for task in range(1, 21):
        for model in MODELS:
            settings = _settings(
                "babi", model, samples=1000, epochs=100, batch_size=32, optimizer="adam",
                learning_rate=1e-4 if model == "irnn" else 1e-3, clip=0.0, babi_task=task,
            )  # fmt: skip
            yield Trial(f"task{task:02}", model, f"{figures.BABI[model][task - 1]:.1f} %", settings)


EXPERIMENTS = {"adding": adding, "mnist": mnist, "babi": babi}


def _settings(task: str, model: str, *, samples: int, epochs: int, batch_size: int, **others: Any) -> Settings:
    """Evaluated after every epoch. Nothing comes from what we train a task with where the paper is silent."""
    epoch = samples // batch_size
    chosen = {**COMMON, "steps": epochs * epoch, "eval_every": epoch, "checkpoint_every": epoch, **others}
    return Settings(task, model=model, batch_size=batch_size, **chosen)
