"""The pictures of `fused-rin experiment precision`, all from its results file."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib.figure import Figure

from .report import HEADS, score
from .trials import FORMS, ROUNDINGS, TRAININGS

COLOURS = {"u": "C0", "v": "C3"}
UNITS = {"adding": "squared error x 1000"}


def draw(content: dict[str, Any]) -> dict[str, Figure]:
    """Every picture by the name of its file."""
    if not any("rounded" in cell for cell in content["cells"]):
        return {}
    return {"scores": draw_scores(content), "states": draw_states(content)}


def draw_scores(content: dict[str, Any]) -> Figure:
    """Every seed's score: exact, rounded to each type, trained in bfloat16; U beside U + I."""
    names = ["float32", *ROUNDINGS, *TRAININGS[1:]]
    tasks = [*content["plans"]]
    figure = Figure(figsize=(3.6 * len(tasks), 3.4), dpi=88, layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        cells = {(c["training"], c["form"]): c for c in content["cells"] if c["task"] == task}
        exact = cells.get(("32-true", "u"))
        for form in FORMS:
            columns = {name: cells.get((name, form)) for name in TRAININGS[1:]}
            columns |= {name: exact["rounded"][name][form] for name in ROUNDINGS} if exact else {}
            columns |= {"float32": exact} if form == "u" else {}
            shift = -0.15 if form == "u" else 0.15
            for place, name in enumerate(names):
                found = columns.get(name)
                values = [value for value in score(task, found) if value is not None] if found else []
                where = place if name == "float32" else place + shift
                colour = "black" if name == "float32" else COLOURS[form]
                axis.plot([where] * len(values), values, ".", color=colour, alpha=0.5, markeredgewidth=0)
                if values:
                    label = HEADS[form] if name == "bfloat16" else None
                    axis.plot([where], [statistics.fmean(values)], "_", color=colour, markersize=9, label=label)
        axis.set_xticks(range(len(names)), names, rotation=60, fontsize="small")
        axis.axvline(len(ROUNDINGS) + 0.5, color="grey", linewidth=0.6)
        if task in UNITS:
            axis.set_yscale("log")
        axis.set_title(f"{task}: {UNITS.get(task, 'test accuracy, %')}", fontsize="small")
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small", title="kept")
    figure.suptitle("Rounded after training, and trained in bfloat16", fontsize="medium")
    return figure


def draw_states(content: dict[str, Any]) -> Figure:
    """How far the states are astray against the step; a colour a type, dashed where U + I was rounded."""
    cells = [cell for cell in content["cells"] if "astray" in cell]
    figure = Figure(figsize=(3.6 * len(cells), 3.4), dpi=88, layout="constrained")
    for axis, cell in zip(figure.subplots(1, len(cells), squeeze=False, sharey=True)[0], cells, strict=True):
        for colour, (name, forms) in enumerate(cell["astray"].items()):
            for form, values in forms.items():
                known = [(t, value) for t, value in zip(cell["steps"], values, strict=True) if value is not None]
                style = "-" if form == "u" else "--"
                axis.plot(*zip(*known, strict=True), style, color=f"C{colour}", label=f"{name}, {HEADS[form]}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("step t", fontsize="small")
        axis.set_title(cell["task"], fontsize="small")
        axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    figure.supylabel("||h' - h|| / ||h||", fontsize="small")
    figure.suptitle("The state's error after the recurrent matrix was rounded", fontsize="medium")
    return figure
