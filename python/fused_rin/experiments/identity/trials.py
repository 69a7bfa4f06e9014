"""Does a pull towards the identity help, and does it survive more data? The trials of the experiment.

A ReLU network whose recurrent matrix starts as V = U + I is trained from the same first weights on the same
batches in four arms, over sizes of the training set, strengths of decay, optimizers and seeds:

    u-decay      U decays: V is pulled to the identity, to remembering
    v-decay      V decays: it is pulled to zero, to forgetting
    none         nothing decays
    small-rate   nothing decays; a quarter of the learning rate over four times the updates

A strength is a constant, or a prior's: equal to a constant at the smallest training set, falling as 1/N from
there (`fused_rin.identity_prior.prior_strength`). The number of updates is the same for every N, but for a plan whose
updates grow with N: that is a fixed number of epochs. Decay has one
of two forms: "penalty" adds strength * weight to the gradient of the data, which Adam and RMSprop then
normalise; "decoupled" shrinks the weight by rate * strength before every update. Under SGD they are the same;
the second is run under Adam. The gradient of the data is clipped, the decay is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fused_rin import RIN, diagnostics
from fused_rin.identity_prior import decoupled, identity_distance, param_groups, prior_strength, recurrent_matrices

from ..tasks import Batch, Classification
from ..training.loop import Loop
from ..training.settings import Settings
from ..training.trainer import make_fabric

FORMS = {"sgd": ("penalty",), "rmsprop": ("penalty",), "adam": ("penalty", "decoupled")}
# By form; a decoupled decay of 1 / (mean rate * updates), 5 under Adam here, shrinks a weight to 1/e.
STRENGTHS: dict[str, tuple[float, ...]] = {"penalty": (0.01, 0.1, 1.0), "decoupled": (0.1, 1.0, 10.0)}
ANCHORS: dict[str, tuple[float, ...]] = {
    "penalty": (0.1, 1.0),
    "decoupled": (10.0,),
}  # what a prior's strength is at the smallest N
SLOWER = 4  # how much smaller the small learning rate is, and over how many times the updates
CLIP = 1.0
RECORDED = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # shares of the updates
PROBE = 256  # training samples of which loss and gradients are recorded
ALONG_THE_WAY = 4  # test batches of every record but the last, which has the whole test set
STEPS_KEPT = 16  # of the gradient against the time step
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained on one task."""

    task: str
    sizes: tuple[int, ...]  # of the training set
    updates: int  # at the smallest N; at others too, unless they grow
    rates: dict[str, float]  # first learning rate by optimizer; it falls to 0 along half a cosine
    settings: dict[str, Any]  # everything else, see `Settings`
    grows: bool = False  # updates are proportional to N
    strengths: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=lambda: STRENGTHS)
    anchors: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=lambda: ANCHORS)

    def to_settings(self, task: str, seed: int = 0, **others: Any) -> Settings:
        return Settings(task=self.task, seed=seed, **self.settings, **others)

    def updates_at(self, samples: int, updates: int) -> int:
        """`updates` at the smallest N are so many at this one."""
        return round(updates * samples / self.sizes[0]) if self.grows else updates


