"""Does it matter that U is kept, and not U + I, once numbers have few digits? The trials of the experiment.

Near 1 a bfloat16 has a step of 2^-7 or 2^-8, near 0.01 one of 2^-14. A trained network's V = U + I has about 1 on its
diagonal and small numbers elsewhere, its U small numbers everywhere. So the same network is kept in both ways:

    rounding    trained in float32; then the recurrent matrix alone is rounded to a type, as U and as V. What runs it
                computes in float32, what is compared is in float64: the test score, and how far the states go astray.
    training    in bfloat16, with the parameter U and with the parameter V: "bf16-mixed" (torch's autocast, weights in
                float32, rounded for every call) and "bf16-true" (weights and the optimizer's sums are bfloat16).

All trainings of a seed have the same first weights (but for their rounding) and the same batches.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_rin import RIN

from ..models import SequenceModel
from ..tasks import Task
from ..training.loop import Loop
from ..training.optimizers import make_optimizers
from ..training.settings import Settings
from ..training.trainer import make_fabric

FORMS = ("u", "v")  # which matrix is the one with few digits: U, or V = U + I
TRAININGS = ("32-true", "bf16-mixed", "bf16-true")
LOST = 100  # times the loss of an answer that looks at nothing: a network that has diverged
PROBE = 100  # test sequences whose states are compared


def _to_type(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda matrix: matrix.to(dtype).to(matrix.dtype)


def _scaled_by_rows(largest: float, rounded: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A scale for every row, so that its largest number becomes `largest`: as weights are usually quantised."""

    def quantised(matrix: Tensor) -> Tensor:
        scale = (matrix.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        return rounded(matrix / scale) * scale

    return quantised


# How a matrix is rounded, by the name of the type. float8 is E4M3.
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": _to_type(torch.bfloat16),
    "float16": _to_type(torch.float16),
    "float8": _scaled_by_rows(448.0, lambda matrix: matrix.float().to(torch.float8_e4m3fn).to(matrix.dtype)),
    "int8": _scaled_by_rows(127.0, torch.round),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained on one task."""

    updates: int
    settings: dict[str, Any]  # beside the defaults of the task, see `Settings`

    def to_settings(self, task: str, seed: int = 0, **others: Any) -> Settings:
        return Settings.for_task(task, **{"steps": self.updates, "seed": seed, **self.settings, **others})


PLANS = {
    "digits": Plan(2400, {}),
    "adding": Plan(2200, {}),
    # The recipe of docs/reproduction.md without its cycles, with which V is no longer near to I.
    "mnist": Plan(
        1875,
        {
            **{"hidden_size": 128, "input_std": 0.64, "batch_size": 32, "state_noise": 0.1},
            **{"learning_rate": 3e-3, "recurrent_rate": 0.025, "bias_rate": 0.0125},
            **{"schedule": "cosine", "warmup": 0.05},
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run."""

    task: str
    training: str  # of TRAININGS
    form: str  # of FORMS: the parameter
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.task}-{self.training}-{self.form}-seed{self.seed}"


def trials(seeds: int) -> Iterator[Trial]:
    """All training runs, seed after seed. In float32 both forms walk the same path: one is trained."""
    for seed in range(seeds):
        for task in PLANS:
            for training in TRAININGS:
                for form in FORMS[:1] if training == "32-true" else FORMS:
                    yield Trial(task, training, form, seed)


def run_trial(trial: Trial, task: Task, updates: int) -> list[dict[str, Any]]:
    """Trains one network over `updates` updates; returns its one record."""
    settings = PLANS[trial.task].to_settings(
        trial.task, trial.seed, precision=trial.training, steps=updates, device="cpu"
    )
    model = settings.build_model(task)
    assert isinstance(model, SequenceModel)
    if trial.form == "v":
        assert isinstance(model.rnn, RIN)
        model.rnn = RIN.from_rnn(model.rnn.to_rnn(), skip=0.0)
    loop = Loop(settings, make_fabric(settings), task, model, make_optimizers(settings, model))
    while loop.step < updates:
        loop.train_step()
    record = {**dataclasses.asdict(trial), "step": loop.step, "last": True}
    if not all(bool(weight.isfinite().all()) for weight in loop.weights):
        return [{**record, "diverged": True}]
    record |= loop.evaluate()
    if not record["loss"] < LOST * task.baseline:
        return [{**record, "loss": None, "accuracy": None, "diverged": True}]
    if trial.training == "32-true":
        record |= rounding(loop, model)
    return [record]


def rounding(loop: Loop, model: SequenceModel) -> dict[str, Any]:
    """Of a model in float32 with the parameter U: "rounded", its test loss and accuracy by type and form, and "astray",
    ||h'_t - h_t|| / ||h_t|| at the steps of "steps", over `PROBE` test sequences; and the largest of |U| and |V|.
    """
    weight = model.rnn.weight_hh_l0
    assert isinstance(weight, Tensor)
    exact = weight.detach().clone()
    inputs = next(loop.task.test_batches(PROBE)).inputs
    states = _states(model.rnn, *inputs)
    steps = _spread(len(states))
    eye = torch.eye(len(exact))
    rounded: dict[str, dict[str, Any]] = {}
    astray: dict[str, dict[str, list[float | None]]] = {}
    for name, rounds in ROUNDINGS.items():
        rounded[name], astray[name] = {}, {}
        for form in FORMS:
            # In float64 first: there U + I is exact, and so is taking I away again.
            few = rounds(exact.double()) if form == "u" else rounds(exact.double() + eye) - eye
            with torch.no_grad():
                weight.copy_(few)
            rounded[name][form] = loop.evaluate()
            moved = _states(model.rnn, *inputs)
            astray[name][form] = [_distance(moved[t - 1], states[t - 1]) for t in steps]
    with torch.no_grad():
        weight.copy_(exact)
    largest = {"u": exact.abs().max().item(), "v": (exact + eye).abs().max().item()}
    return {"rounded": rounded, "steps": steps, "astray": astray, "largest": largest}


@torch.no_grad()
def _states(rnn: nn.Module, x: Tensor) -> Tensor:
    """[T, B, hidden_size], computed in float64 from the weights as they are."""
    return copy.deepcopy(rnn).double()(x.double())[0]


def _distance(moved: Tensor, exact: Tensor) -> float | None:
    """None where there is nothing to compare with, or too much of it."""
    distance = ((moved - exact).norm() / exact.norm()).item()
    return distance if math.isfinite(distance) else None


def _spread(length: int) -> list[int]:
    """Steps from 1 to `length`, three to a doubling."""
    count = round(3 * math.log2(length)) + 1
    return sorted({round(length ** (i / (count - 1))) for i in range(count)})
