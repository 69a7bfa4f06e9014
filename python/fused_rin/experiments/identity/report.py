"""What came out of `fused-rin experiment identity-prior`: means over the seeds, and tables in Markdown.

A results file holds one cell for every (task, optimizer, samples, arm, form, strength, prior):

    seeds, diverged   which ran, and which of them diverged
    curves            "step", and means over the seeds at these steps; null before the first update
    last              of every seed that did not diverge, at the end; "pull" and "gradient" are the norms of what
                      the decay and the clipped gradient of the data give the recurrent matrix
    over_time         [t, norm of the gradient at the input of step t], mean over the seeds, at the end
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from ..trial_folder import note
from .trials import OPTIMIZERS, PLANS, STRENGTHS

FORMAT = "fused-rin identity-prior results"
VERSION = 2
KEY = ("task", "optimizer", "samples", "arm", "form", "strength", "prior")
CURVES = ("accuracy", "train_loss", "distance", "radius", "gradient_norm")
LAST = ("accuracy", "train_accuracy", "distance", "radius", "gradient", "pull")
Cell = dict[str, Any]


def summarise(trials: Iterable[list[dict[str, Any]]], budget: float) -> str:
    """The text of the results file: one line a cell, numbers with four digits."""
    cells: dict[tuple[Any, ...], list[list[dict[str, Any]]]] = {}
    for records in sorted(trials, key=_place):
        cells.setdefault(tuple(records[0][name] for name in KEY), []).append(records)
    ran = {key[0] for key in cells}
    plans = {
        name: {"sizes": plan.sizes, "updates": plan.updates, "grows": plan.grows}
        for name, plan in PLANS.items()
        if name in ran
    }
    head = json.dumps({"format": FORMAT, "version": VERSION, "budget": budget, "plans": plans})
    lines = ",\n".join(json.dumps(_cell(key, runs)) for key, runs in cells.items())
    return f'{head[:-1]}, "cells": [\n{lines}\n]}}\n'


def _place(records: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Where a trial stands in the results, in whatever order they were run."""
    first = records[0]
    ranks = (list(PLANS).index(first["task"]), list(OPTIMIZERS).index(first["optimizer"]))
    return (*ranks, *(first[name] for name in (*KEY[2:], "seed")))


def _cell(key: tuple[Any, ...], runs: list[list[dict[str, Any]]]) -> Cell:
    whole = [records for records in runs if "diverged" not in records[-1]]
    cell = {**dict(zip(KEY, key, strict=True)), "seeds": [records[0]["seed"] for records in runs]}
    cell["diverged"] = [records[0]["seed"] for records in runs if "diverged" in records[-1]]
    if whole:
        steps = range(len(whole[0]))
        cell["curves"] = {"step": [record["step"] for record in whole[0]]}
        cell["curves"] |= {name: [_mean([run[i][name] for run in whole]) for i in steps] for name in CURVES}
        cell["last"] = {name: [_short(run[-1][name]) for run in whole] for name in LAST}
        times = [t for t, _ in whole[0][-1]["over_time"]]
        norms = zip(*([norm for _, norm in run[-1]["over_time"]] for run in whole), strict=True)
        cell["over_time"] = [[t, _mean(values)] for t, values in zip(times, norms, strict=True)]
    return cell


def _mean(values: Iterable[float | None]) -> float | None:
    """None where one of them is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return _short(statistics.fmean(known))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def table(content: dict[str, Any]) -> str:
    """All cells: accuracy, distance from the identity and spectral radius; and what becomes of a prior."""
    lines = [note(content), "", "## At a glance", "", *_glance(content)]
    for task, optimizer in groups(content):
        cells = select(content, task=task, optimizer=optimizer)
        lines += [
            "",
            f"## {task}, {optimizer}",
            "",
            "Test accuracy % (range over the seeds) · ‖V - I‖ · radius of V",
            "",
        ]
        lines += _grid(cells, _outcome)
    lines += ["", "## What becomes of the pull", ""]
    lines.append(
        "‖V - I‖ at the end, as a share of what it is without decay · ‖decay‖ / ‖gradient of the data‖ for the "
        "recurrent matrix at the end (U decays)"
    )
    for task, optimizer in groups(content):
        cells = select(content, task=task, optimizer=optimizer, arm="u-decay")
        free = {c["samples"]: c for c in select(content, task=task, optimizer=optimizer, arm="none")}
        lines += ["", f"### {task}, {optimizer}", "", *_grid(cells, partial(_pull, free=free))]
    return "\n".join(lines)


def _glance(content: dict[str, Any]) -> list[str]:
    """Accuracy without decay, and what every arm adds to it, see `gains`; decay as penalty, constant strengths."""
    arms = [("small-rate", 0.0), *((arm, s) for arm in ("u-decay", "v-decay") for s in STRENGTHS["penalty"])]
    heads = [f"{arm} {strength:g}" if strength else arm for arm, strength in arms]
    lines = [
        "Test accuracy % without decay (range over the seeds), and percentage points from there, mean ± standard error "
        "over the seeds (penalty)",
        "",
    ]
    lines.append("| task | optimizer | N | none | " + " | ".join(heads) + " |")
    lines.append("|---" * (4 + len(heads)) + "|")
    for free in select(content, arm="none"):
        here = select(content, **{name: free[name] for name in ("task", "optimizer", "samples")}, prior=0.0)
        texts = [_accuracy(free)]
        for arm, strength in arms:
            found = [c for c in here if (c["arm"], c["strength"]) == (arm, strength) and c["form"] != "decoupled"]
            texts.append(_signed([*gains(found[0], free).values()]) if found else "")
        lines.append(f"| {free['task']} | {free['optimizer']} | {free['samples']:,} | " + " | ".join(texts) + " |")
    return lines


def groups(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(task, optimizer) in the order of the plan."""
    yield from dict.fromkeys((cell["task"], cell["optimizer"]) for cell in content["cells"])


