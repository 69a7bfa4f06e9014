"""The pictures of `fused-rin experiment identity-prior`, all from its results file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Cell, groups, mean, select

COLOURS = {"none": "black", "small-rate": "grey", "u-decay": "C0", "v-decay": "C3"}
NAMES = {
    "none": "no decay",
    "small-rate": "no decay, 1/4 of the rate, 4x the updates",
    "u-decay": "decay of U",
    "v-decay": "decay of V",
}
STYLES = {"penalty": "-", "decoupled": "--"}
SHOWN = {"penalty": 0.1}  # the strength of the pictures that show one: the middle one
QUANTITIES = {
    "accuracy": "test accuracy",
    "distance": "‖V - I‖",
    "radius": "spectral radius of V",
    "gradient_norm": "gradient norm, not clipped",
}


def draw(content: dict[str, Any]) -> dict[str, Figure]:
    """Every picture by the name of its file."""
    figures = {}
    for task in dict.fromkeys(task for task, _ in groups(content)):
        figures[f"{task}-strength"] = draw_strengths(content, task)
        if any("last" in cell for cell in _largest(content, task)):
            figures[f"{task}-training"] = draw_training(content, task)
            figures[f"{task}-over-time"] = draw_over_time(content, task)
    if prior := draw_priors(content):
        figures["prior"] = prior
    return figures


def draw_strengths(content: dict[str, Any], task: str) -> Figure:
    """Accuracy against strength: a row for every optimizer, a column for every N; bars span the seeds."""
    cells = select(content, task=task)
    sizes, optimizers = sorted({cell["samples"] for cell in cells}), _optimizers(cells)
    figure, axes = _panels(len(optimizers), len(sizes), f"{task}: accuracy against the strength of decay")
    for row, optimizer in enumerate(optimizers):
        for column, size in enumerate(sizes):
            axis = axes[row][column]
            here = [cell for cell in cells if cell["optimizer"] == optimizer and cell["samples"] == size]
            for arm in ("none", "small-rate"):
                for cell in (cell for cell in here if cell["arm"] == arm and "last" in cell):
                    axis.axhline(mean(cell, "accuracy"), color=COLOURS[arm], linewidth=1, label=NAMES[arm])
                    values = cell["last"]["accuracy"]
                    axis.axhspan(min(values), max(values), color=COLOURS[arm], alpha=0.12, linewidth=0)
            for arm in ("u-decay", "v-decay"):
                for form, style in STYLES.items():
                    line = [c for c in here if (c["arm"], c["form"], c["prior"]) == (arm, form, 0) and "last" in c]
                    if line:
                        values = [cell["last"]["accuracy"] for cell in line]
                        middle = [mean(cell, "accuracy") for cell in line]
                        below = [m - min(v) for m, v in zip(middle, values, strict=True)]
                        above = [max(v) - m for m, v in zip(middle, values, strict=True)]
                        axis.errorbar(
                            [cell["strength"] for cell in line], middle, yerr=[below, above],
                            color=COLOURS[arm], linestyle=style, marker=".", capsize=2, linewidth=1,
                            label=f"{NAMES[arm]}, {form}",
                        )  # fmt: skip
            axis.set_xscale("log")
            axis.set_title(f"{optimizer}, N = {size:,}", fontsize="small")
    _finish(figure, axes, "strength", "test accuracy")
    return figure


def draw_training(content: dict[str, Any], task: str) -> Figure:
    """Accuracy, ‖V - I‖, radius and gradient norm over the updates, at the largest N; a column an optimizer."""
    cells = [cell for cell in _largest(content, task) if "curves" in cell]
    optimizers = _optimizers(cells)
    title = f"{task}, N = {cells[0]['samples']:,}: over the updates (penalty, strength {SHOWN['penalty']:g})"
    figure, axes = _panels(len(QUANTITIES), len(optimizers), title)
    for column, optimizer in enumerate(optimizers):
        for row, (name, label) in enumerate(QUANTITIES.items()):
            axis = axes[row][column]
            for cell in _shown(cells, optimizer):
                steps, values = cell["curves"]["step"], cell["curves"][name]
                known = [
                    (step / steps[-1], value) for step, value in zip(steps, values, strict=True) if value is not None
                ]
                axis.plot(*zip(*known, strict=True), color=COLOURS[cell["arm"]], marker=".", label=NAMES[cell["arm"]])
            if name == "gradient_norm":
                axis.set_yscale("log")
            if column == 0:
                axis.set_ylabel(label, fontsize="small")
        axes[0][column].set_title(optimizer, fontsize="small")
    _finish(figure, axes, "share of the updates", None)
    return figure


def draw_over_time(content: dict[str, Any], task: str) -> Figure:
    """Gradient of the loss at the input of step t after training, at the largest N; a panel an optimizer."""
    cells = [cell for cell in _largest(content, task) if "over_time" in cell]
    optimizers = _optimizers(cells)
    title = f"{task}, N = {cells[0]['samples']:,}: gradient at the input of step t (penalty, {SHOWN['penalty']:g})"
    figure, axes = _panels(1, len(optimizers), title)
    for column, optimizer in enumerate(optimizers):
        axis = axes[0][column]
        for cell in _shown(cells, optimizer):
            known = [(t, norm) for t, norm in cell["over_time"] if norm > 0]  # a border of the image is always 0
            axis.plot(*zip(*known, strict=True), color=COLOURS[cell["arm"]], marker=".", label=NAMES[cell["arm"]])
        axis.set_yscale("log")
        axis.set_title(optimizer, fontsize="small")
    _finish(figure, axes, "step t", "norm of the gradient")
    return figure


def draw_priors(content: dict[str, Any]) -> Figure | None:
    """‖V - I‖ as a share of what it is without decay, against N: constant strengths and priors."""
    pairs = [
        pair for pair in groups(content) if any(c["prior"] for c in select(content, task=pair[0], optimizer=pair[1]))
    ]
    if not pairs:
        return None
    tasks, optimizers = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    figure, axes = _panels(len(tasks), len(optimizers), "‖V - I‖ as a share of what it is without decay")
    for task, optimizer in pairs:
        axis = axes[tasks.index(task)][optimizers.index(optimizer)]
        cells = [cell for cell in select(content, task=task, optimizer=optimizer) if "last" in cell]
        free = {cell["samples"]: mean(cell, "distance") for cell in cells if cell["arm"] == "none"}
        anchors = dict.fromkeys((cell["form"], cell["prior"]) for cell in cells if cell["prior"])
        for colour, (form, anchor) in enumerate(anchors):
            line = [c for c in cells if (c["arm"], c["form"]) == ("u-decay", form)]
            constant = [c for c in line if not c["prior"] and c["strength"] == anchor]
            prior = [c for c in constant if c["samples"] == min(free)] + [c for c in line if c["prior"] == anchor]
            for name, style, chosen in (("constant", "-", constant), ("prior", "--", prior)):
                chosen = [cell for cell in chosen if cell["samples"] in free]
                axis.plot(
                    [cell["samples"] for cell in chosen],
                    [mean(cell, "distance") / free[cell["samples"]] for cell in chosen],
                    color=f"C{colour}", linestyle=style, marker=".", label=f"{form} {anchor:g}, {name}",
                )  # fmt: skip
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_title(f"{task}, {optimizer}", fontsize="small")
    _finish(figure, axes, "N", "share")
    return figure


def _largest(content: dict[str, Any], task: str) -> list[Cell]:
    cells = select(content, task=task)
    size = max(cell["samples"] for cell in cells)
    return [cell for cell in cells if cell["samples"] == size]


def _shown(cells: list[Cell], optimizer: str) -> Iterator[Cell]:
    """One cell of every arm."""
    for cell in cells:
        if cell["optimizer"] == optimizer and not cell["prior"] and cell["strength"] == SHOWN.get(cell["form"], 0.0):
            yield cell


def _optimizers(cells: list[Cell]) -> list[str]:
    return list(dict.fromkeys(cell["optimizer"] for cell in cells))


def _panels(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(0.8 + 2.5 * columns, 1.0 + 1.7 * rows), dpi=88, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex="row" if rows == 1 else False)
    figure.suptitle(title)
    return figure, axes.tolist()


def _finish(figure: Figure, axes: list[list[Axes]], x: str, y: str | None) -> None:
    entries: dict[str, Artist] = {}
    for axis in (axis for row in axes for axis in row):
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize="x-small")
        lines, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, lines, strict=True))
    for axis in axes[-1]:
        axis.set_xlabel(x, fontsize="small")
    if y:
        figure.supylabel(y, fontsize="small")
    if entries:
        handles, labels = [*entries.values()], [*entries]
        figure.legend(handles=handles, labels=labels, loc="outside lower center", ncols=4, fontsize="x-small")