PLANS = {
    "digits": Plan(
        task="digits",
        sizes=(90, 360, 1437),
        updates=400,
        rates={"sgd": 0.1, "rmsprop": 1e-3, "adam": 1e-3},
        settings={"hidden_size": 64, "batch_size": 32, "input_std": 1.0, "recurrent_std": 0.01},
    ),
    "mnist-rows": Plan(
        task="mnist-rows",
        sizes=(300, 4000, 60000),
        updates=400,
        rates={"sgd": 0.1, "rmsprop": 1e-3, "adam": 1e-3},
        settings={"hidden_size": 64, "batch_size": 64, "input_std": 0.1, "recurrent_std": 1e-3},
    ),
    # The same for a fixed number of epochs: is it the updates that drown a prior, or the data?
    "mnist-rows-epochs": Plan(
        task="mnist-rows",
        sizes=(300, 3000, 30000),
        updates=400,
        grows=True,
        rates={"sgd": 0.1, "adam": 1e-3},
        settings={"hidden_size": 64, "batch_size": 64, "input_std": 0.1, "recurrent_std": 1e-3},
        strengths={"penalty": (0.1,), "decoupled": (10.0,)},
        anchors={"penalty": (0.1,), "decoupled": (10.0,)},
    ),
    # Pixel by pixel, 784 steps, where keeping the identity should matter most.
    "mnist-784": Plan(
        task="mnist",
        sizes=(4000, 60000),
        updates=2000,
        rates={"rmsprop": 1e-4, "adam": 1e-4},
        settings={"hidden_size": 64, "batch_size": 64, "input_std": 0.1, "recurrent_std": 1e-3},
        strengths={"penalty": (0.01, 0.1, 1.0), "decoupled": ()},
        anchors={"penalty": (0.1,), "decoupled": ()},
    ),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run."""

    task: str
    optimizer: str
    samples: int
    arm: str
    form: str = ""  # "penalty" or "decoupled"; empty where nothing decays
    strength: float = 0.0
    prior: float = 0.0  # of a prior: what its strength is at the smallest N; 0: the strength is a constant
    seed: int = 0

    @property
    def name(self) -> str:
        decay = f"-{self.form}-{f'prior{self.prior:g}' if self.prior else f'{self.strength:g}'}" if self.form else ""
        return f"{self.task}-{self.optimizer}-N{self.samples}-{self.arm}{decay}-seed{self.seed}"


def trials(seeds: int) -> Iterator[Trial]:
    """All training runs, seed after seed, so that an interrupted experiment has whole seeds."""
    for seed in range(seeds):
        for task, plan in PLANS.items():
            for optimizer in plan.rates:
                for samples in plan.sizes:
                    yield Trial(task, optimizer, samples, "none", seed=seed)
                    if not plan.grows:  # four times as many updates again are hours
                        yield Trial(task, optimizer, samples, "small-rate", seed=seed)
                    for form in FORMS[optimizer]:
                        for arm in ("u-decay", "v-decay"):
                            for strength in plan.strengths[form]:
                                yield Trial(task, optimizer, samples, arm, form, strength, seed=seed)
                        if samples > plan.sizes[0]:  # there a prior and its constant are the same
                            for anchor in plan.anchors[form]:
                                sigma = 1 / math.sqrt(anchor * plan.sizes[0])
                                strength = prior_strength(sigma, samples)
                                yield Trial(task, optimizer, samples, "u-decay", form, strength, anchor, seed)


def first_model(task: Classification, trial: Trial, plan: Plan) -> nn.Module:
    """The network of a trial with its first weights, the same of a seed in every arm: U is the parameter,
    or, where V decays, V = U + I.
    """
    model = plan.to_settings(trial.task, trial.seed).build_model(task)
    return to_v_form(model) if trial.arm == "v-decay" else model


def to_v_form(model: nn.Module) -> nn.Module:
    """The same function of the same weights, with V = U + I as its parameter."""
    assert isinstance(model.rnn, RIN)
    model.rnn = RIN.from_rnn(model.rnn.to_rnn(), skip=0.0)
    return model


def make_optimizer(model: nn.Module, trial: Trial, plan: Plan) -> torch.optim.Optimizer:
    """The optimizer of a trial, in which only the recurrent matrix decays."""
    groups: list[dict[str, Any]]
    if trial.arm == "v-decay":
        matrices = [weight for name, weight in model.named_parameters() if "weight_hh" in name]
        others = [weight for name, weight in model.named_parameters() if "weight_hh" not in name]
        groups = [{"params": matrices, "weight_decay": trial.strength}, {"params": others}]
    else:
        groups = param_groups(model, identity_decay=trial.strength)
    optimizer = OPTIMIZERS[trial.optimizer](groups, lr=plan.rates[trial.optimizer])
    return decoupled(optimizer) if trial.form == "decoupled" else optimizer


def run_trial(trial: Trial, task: Classification, plan: Plan, updates: int) -> list[dict[str, Any]]:
    """Trains one network over `updates` updates (`SLOWER` times as many at the small rate); returns its
    records, the last one with "last": True, and "diverged": True where the numbers became too large.
    """
    model, data = first_model(task, trial, plan), task.subset(trial.samples, trial.seed)
    slower = SLOWER if trial.arm == "small-rate" else 1
    updates = plan.updates_at(trial.samples, updates) * slower
    settings = dataclasses.replace(
        plan.to_settings(trial.task, trial.seed, learning_rate=plan.rates[trial.optimizer] / slower, schedule="cosine"),
        steps=updates,
        batch_size=min(plan.settings["batch_size"], trial.samples),
        clip=CLIP,
        device="cpu",
    )
    loop = Loop(settings, make_fabric(settings), data, model, [make_optimizer(model, trial, plan)])
    due = {round(share * updates) for share in RECORDED}
    probe = data.train_batch(0, min(PROBE, trial.samples))
    records: list[dict[str, Any]] = []
    norms: list[float] = []

    def record(step: int, **values: Any) -> None:
        records.append({**dataclasses.asdict(trial), "step": step, **values})

    for step in range(updates + 1):
        if step in due:
            measured = _measure(loop, model, probe, trial)
            if measured is None:
                record(step, diverged=True)
                break
            record(step, **measured, gradient_norm=sum(norms) / len(norms) if norms else None)
            norms.clear()
        if step == updates:
            break
        loop.train_step()
        norms.append(loop.norm.item())
        if not math.isfinite(norms[-1]):
            record(step, diverged=True)
            break
    records[-1]["last"] = True
    return records


def _measure(loop: Loop, model: nn.Module, probe: Batch, trial: Trial) -> dict[str, Any] | None:
    """Accuracies, what V is, and gradients of the loss of the data alone; None where not all is finite."""
    data = loop.task
    tested = loop.evaluate(None if loop.step == loop.settings.steps else ALONG_THE_WAY)
    output = model(*probe.inputs)
    loss = data.loss(output, probe.target)
    parameters = dict(model.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))
    norm = nn.utils.get_total_norm(gradients.values())
    if not (norm.isfinite() and all(weight.isfinite().all() for weight in parameters.values())):
        return None
    over_time = diagnostics.gradient_norms(model, probe.inputs, lambda output: data.loss(output, probe.target))
    ((name, _),) = recurrent_matrices(model)
    return {
        "accuracy": tested["accuracy"],
        "train_loss": loss.item(),
        "train_accuracy": data.correct(output, probe.target).float().mean().item(),
        "distance": identity_distance(model)[name],
        "radius": diagnostics.eigenvalues(model)[name].abs().max().item(),
        # What the optimizer gets of the data and of the decay for the recurrent matrix.
        "gradient": gradients[name].norm().item() * min(1.0, CLIP / norm.item()),
        "pull": trial.strength * parameters[name].norm().item(),
        "over_time": [[t, over_time[t].item()] for t in _spread(len(over_time))],
    }


def _spread(length: int) -> list[int]:
    """`STEPS_KEPT` steps or fewer from the first to the last."""
    return sorted({round(i * (length - 1) / (STEPS_KEPT - 1)) for i in range(STEPS_KEPT)})
