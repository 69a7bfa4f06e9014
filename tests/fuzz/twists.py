"""What is around a call: a case of cases.py with one thing more, that must not change its numbers.

A twist says how the call is made (under a mode, in pieces, by vmap), how its tensors lie (between NaN, at an odd
address), or what is asked of it afterwards (gradients of other layouts, a backward after a write). How, twisting.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tests.fuzz import cases
from tests.fuzz.cases import Case, Choose


@dataclass(frozen=True)
class Twisted(Case):
    twist: str = ""


# Around the call.
CALLS = (
    "repeat", "dispatch mode", "function mode", "meta device", "deterministic", "functional_call", "checkpoint",
    "pieces", "rows", "vmap", "jvp", "edited", "other set", "subclass", "trace", "row arguments",
)  # fmt: skip
# How its tensors lie, or which of them are one.
TENSORS = (
    "guarded", "flat weights", "odd addresses", "negated weights", "expanded weights", "tied weights", "aliased",
    "some trained", "past the end",
)  # fmt: skip
# Of the backward.
GRADIENTS = (
    "grad expanded", "grad negated", "grad zero", "grad strided", "grad offset", "only output", "only state",
    "hooks dtype", "hooks negated", "hooks tensor", "twice", "accumulated", "batched grads", "vjp", "written",
)  # fmt: skip
TWISTS = (*CALLS, *TENSORS, *GRADIENTS, "not finite", "large")


def draw(choose: Choose) -> Twisted:
    base = cases.draw(choose)
    while base.mistake:
        base = cases.draw(choose)
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(Case)}
    twist = choose(TWISTS)
    while twist in ("large", "trace") and not choose((True, False, False, False)):  # the slow ones, less often
        twist = choose(TWISTS)
    if twist == "large":
        values.update(
            batch=choose((1, 3, 16, 33, 70)), hidden=values["heads"] * choose((128, 130, 200, 257)), threads=2,
            steps=values["steps"] if values["kind"] == "cell" else choose((1, 4, 17, 33)), layers=1,
        )  # fmt: skip
    return settled(Twisted(**values, twist=twist))


def settled(case: Twisted) -> Twisted:
    """Without combinations that there are not."""
    change: dict[str, Any] = {}
    twist, plain = case.twist, {"input_layout": "plain", "state_layout": "plain"}
    if twist in GRADIENTS:
        change.update(context="grad" if case.context != "second" or twist not in GRADIENTS[:7] else "second")
    if twist in ("functional_call", "checkpoint", "vmap", "trace", "meta device", "some trained"):
        change.update(context="grad" if case.context in ("inference", "hooks", "default_device") else case.context)
    if twist in ("tied weights", "negated weights", "expanded weights", "flat weights", "odd addresses", "edited"):
        change.update(weight_layout="plain")
    if twist == "edited" and case.context == "autocast":  # which keeps the casts of weights until its end
        change.update(context="grad")
    if twist == "vmap" and case.context == "autocast":  # which does not see torch's own F.linear there
        change.update(context="grad")
    if abs(case.skip) > 1:  # errors double in every step then, and whose comes first is chance
        change.update(skip=0.3)
    if twist == "jvp":
        change.update(context="grad", dtype="float64", trained="all", **plain)
    if twist in ("jvp", "vmap", "trace", "vjp", "batched grads"):
        change.update(rows="lengths" if case.rows in ("packed", "shuffled") else case.rows, **plain)
    if twist in ("functional_call", "vjp", "tied weights") and case.kind == "recurrence":
        change.update(kind="layers", activation="relu" if case.activation == "none" else case.activation)
    if twist in ("pieces", "rows"):
        change.update(
            kind="layers" if case.kind == "cell" else case.kind, unbatched=False,
            rows="lengths" if case.rows in ("packed", "shuffled") else case.rows,
        )  # fmt: skip
    if twist == "pieces":
        change.update(directions=1, steps=max(2, case.steps))
    if twist == "rows":
        change.update(batch=max(1, case.batch))
    if twist == "past the end":
        change.update(
            kind="layers" if case.kind == "cell" else case.kind, rows="lengths", unbatched=False, context="no_grad",
            **plain,
        )  # fmt: skip
    if twist == "aliased":
        change.update(inputs=case.hidden, layers=1, state=True, **plain)
        change.update(directions=case.directions if case.kind == "recurrence" else 1)
    if twist == "tied weights":
        change.update(layers=2, inputs=case.hidden, kind="layers", directions=1)
    if twist in ("guarded", "odd addresses", "some trained", "aliased", "not finite", "subclass", "written"):
        change.update(**plain)
    if twist == "some trained":
        change.update(trained="all")
    if twist == "not finite":  # there the reference multiplies an Inf by zero (docs/deep-transitions.md)
        change.update(transitions=1)
    if twist == "not finite":  # without a state, short calls make no product with U (the migration page)
        change.update(context="no_grad", state=True)
        if case.dtype in ("bfloat16", "float16"):  # oneDNN's product of 33 units carries a NaN into the row before it
            change.update(dtype="float32")
    if twist == "row arguments":
        change.update(kind="layers" if case.kind == "cell" else case.kind, rows="lengths", unbatched=False, resets=True)
    changed = cases.settled(dataclasses.replace(case, **change))
    if twist in GRADIENTS or twist == "jvp":
        changed = dataclasses.replace(changed, trained="all" if changed.trained == "one" else changed.trained)
    return changed
