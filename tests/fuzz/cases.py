"""What a fuzz case is: a call of a module or of recurrence, as plain values, so that its repr reproduces it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fused_rin.problem import ACTIVATIONS

# `choose(options)` picks one: Hypothesis in the fuzz, a random generator where speed counts.
Choose = Callable[[Sequence[Any]], Any]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# How a tensor lies in memory; "negated" is a view whose sign is a flag, "zero" a tensor without memory.
LAYOUTS = ("plain", "plain", "strided", "offset", "expanded", "negated", "zero")
HIDDEN = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 96, 130)
SKIPS = (0.0, 1.0, 1.0, 0.3, -0.5, 2.0)


@dataclass(frozen=True)
class Case:
    kind: str  # "layers", "cell", "recurrence"
    seed: int  # of all numbers
    dtype: str = "float32"
    steps: int = 1
    batch: int = 1
    inputs: int = 1
    hidden: int = 1  # a multiple of heads
    layers: int = 1
    heads: int = 1  # of recurrence: groups
    directions: int = 1
    bias: bool = True
    batch_first: bool = False
    unbatched: bool = False
    activation: str = "relu"
    skip: float = 1.0
    state: bool = True  # hx is given
    rows: str = "full"  # "lengths", "packed", "shuffled" (packed, unsorted)
    resets: bool = False
    input_layout: str = "plain"
    state_layout: str = "plain"
    weight_layout: str = "plain"
    context: str = "grad"  # "second", "no_grad", "inference", "autocast", "default_device", "hooks"
    trained: str = "all"  # whose gradients: "all", "weights", "input", "one"
    threads: int = 1
    backend: str = "auto"
    mistake: str = ""  # what is wrong with the arguments, see mistakes.py
    form: str = ""  # of units with factors of their own
    span: int = 0  # checkpoint_steps of layers, or none
    transitions: int = 1  # of layers, in a step


def draw(choose: Choose) -> Case:
    """A valid case, or one with a mistake."""
    kind = choose(("layers", "layers", "layers", "cell", "recurrence", "mistake"))
    mistake = ""
    if kind == "mistake":
        mistake, kind = choose(MISTAKES), "layers"
        if mistake.startswith("cell"):
            kind = "cell"
    heads = choose((1, 1, 1, 2, 3)) if kind != "cell" else 1
    case = Case(
        kind=kind,
        seed=choose(range(1 << 16)),
        dtype=choose(("float32", "float32", "float64", "bfloat16", "float16")),
        steps=1 if kind == "cell" else choose((1, 1, 2, 3, 4, 5, 7, 9)),
        batch=choose((0, 1, 1, 2, 3, 4, 5, 8, 9, 17)),
        inputs=choose((1, 2, 3, 5, 8, 17, 33)),
        hidden=heads * choose(HIDDEN if heads == 1 else HIDDEN[:12]),
        layers=choose((1, 1, 2, 3)) if kind == "layers" else 1,
        heads=heads,
        directions=choose((1, 1, 2)) if kind != "cell" else 1,
        bias=choose((True, True, False)),
        batch_first=choose((False, True)) if kind == "layers" else False,
        unbatched=choose((False, False, False, True)) if kind != "recurrence" else False,
        activation=choose(("relu", "tanh") if kind != "recurrence" else ("relu", "tanh", "none")),
        skip=choose(SKIPS),
        state=choose((False, True)),
        rows=choose(("full", "full", "lengths", "packed", "shuffled")) if kind != "cell" else "full",
        resets=choose((False, False, True)) if kind != "cell" else False,
        input_layout=choose(LAYOUTS),
        state_layout=choose(LAYOUTS),
        weight_layout=choose(("plain", "plain", "plain", "strided", "offset")),
        context=choose(
            ("grad", "grad", "grad", "second", "no_grad", "inference", "default_device", "hooks", "autocast")
        ),
        trained=choose(("all", "all", "weights", "input", "one")),
        threads=choose((1, 1, 1, 2)),
        backend=choose(("auto", "auto", "cpu")),
        mistake=mistake,
        form=choose(("", "", "", "inside", "outside", "current")) if kind in ("layers", "recurrence") else "",
        span=choose((0, 0, 0, 1, 4)) if kind == "layers" else 0,
        transitions=choose((1, 1, 1, 2, 3)) if kind == "layers" else 1,
    )
    case = settled(case)
    return dataclasses.replace(case, activation=choose(tuple(ACTIVATIONS))) if case.form else case


def settled(case: Case) -> Case:
    """Without combinations that there are not."""
    change: dict[str, Any] = {}
    if case.unbatched:
        change.update(batch=1, batch_first=False, rows="full")
    if case.kind == "recurrence" and case.rows == "shuffled":
        change.update(rows="packed")
    if case.rows in ("packed", "shuffled"):
        change.update(batch=max(1, case.batch))
    if case.context == "autocast" and (case.dtype != "float32" or case.kind == "recurrence"):
        change.update(context="grad")
    if case.context == "second":
        change.update(dtype="float64")
    if case.form == "inside" and case.kind == "layers":
        change.update(form="outside")
    if case.form:
        change.update(skip=1.0)  # has none
    if case.form or case.heads > 1 or case.span:
        change.update(transitions=1)
    if case.span:
        # Some 256 rows make a span on a CPU (kOuterDepth).
        change.update(steps=5 * case.steps, skip=min(case.skip, 1.0))
    if case.mistake:
        # The numbers are not what such a case is about.
        change.update(
            batch=max(2, case.batch), unbatched=False, rows="full", resets=False, context="grad", input_layout="plain",
            state_layout="plain", weight_layout="plain", state=True, dtype="float32",
            form="", span=0, transitions=1,
        )  # fmt: skip
    return dataclasses.replace(case, **change)


# Of RIN unless the name says otherwise. "torch:" nn.RNN has the argument too, and raises the same type.
MISTAKES = (
    "torch:input of one axis", "torch:input of four axes", "torch:input too wide", "torch:no steps",
    "torch:state of another batch", "torch:state of more layers", "torch:state too wide", "torch:state unbatched",
    "torch:input of another dtype", "state of another dtype", "lengths too long", "lengths negative",
    "lengths of another batch", "lengths of floats", "resets of integers", "resets of another shape",
    "lengths of unbatched input", "freed input", "freed state", "freed weight", "torch:no tensor",
    "cell:torch:input too wide", "cell:torch:input of three axes", "cell:torch:state of another batch",
    "cell:torch:state too wide", "cell:freed input", "cell:freed weight", "no such backend", "backend that is not here",
)  # fmt: skip
