"""What came out of `fused-rin experiment precision`: every seed's numbers, and tables in Markdown.

A results file holds one cell for every (task, training, form):

    seeds, diverged   which ran, and how many of them diverged
    loss, accuracy    on the test set, of every seed; null for one that diverged
    rounded           of a training in float32: by type and form, {"loss": [...], "accuracy": [...]} of every seed
    steps, astray     of the same: at these steps, by type and form, ||h'_t - h_t|| / ||h_t||, geometric mean over the
                      seeds; null where a seed has none
    largest           of the same: the largest of |U| ("u") and of |V| ("v"), of every seed
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from typing import Any

from ..trial_folder import note
from .trials import FORMS, PLANS, ROUNDINGS, TRAININGS

FORMAT = "fused-rin precision results"
VERSION = 1
KEY = ("task", "training", "form")
Cell = dict[str, Any]
HEADS = {"u": "U", "v": "U + I"}


def summarise(trials: Iterable[list[dict[str, Any]]], budget: float) -> str:
    """The text of the results file: one line a cell, numbers with four digits."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for (record,) in sorted(trials, key=_place):
        cells.setdefault(tuple(record[name] for name in KEY), []).append(record)
    ran = {key[0] for key in cells}
    plans = {name: {"updates": plan.updates} for name, plan in PLANS.items() if name in ran}
    head = json.dumps({"format": FORMAT, "version": VERSION, "budget": budget, "plans": plans})
    lines = ",\n".join(json.dumps(_cell(key, runs)) for key, runs in cells.items())
    return f'{head[:-1]}, "cells": [\n{lines}\n]}}\n'


def _place(records: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Where a trial stands in the results, in whatever order they were run."""
    first = records[0]
    return list(PLANS).index(first["task"]), TRAININGS.index(first["training"]), first["form"], first["seed"]


def _cell(key: tuple[Any, ...], runs: list[dict[str, Any]]) -> Cell:
    cell: Cell = {**dict(zip(KEY, key, strict=True)), "seeds": [run["seed"] for run in runs]}
    cell["diverged"] = sum("diverged" in run for run in runs)
    cell |= {name: [_short(run.get(name)) for run in runs] for name in ("loss", "accuracy")}
    whole = [run for run in runs if "rounded" in run]
    if whole:
        cell["rounded"] = {
            name: {
                form: {
                    score: [_short(run["rounded"][name][form][score]) for run in whole]
                    for score in ("loss", "accuracy")
                }
                for form in FORMS
            }
            for name in ROUNDINGS
        }
        cell["steps"] = whole[0]["steps"]
        cell["astray"] = {
            name: {
                form: [_middle(values) for values in zip(*(run["astray"][name][form] for run in whole), strict=True)]
                for form in FORMS
            }
            for name in ROUNDINGS
        }
        cell["largest"] = {form: [_short(run["largest"][form]) for run in whole] for form in FORMS}
    return cell


def _middle(values: Iterable[float | None]) -> float | None:
    """The geometric mean; None where one of them is missing or 0."""
    known = [value for value in values if value]
    return _short(statistics.geometric_mean(known)) if known and len(known) == len([*values]) else None


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def table(content: dict[str, Any]) -> str:
    """Scores after rounding, scores of trainings in bfloat16, and how far the last state is from what it should be."""
    cells = content["cells"]
    exact = {cell["task"]: cell for cell in cells if cell["training"] == "32-true"}
    kinds = [f"{name}, {HEADS[form]}" for name in ROUNDINGS for form in FORMS]
    lines = [note(content), "", "Accuracy %, or for adding the mean squared error x 1000: mean (range) of the seeds."]
    lines += ["", "## Rounded after training in float32", ""]
    lines += _head("task", "float32", *kinds)
    for task, cell in exact.items():
        rounded = [cell["rounded"][name][form] for name in ROUNDINGS for form in FORMS]
        lines.append(_row(task, scores(task, cell), *(scores(task, scored) for scored in rounded)))
    lines += ["", "## Trained with few digits", ""]
    others = [(training, form) for training in TRAININGS[1:] for form in FORMS]
    lines += _head("task", "float32", *(f"{training}, {HEADS[form]}" for training, form in others))
    for task in content["plans"]:
        found = {(cell["training"], cell["form"]): scores(task, cell) for cell in cells if cell["task"] == task}
        lines.append(_row(task, *(found.get(kind, "") for kind in [("32-true", "u"), *others])))
    lines += ["", "## How far the last state is astray", ""]
    lines.append("In %, ||h' - h|| / ||h|| at the last step over 100 test sequences; and the largest entries.")
    lines += ["", *_head("task", "T", *kinds, "largest of U", "largest of U + I")]
    for task, cell in exact.items():
        ends = [cell["astray"][name][form][-1] for name in ROUNDINGS for form in FORMS]
        largest = [f"{statistics.fmean(cell['largest'][form]):.2f}" for form in FORMS]
        texts = ["-" if end is None else f"{100 * end:.2g}" for end in ends]
        lines.append(_row(task, str(cell["steps"][-1]), *texts, *largest))
    return "\n".join(lines)


def score(task: str, record: dict[str, Any]) -> Any:
    """What a task is judged by, in the unit of the table."""
    values, unit = (record["loss"], 1000) if task == "adding" else (record["accuracy"], 100)
    if isinstance(values, list):
        return [None if value is None else unit * value for value in values]
    return unit * values


def score_text(task: str, record: dict[str, Any]) -> str:
    return f"{score(task, record):.2f} " + ("x 0.001 squared error" if task == "adding" else "% right")


def scores(task: str, record: dict[str, Any]) -> str:
    """Mean (range) of the seeds that did not diverge."""
    values = [value for value in score(task, record) if value is not None]
    lost = len(record["loss"]) - len(values)
    texts = []
    if values:
        mean, *ends = (_text(value) for value in (statistics.fmean(values), min(values), max(values)))
        texts.append(f"{mean} ({ends[0]}-{ends[1]})" if len(values) > 1 else mean)
    if lost:
        texts.append(f"diverged ({lost} of {len(record['loss'])})")
    return " ".join(texts)


def _text(value: float) -> str:
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def _head(*names: str) -> list[str]:
    return [_row(*names), "|---" * len(names) + "|"]


def _row(*texts: str) -> str:
    return "| " + " | ".join(texts) + " |"
