"""Every setting of a training run, checked before anything runs, and written to the run folder as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from . import tasks
from .babi import Babi
from .data import data_folder
from .errors import UserError
from .models import (
    IDENTITY_FIXED,
    MODELS,
    RECURRENT_INITS,
    STATE_GIVEN,
    QuestionModel,
    Recurrent,
    SequenceModel,
    make_rnn,
)
from .seeding import fork_seeded

TASKS = ("adding", "digits", "mnist", "mnist-rows", "babi")
OPTIMIZERS = ("adam", "rmsprop", "sgd")
RECURRENT_OPTIMIZERS = ("same", "muon")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
MAY_DIFFER = (
    "steps",
    "device",
    "threads",
    "graph",
    "data_dir",
)  # between a run and the run that goes on with its checkpoint
# What a task is trained with where nothing else is asked for; everything else as in `Settings`.
# Adding: a network that still answers at random is easily driven over the edge. One Adam step of 1e-3 can add 0.1 to
# the spectral radius of 100 units, and 1.1^200 is 2e8; hence the long warm-up. And the weights of units that are
# seldom active see gradients near 0, which Adam scales up to full steps until one of them explodes; hence eps, which
# is small against the entries of a gradient of norm 1. (With eps 1e-8 one run in nine was lost, at half the rate.)
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "adding": {"learning_rate": 7e-4, "eps": 3e-5, "schedule": "cosine", "warmup": 0.7, "steps": 2200},
    "digits": {
        **{"input_std": 1.0, "recurrent_std": 0.03, "noise": 0.1},
        **{"schedule": "cosine", "steps": 2400, "batch_size": 64},
    },
    "mnist": {"batch_size": 128, "steps": 4680, "eval_every": 468, "learning_rate": 1e-4},
    "mnist-rows": {"batch_size": 128, "steps": 2340, "eval_every": 468},
    "babi": {"steps": 620, "eval_every": 31},
}

# `--recipe best`: one plain layer past the paper's Table 1. docs/reproduction.md says what each part is for, and what
# it has reached.
_MNIST: dict[str, Any] = {
    **{"hidden_size": 128, "input_std": 0.64, "recurrent_std": 1e-3, "batch_size": 32},
    **{"learning_rate": 3e-3, "recurrent_optimizer": "muon", "bias_rate": 0.005, "schedule": "cosine", "warmup": 0.05},
    **{"clip": 1.0, "ema": 0.999, "log_every": 125, "eval_every": 1875, "checkpoint_every": 125},
}
# By name, task and permute.
RECIPES: dict[str, dict[tuple[str, bool], dict[str, Any]]] = {
    "best": {
        ("mnist", False): {
            **_MNIST,
            **{"recurrent_init": "cycles", "recurrent_cycles": "14,27,28,29", "recurrent_rate": 0.03},
            **{"noise": 0.1, "state_noise": 0.5, "steps": 28 * 1875},
        },
        ("mnist", True): {
            **_MNIST,
            **{"recurrent_init": "shift", "recurrent_rate": 0.06, "state_noise": 0.01, "steps": 24 * 1875},
        },
    }
}


@dataclass(frozen=True)
class Settings:
    """What is not given is what a run gets; see `TASK_DEFAULTS` for what suits a task.

    The paper's "N(0, 10^-3)" for the first weights is read as a standard deviation: as a variance, I + U at
    100 units has a spectral radius of 1.31, and a network that multiplies by it 784 times cannot be
    trained.
    """

    task: str
    model: str = "rin"
    length: int = 200  # of the adding problem
    permute: bool = False  # digits, mnist: one fixed random order of the pixels
    noise: float = 0.0  # digits, mnist: standard deviation of Gaussian noise on the training pixels (0..1)
    standardize: bool = False  # digits, mnist: pixels of zero mean and unit variance, instead of 0..1
    babi_task: int = 1  # which of the 20
    data_dir: str = ""  # see `data.data_folder`
    train_size: int = 0  # adding: sequences of the training set; 0: every one is new
    test_size: int = 1000  # adding: sequences of the fixed test set
    hidden_size: int = 100
    num_layers: int = 1
    input_std: float = 0.1
    recurrent_std: float = 1e-3
    recurrent_init: str = "normal"  # see `models.make_rnn`
    recurrent_cycles: str = ""  # of recurrent_init "cycles": their lengths, such as "28,28"
    optimizer: str = "adam"
    recurrent_optimizer: str = "same"  # of the recurrent matrices: the one of all others, or "muon"
    learning_rate: float = 1e-3
    recurrent_rate: float = 1.0  # learning rate of the recurrent matrices, as a share of `learning_rate`,
    bias_rate: float = 1.0  # and of the recurrent layers' biases
    eps: float = 1e-8  # of Adam and RMSprop
    schedule: str = "constant"
    warmup: float = 0.0  # share of the steps over which the learning rate rises
    clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    state_noise: float = 0.0  # standard deviation of Gaussian noise on h_0 of every training batch
    identity_decay: float = 0.0  # decoupled decay of U, that is, of V to the identity
    weight_decay: float = 0.0  # decoupled decay of all other weights but the biases
    ema: float = 0.0  # decay of the moving average of the weights that is evaluated; 0: the weights themselves
    batch_size: int = 32
    steps: int = 1200
    log_every: int = 20
    eval_every: int = 200
    checkpoint_every: int = 200
    seed: int = 0
    precision: str = "32-true"
    device: str = "auto"
    threads: int = 0  # of the CPU; 0: as PyTorch chooses
    graph: bool = True  # on one GPU, the update is captured in a CUDA graph

    def __post_init__(self) -> None:
        for name, known in (
            ("task", TASKS),
            ("model", MODELS),
            ("optimizer", OPTIMIZERS),
            ("recurrent_optimizer", RECURRENT_OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("recurrent_init", RECURRENT_INITS),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in (
            *("hidden_size", "num_layers", "batch_size", "test_size", "length"),
            *("steps", "log_every", "eval_every", "checkpoint_every"),
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be a positive integer, got {getattr(self, name)}")
        for name in (
            "input_std",
            "recurrent_std",
            "noise",
            "state_noise",
            "identity_decay",
            "weight_decay",
            "warmup",
            "train_size",
            "clip",
            "learning_rate",
            "recurrent_rate",
            "bias_rate",
            "seed",
            "threads",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.model == "rin-dt" and self.num_layers > 1:
            raise UserError(f"num_layers must be 1 for the model 'rin-dt', got {self.num_layers}")
        if self.recurrent_init != "normal" and self.model != "rin":
            raise UserError(f"recurrent_init {self.recurrent_init!r} is for the model 'rin', got {self.model!r}")
        if (self.recurrent_init == "cycles") != bool(self.recurrent_cycles):
            raise UserError(
                "recurrent_cycles goes with recurrent_init 'cycles', "
                f"got {self.recurrent_cycles!r} with {self.recurrent_init!r}"
            )
        if sum(self.cycle_lengths()) > self.hidden_size:
            raise UserError(
                f"recurrent_cycles must fit into hidden_size, got {self.recurrent_cycles!r} and {self.hidden_size}"
            )
        if self.identity_decay and self.model not in IDENTITY_FIXED:
            raise UserError(f"identity_decay is for the models {', '.join(IDENTITY_FIXED)}, got {self.model!r}")
        if self.state_noise and (self.model not in STATE_GIVEN or self.task == "babi"):
            raise UserError(
                f"state_noise is for the models {', '.join(STATE_GIVEN)} on tasks of one sequence, "
                f"got {self.model!r} on {self.task!r}"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"ema must be at least 0 and less than 1, got {self.ema}")
        if self.warmup > 1:
            raise UserError(f"warmup must be a share of the steps, between 0 and 1, got {self.warmup}")

    @classmethod
    def for_task(cls, task: str, recipe: str = "", **settings: Any) -> Settings:
        """The settings `task` is trained with, or those of one of its `RECIPES`, but for what is given.

        Raises UserError when there is no such recipe for it.
        """
        chosen = dict(TASK_DEFAULTS.get(task, {}))
        if recipe:
            if recipe not in RECIPES:
                raise UserError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
            tasks_of = RECIPES[recipe]
            key = (task, bool(settings.get("permute", False)))
            if key not in tasks_of:
                known = ", ".join(sorted({name for name, _ in tasks_of}))
                raise UserError(f"the recipe {recipe!r} is for the task {known}, got {task!r}")
            chosen |= tasks_of[key]
        return cls(**{"task": task, **chosen, **settings})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """From what `to_dict` gave; unknown names, missing ones and wrong types raise UserError."""
        types = {field.name: type(getattr(_EXAMPLE, field.name)) for field in fields(cls)}
        if unknown := values.keys() - types.keys():
            raise UserError(f"unknown setting {min(unknown)!r}")
        for name, expected in types.items():
            if name not in values:
                raise UserError(f"setting {name!r} is missing")
            if type(values[name]) is not expected and not (expected is float and type(values[name]) is int):
                raise UserError(f"setting {name!r} must be of type {expected.__name__}, got {values[name]!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cycle_lengths(self) -> tuple[int, ...]:
        """The lengths in `recurrent_cycles`. Raises UserError when it is no list of positive integers."""
        lengths = [part.strip() for part in self.recurrent_cycles.split(",")] if self.recurrent_cycles else []
        if not all(length.isdecimal() and int(length) for length in lengths):
            raise UserError(
                f"recurrent_cycles must be positive integers with commas between, got {self.recurrent_cycles!r}"
            )
        return tuple(map(int, lengths))

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of update `step` (from 0): a linear rise over the first `warmup` updates, then
        constant, or half a cosine down to 0.
        """
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))

    def build_task(self, device: Any = "cpu") -> tasks.Task:
        """The task, its data on `device`. Raises UserError when the data are missing or damaged."""
        if self.task == "adding":
            return tasks.Adding(self.length, self.train_size, self.test_size, self.seed, device)
        if self.task == "digits":
            return tasks.digits(self.permute, self.noise, self.standardize, self.seed, device)
        folder = data_folder(self.data_dir)
        if self.task == "babi":
            return Babi(self.babi_task, folder, self.seed, device)
        rows = self.task == "mnist-rows"
        return tasks.mnist(folder, rows, self.permute, self.noise, self.standardize, self.seed, device)

    def build_model(self, task: tasks.Task) -> nn.Module:
        """The model with its first weights, a function of `seed`; leaves torch's global generators alone."""

        def make(input_size: int) -> Recurrent:
            return make_rnn(
                self.model, input_size, self.hidden_size, self.num_layers,
                input_std=self.input_std, recurrent_std=self.recurrent_std, recurrent_init=self.recurrent_init,
                cycles=self.cycle_lengths(),
            )  # fmt: skip

        with fork_seeded(self.seed, "weights"):
            if isinstance(task, Babi):
                return QuestionModel(make, task.vocabulary, task.output_size)
            return SequenceModel(make(task.input_size), task.output_size)


_EXAMPLE = Settings("adding")
