"""Every setting of a training run, checked before anything runs, and written to the run folder as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from .. import tasks
from ..babi import Babi
from ..data import data_folder
from ..errors import UserError
from ..models import (
    IDENTITY_FIXED,
    MODELS,
    RECURRENT_INITS,
    STATE_GIVEN,
    QuestionModel,
    Recurrent,
    SequenceModel,
    make_rnn,
)
from ..seeding import fork_seeded
from .defaults import RECIPES, TASK_DEFAULTS

TASKS = ("adding", "digits", "mnist", "mnist-rows", "babi")
IMAGES = ("digits", "mnist", "mnist-rows")
OPTIMIZERS = ("adam", "rmsprop", "sgd")
RECURRENT_OPTIMIZERS = ("same", "muon")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")


def option(
    default: Any,
    text: str = "",
    *,
    least: int | None = 0,
    choices: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    may_differ: bool = False,
) -> Any:
    """A field of `Settings`.

    Args:
        text: what the command line says of it.
        least: 0, 1 or, where another check is made, None.
        choices: all values that there are.
        tasks: those that look at it, if not all do.
        may_differ: between a run and the run that goes on with its checkpoint.
    """
    about = {"text": text, "least": least, "choices": choices, "tasks": tasks, "may_differ": may_differ}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """What is not given is what a run gets; see `TASK_DEFAULTS` for what suits a task.

    The paper's "N(0, 10^-3)" for the first weights is read as a standard deviation: as a variance, I + U at
    100 units has a spectral radius of 1.31, and a network that multiplies by it 784 times cannot be
    trained.
    """

    task: str
    model: str = option("rin", "the network", choices=MODELS)
    length: int = option(200, "sequence length", least=1, tasks=("adding",))
    permute: bool = option(False, "read the pixels in one fixed random order", tasks=IMAGES)
    noise: float = option(0.0, "standard deviation of Gaussian noise on the training pixels (0..1)", tasks=IMAGES)
    standardize: bool = option(False, "pixels of zero mean and unit variance instead of 0..1", tasks=IMAGES)
    babi_task: int = option(1, "which of the 20 tasks", least=None, tasks=("babi",))
    data_dir: str = option("", "where mnist and babi lie (default: $FUSED_RIN_DATA, else data)", may_differ=True)
    train_size: int = option(0, "sequences of the training set; 0: every one is new", tasks=("adding",))
    test_size: int = option(1000, "sequences of the fixed test set", least=1, tasks=("adding",))
    hidden_size: int = option(100, "units of each layer", least=1)
    num_layers: int = option(1, "recurrent layers", least=1)
    input_std: float = option(0.1, "rin, irnn: standard deviation of the first input weights")
    recurrent_std: float = option(1e-3, "rin: standard deviation of the first U")
    recurrent_init: str = option(
        "normal", "normal, or for rin shift or cycles: U + I starts as a cyclic shift of all units, or of some",
        choices=RECURRENT_INITS,
    )  # fmt: skip
    recurrent_cycles: str = option(
        "", "how many units each of the cycles has, such as 28,28; the others start with the identity"
    )
    optimizer: str = option("adam", choices=OPTIMIZERS)
    recurrent_optimizer: str = option("same", "of the recurrent matrices: same, or muon", choices=RECURRENT_OPTIMIZERS)
    learning_rate: float = option(1e-3)
    recurrent_rate: float = option(1.0, "learning rate of the recurrent matrices, as a share of --learning-rate")
    bias_rate: float = option(1.0, "learning rate of the recurrent layers' biases, as a share of --learning-rate")
    eps: float = option(1e-8, "added to the denominator of Adam and RMSprop")
    schedule: str = option("constant", choices=SCHEDULES)
    warmup: float = option(0.0, "share of the steps over which the learning rate rises")
    clip: float = option(1.0, "largest norm of the gradient; 0 does not clip")
    state_noise: float = option(0.0, "standard deviation of Gaussian noise on h_0 of every training batch")
    identity_decay: float = option(0.0, "rin: decoupled decay of U, which pulls U + I to the identity")
    weight_decay: float = option(0.0, "decoupled decay of the other weights; biases do not decay")
    ema: float = option(
        0.0, "decay of the moving average of the weights, which is then what is evaluated; 0: no average", least=None
    )
    batch_size: int = option(32, least=1)
    steps: int = option(1200, "updates in all", least=1, may_differ=True)
    log_every: int = option(20, "steps between training metrics", least=1)
    eval_every: int = option(200, "steps between evaluations of the test set", least=1)
    checkpoint_every: int = option(200, "steps between checkpoints", least=1)
    seed: int = option(0)
    precision: str = option("32-true", choices=PRECISIONS)
    device: str = option("auto", "auto, cpu, cuda or mps", may_differ=True)
    threads: int = option(0, "CPU threads; 0: as PyTorch chooses", may_differ=True)
    graph: bool = option(
        True, "on one GPU, capture the update in a CUDA graph (default), or launch its kernels one by one",
        may_differ=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"unknown task {self.task!r}; known: {', '.join(TASKS)}")
        for setting in fields(self)[1:]:
            name, value = setting.name, getattr(self, setting.name)
            choices, least = setting.metadata["choices"], setting.metadata["least"]
            if choices and value not in choices:
                raise UserError(f"unknown {name} {value!r}; known: {', '.join(choices)}")
            if least == 1 and value < 1:
                raise UserError(f"{name} must be a positive integer, got {value}")
            if least == 0 and not isinstance(value, str) and not 0 <= value < math.inf:
                raise UserError(f"{name} must be finite and not negative, got {value}")
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

    def refuse_change(self, before: Settings, what: str) -> None:
        """UserError where these settings cannot go on with what `before` has made: where they differ in one that may
        not. `what` begins the text: which run or checkpoint it is.
        """
        for setting in fields(self):
            old, new = getattr(before, setting.name), getattr(self, setting.name)
            if new != old and not setting.metadata.get("may_differ"):
                raise UserError(
                    f"{what} has {setting.name} {old}, {new} was asked for; only {', '.join(MAY_DIFFER)} may change"
                )

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
MAY_DIFFER = tuple(setting.name for setting in fields(Settings) if setting.metadata.get("may_differ"))