def select(content: dict[str, Any], **wanted: Any) -> list[Cell]:
    return [cell for cell in content["cells"] if all(cell[name] == value for name, value in wanted.items())]


def mean(cell: Cell, name: str) -> float:
    """Of a quantity at the end, over the seeds; NaN where all diverged."""
    return statistics.fmean(cell["last"][name]) if "last" in cell else math.nan


def gains(cell: Cell, free: Cell) -> dict[int, float]:
    """Percentage points of accuracy by which a cell is ahead of `free`, by seed where both ran to the end: the first
    weights and the batches of a seed are the same in both, and what they do to the accuracy falls out.
    """
    ends, bases = (
        dict(zip((s for s in c["seeds"] if s not in c["diverged"]), c.get("last", {}).get("accuracy", ()), strict=True))
        for c in (cell, free)
    )
    return {seed: 100 * (ends[seed] - bases[seed]) for seed in ends if seed in bases}


def pooled(pairs: Sequence[tuple[Cell, Cell]]) -> list[float]:
    """The mean of `gains` over these pairs, for each seed that none of them lost."""
    by_seed: dict[int, list[float]] = {}
    for cell, free in pairs:
        for seed, gain in gains(cell, free).items():
            by_seed.setdefault(seed, []).append(gain)
    return [statistics.fmean(values) for values in by_seed.values() if len(values) == len(pairs)]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of these values; NaN of fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _signed(values: Sequence[float]) -> str:
    if not values:
        return ""
    error = standard_error(values)
    return f"{statistics.fmean(values):+.1f}" + ("" if math.isnan(error) else f" ± {error:.1f}")


def _grid(cells: list[Cell], show: Callable[[Cell], str]) -> list[str]:
    """A row for every decay, a column for every N; a prior is one row, though its strength differs by N."""
    sizes = sorted({cell["samples"] for cell in cells})
    rows: dict[tuple[str, str, float, float], dict[int, str]] = {}
    for cell in cells:
        row = (cell["arm"], cell["form"], cell["prior"], 0.0 if cell["prior"] else cell["strength"])
        rows.setdefault(row, {sizes[0]: "the constant"} if cell["prior"] else {})[cell["samples"]] = show(cell)
    lines = ["| arm | form | strength | " + " | ".join(f"N = {size:,}" for size in sizes) + " |"]
    lines.append("|---" * (3 + len(sizes)) + "|")
    for (arm, form, prior, strength), texts in sorted(rows.items()):
        text = f"prior, {prior:g} at N = {sizes[0]:,}" if prior else f"{strength:g}" if form else ""
        lines.append(f"| {arm} | {form} | {text} | " + " | ".join(texts.get(size, "") for size in sizes) + " |")
    return lines


def _accuracy(cell: Cell) -> str:
    lost = f"diverged ({len(cell['diverged'])} of {len(cell['seeds'])})" if cell["diverged"] else ""
    if "last" not in cell:
        return lost
    values = [100 * value for value in cell["last"]["accuracy"]]
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}" + (lost and f" {lost}")


def _outcome(cell: Cell) -> str:
    if "last" not in cell:
        return _accuracy(cell)
    return f"{_accuracy(cell)} · {mean(cell, 'distance'):.2f} · {mean(cell, 'radius'):.2f}"


def _pull(cell: Cell, free: dict[int, Cell]) -> str:
    without = free.get(cell["samples"])
    if "last" not in cell or without is None or "last" not in without:
        return "-"
    share = mean(cell, "distance") / mean(without, "distance")
    return f"{share:.2f} · {mean(cell, 'pull') / mean(cell, 'gradient'):.2g}"
