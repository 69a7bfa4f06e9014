"""The pictures of `fused-rin experiment identity-prior`, all from its results file."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Cell, groups, mean, pooled, select, standard_error

COLOURS = {"none": "black", "small-rate": "grey", "u-decay": "C0", "v-decay": "C3"}
NAMES = {
    "none": "no decay",
    "small-rate": "no decay, 1/4 of the rate, 4x the updates",
    "u-decay": "decay of U",
    "v-decay": "decay of V",
}
PULLS = {
    "u-decay": "pull to the identity (U decays)",
    "v-decay": "pull to zero (V decays)",
    "constant": "pull to the identity of 0.1 at every N",
    "prior": "the same at the smallest N, fading as 1/N",
}
TITLES = {
    "digits": "digits, 64 steps",
    "mnist-rows": "MNIST rows, 28 steps",
    "mnist-rows-epochs": "the same, epochs fixed",
    "mnist-784": "MNIST pixels, 784 steps",
}
PRIORS = {"constant": "-", "prior": "--"}
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
    if summary := draw_summary(content):
        figures["summary"] = summary
    for task in dict.fromkeys(task for task, _ in groups(content)):
        figures[f"{task}-strength"] = draw_strengths(content, task)
        if any("last" in cell for cell in _largest(content, task)):
            figures[f"{task}-training"] = draw_training(content, task)
            figures[f"{task}-over-time"] = draw_over_time(content, task)
    if prior := draw_priors(content):
        figures["prior"] = prior
    return figures


def draw_summary(content: dict[str, Any]) -> Figure | None:
    """What decay adds to the accuracy, a column a task: against the strength, and a constant and a prior against N.
    Means over the optimizers (above: and over N); bars are standard errors over the seeds.
    """
    tasks = [task for task in dict.fromkeys(task for task, _ in groups(content)) if _against_none(content, task=task)]
    if not tasks:
        return None
    title = "What decay adds to the test accuracy, percentage points"
    figure, axes = _panels(2, len(tasks), title, sharey="row")
    for column, task in enumerate(tasks):
        pairs = _against_none(content, task=task, form="penalty")
        above, below = axes[0][column], axes[1][column]
        for arm in ("u-decay", "v-decay"):
            constants = [pair for pair in pairs if pair[0]["arm"] == arm and not pair[0]["prior"]]
            _errorbars(above, constants, "strength", color=COLOURS[arm], label=PULLS[arm])
        priors = [pair for pair in pairs if pair[0]["prior"] == SHOWN["penalty"]]
        constants = _against_none(
            content, task=task, form="penalty", arm="u-decay", prior=0.0, strength=SHOWN["penalty"]
        )
        smallest = [pair for pair in constants if pair[0]["samples"] == min(c["samples"] for c, _ in constants)]
        for chosen, name in ((constants, "constant"), (smallest + priors, "prior")):
            _errorbars(below, chosen, "samples", color=COLOURS["u-decay"], linestyle=PRIORS[name], label=PULLS[name])
        above.set_title(TITLES[task], fontsize="small")
        for axis, x, drawn in ((above, "strength", pairs), (below, "samples", constants)):
            known = sorted({cell[x] for cell, _ in drawn if not cell["prior"]})
            axis.axhline(0, color="black", linewidth=1)
            _logarithmic(axis, known)
            axis.set_xlabel("N" if x == "samples" else x, fontsize="small")
    _finish(figure, axes, None, None)
    return figure


def _against_none(content: dict[str, Any], **wanted: Any) -> list[tuple[Cell, Cell]]:
    """The cells with decay that are wanted, each with the one without decay that differs from it in that alone."""
    free = {(cell["task"], cell["optimizer"], cell["samples"]): cell for cell in select(content, arm="none")}
    cells = [cell for cell in select(content, **wanted) if cell["form"]]
    return [(cell, base) for cell in cells if (base := free.get((cell["task"], cell["optimizer"], cell["samples"])))]


def _errorbars(axis: Axes, pairs: list[tuple[Cell, Cell]], x: str, **style: Any) -> None:
    """The mean of `pooled` against what the cells have at x."""
    values = {key: pooled([p for p in pairs if p[0][x] == key]) for key in sorted({cell[x] for cell, _ in pairs})}
    known = {key: gains for key, gains in values.items() if gains}
    middle, errors = [fmean(gains) for gains in known.values()], [standard_error(gains) for gains in known.values()]
    axis.errorbar([*known], middle, yerr=errors, marker=".", capsize=2, linewidth=1.5, **style)


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
    pairs = []
    for task, optimizer in groups(content):
        cells = select(content, task=task, optimizer=optimizer)
        if any(c["prior"] for c in cells) and any(c["arm"] == "none" and "last" in c for c in cells):
            pairs.append((task, optimizer))
    if not pairs:
        return None
    tasks, optimizers = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    figure, axes = _panels(len(tasks), len(optimizers), "‖V - I‖ as a share of what it is without decay")
    decays = dict.fromkeys((cell["form"], cell["prior"]) for cell in content["cells"] if cell["prior"])
    colours = {decay: f"C{number}" for number, decay in enumerate(decays)}
    for axis in (axis for row in axes for axis in row):
        axis.set_visible(False)
    for task, optimizer in pairs:
        axis = axes[tasks.index(task)][optimizers.index(optimizer)]
        cells = [cell for cell in select(content, task=task, optimizer=optimizer) if "last" in cell]
        free = {cell["samples"]: mean(cell, "distance") for cell in cells if cell["arm"] == "none"}
        anchors = dict.fromkeys((cell["form"], cell["prior"]) for cell in cells if cell["prior"])
        for form, anchor in anchors:
            line = [c for c in cells if (c["arm"], c["form"]) == ("u-decay", form)]
            constant = [c for c in line if not c["prior"] and c["strength"] == anchor]
            prior = [c for c in constant if c["samples"] == min(free)] + [c for c in line if c["prior"] == anchor]
            for name, style, chosen in (("constant", "-", constant), ("prior", "--", prior)):
                chosen = [cell for cell in chosen if cell["samples"] in free]
                axis.plot(
                    [cell["samples"] for cell in chosen],
                    [mean(cell, "distance") / free[cell["samples"]] for cell in chosen],
                    color=colours[form, anchor], linestyle=style, marker=".", label=f"{form} {anchor:g}, {name}",
                )  # fmt: skip
        axis.axhline(1, color="black", linewidth=1)
        axis.set_visible(True)
        _logarithmic(axis, sorted(free))
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


def _panels(rows: int, columns: int, title: str, **shared: Any) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(0.8 + 2.5 * columns, 1.0 + 1.7 * rows), dpi=88, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **{"sharex": "row" if rows == 1 else False, **shared})
    figure.suptitle(title, fontsize="medium")
    return figure, axes.tolist()


def _logarithmic(axis: Axes, values: list[float]) -> None:
    """An x axis that names these values and no others."""
    axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:,}" for value in values])
    axis.minorticks_off()


def _finish(figure: Figure, axes: list[list[Axes]], x: str | None, y: str | None) -> None:
    entries: dict[str, Artist] = {}
    for axis in (axis for row in axes for axis in row):
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize="x-small")
        lines, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, lines, strict=True))
    if x:
        for axis in axes[-1]:
            axis.set_xlabel(x, fontsize="small")
    if y:
        figure.supylabel(y, fontsize="small")
    if entries:
        handles, labels = [*entries.values()], [*entries]
        figure.legend(
            handles=handles,
            labels=labels,
            loc="outside lower center",
            ncols=4 if len(axes[0]) > 2 else 2,
            fontsize="x-small",
            handlelength=3,  # of dashes a few
        )
