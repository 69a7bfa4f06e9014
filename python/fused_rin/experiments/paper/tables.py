"""What came out of a rerun beside the paper's figures: Markdown and pictures, made of a results.json alone.

experiment       "adding", "mnist", "babi" or "babi-stable"
results          one entry for each cell of the paper's table that was run:
    row, model   which cell
    paper        what the paper has there
    epochs       the paper's
    constants    for each answer, the share of the test samples it is right for; empty where answers are numbers
    step_ms      where it was measured: milliseconds of a training step on one thread
    runs         one for each seed: epochs (that it has run), loss and accuracy of its last finite evaluation,
                 seconds, curve (step, loss, accuracy, seconds of every evaluation); "diverged" says why it ended
"""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib.figure import Figure

Record = dict[str, Any]
ALL = 0.995  # share of the paper's epochs that counts as all of them: epochs are whole, batches need not fill them
MARK = "†"
PLAIN_ANSWER = 1 / 6  # mean squared error of always answering 1 in the adding problem


def table(record: Record) -> str:
    """A line for each row of the paper's table; mean over the seeds, and their range when there are several."""
    results = record["results"]
    rows = list(dict.fromkeys(entry["row"] for entry in results))
    models = list(dict.fromkeys(entry["model"] for entry in results))
    cells = {(entry["row"], entry["model"]): entry for entry in results}
    answers = _best_answers(record)
    head = ["trial", *(["one answer"] if answers else []), *(text for m in models for text in (f"{m}, here", "paper"))]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        line = [row, *([_percent(record, answers[row])] if answers else [])]
        for model in models:
            entry = cells.get((row, model))
            line += [_here(record, entry), _paper(entry)] if entry else ["", ""]
        lines.append(line)
    if answers and len(rows) > 1:
        lines.append(_means(record, rows, models, cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + _legend(record, models)


def _best_answers(record: Record) -> dict[str, float]:
    """By row, the share of the test set that the best constant answer gets right; empty where answers are numbers."""
    return {entry["row"]: max(entry["constants"]) for entry in record["results"] if entry["constants"]}


def _means(record: Record, rows: list[str], models: list[str], cells: dict[tuple[str, str], Record]) -> list[str]:
    line = [f"**mean of {len(rows)}**", _percent(record, statistics.mean(_best_answers(record).values()))]
    for model in models:
        entries = [cells[row, model] for row in rows if (row, model) in cells and _last(cells[row, model], "accuracy")]
        if not entries:
            line += ["", ""]
            continue
        here = statistics.mean(statistics.mean(_last(entry, "accuracy")) for entry in entries)
        theirs = statistics.mean(float(entry["paper"].split()[0]) for entry in entries)
        count = f" ({len(entries)})" if len(entries) < len(rows) else ""
        line += [f"**{_percent(record, here)}**{count}", f"{theirs:.2f} %"]
    return line


def _legend(record: Record, models: list[str]) -> str:
    """What the table's marks mean, and how much was run."""
    results = record["results"]
    texts = []
    for model in models:
        entries = [entry for entry in results if entry["model"] == model]
        seeds = sorted({len(entry["runs"]) for entry in entries})
        texts.append(f"{model} {'-'.join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))}")
    lines = [f"Seeds: {', '.join(texts)}; the mean over them, and their range where there are several."]
    whole = {entry["epochs"] for entry in results}
    if all(_is_whole(entry, run) for entry in results for run in entry["runs"]):
        lines.append(f"All at the paper's {whole.pop()} epochs.")
    else:
        lines.append(
            f"**Where epochs are named, less than the paper's {whole.pop()} were run; do not compare such figures as "
            "equals.**"
        )
    if any("diverged" in run for entry in results for run in entry["runs"]):
        lines.append("Of a run that diverged, its last finite evaluation.")
    if any(entry["constants"] for entry in results):
        lines.append(f"One answer: what always giving the best one gets. {MARK}: what a network that always gives one "
                     "answer, not always the best, would have.")  # fmt: skip
    else:
        lines.append(f"Test error; always answering 1 gives {PLAIN_ANSWER:.4f}. The paper shows curves only.")
    return "\n".join(lines)


def _is_whole(entry: Record, run: Record) -> bool:
    return "diverged" in run or run["epochs"] >= ALL * entry["epochs"]


def _here(record: Record, entry: Record) -> str:
    quantity = "loss" if not entry["constants"] else "accuracy"
    values = _last(entry, quantity)
    show = _percent if entry["constants"] else _error
    texts = []
    if values:
        text = show(record, statistics.mean(values))
        if len(values) > 1:
            text += f" ({show(record, min(values), bare=True)} to {show(record, max(values), bare=True)})"
        elif entry["constants"] and _is_constant(values[0], entry, 1e-6):
            text += f" {MARK}"
        texts.append(text)
    parts = {f"{run['epochs']:.3g}" for run in entry["runs"] if not _is_whole(entry, run)}
    if parts:
        texts.append(f"{' and '.join(sorted(parts, key=float))} epochs")
    lost = [f"{run['epochs']:.3g}" for run in entry["runs"] if "diverged" in run]
    if lost:
        texts.append(f"diverged after {' and '.join(sorted(lost, key=float))}")
    return ", ".join(texts)


def _paper(entry: Record) -> str:
    text = entry["paper"]
    if entry["constants"] and _is_constant(float(text.split()[0]) / 100, entry, 0.00051):
        text += f" {MARK}"
    return text


def _is_constant(accuracy: float, entry: Record, tolerance: float) -> bool:
    return any(abs(accuracy - share) < tolerance for share in entry["constants"])


def _last(entry: Record, quantity: str) -> list[float]:
    return [run[quantity] for run in entry["runs"] if quantity in run]


def _percent(record: Record, share: float, bare: bool = False) -> str:
    """bAbI has 1,000 test questions a task, MNIST 10,000 images."""
    digits = 1 if record["experiment"].startswith("babi") else 2
    return f"{100 * share:.{digits}f}" + ("" if bare else " %")


def _error(record: Record, value: float, bare: bool = False) -> str:
    return f"{value:.2e}" if value < 1e-3 else f"{value:.4f}"


def draw(record: Record) -> Figure:
    """The picture of an experiment: curves of adding, and accuracies beside the paper's of the others."""
    return draw_adding(record) if record["experiment"] == "adding" else draw_beside_paper(record)


def draw_beside_paper(record: Record) -> Figure:
    """The accuracies as dots, the paper's as rings, the best constant answer as a line."""
    rows = list(dict.fromkeys(entry["row"] for entry in record["results"]))
    models = list(dict.fromkeys(entry["model"] for entry in record["results"]))
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    for colour, model in enumerate(models):
        place = 0.15 * (colour - (len(models) - 1) / 2)
        for entry in record["results"]:
            if entry["model"] == model:
                x = rows.index(entry["row"]) + place
                for run in entry["runs"]:
                    if "accuracy" in run:
                        style = "x" if "diverged" in run else "o"
                        axis.plot(x, 100 * run["accuracy"], style, color=f"C{colour}", markersize=5)
                axis.plot(x, float(entry["paper"].split()[0]), "o", color=f"C{colour}", fillstyle="none", markersize=9)
        axis.plot([], [], "o", color=f"C{colour}", label=model)
    axis.plot([], [], "o", color="grey", fillstyle="none", markersize=9, label="the paper")
    axis.plot([], [], "x", color="grey", markersize=5, label="before it diverged")
    for row, share in _best_answers(record).items():
        axis.hlines(100 * share, rows.index(row) - 0.35, rows.index(row) + 0.35, color="grey", linewidth=1)
    axis.plot([], [], color="grey", linewidth=1, label="one answer")
    axis.set_xticks(range(len(rows)), rows, rotation=60 if len(rows) > 6 else 0)
    axis.set_ylabel("test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.suptitle(f"{record['experiment']}: {_budget(record)}")
    return figure


def _budget(record: Record) -> str:
    whole = [_is_whole(entry, run) for entry in record["results"] for run in entry["runs"]]
    return "the paper's epochs" if all(whole) else "fewer than the paper's epochs, see the table"


def draw_adding(record: Record) -> Figure:
    """Test error of all runs, a row for each length: against the sequences seen, and against the time."""
    rows = list(dict.fromkeys(entry["row"] for entry in record["results"]))
    models = list(dict.fromkeys(entry["model"] for entry in record["results"]))
    figure = Figure(figsize=(10, 1 + 2.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False, sharey=True)
    for entry in record["results"]:
        colour = f"C{models.index(entry['model'])}"
        for number, run in enumerate(entry["runs"]):
            samples = run["batch_size"]
            label = entry["model"] if number == 0 else None
            steps, errors, _, seconds = zip(*run["curve"], strict=True)
            if "step_ms" in entry:  # what the run itself took, the machine's other work is part of
                seconds = tuple(step * entry["step_ms"] / 1e3 for step in steps)
            pair = axes[rows.index(entry["row"])]
            for axis, values, unit in ((pair[0], steps, samples / 1e6), (pair[1], seconds, 1 / 60)):
                axis.plot([value * unit for value in values], errors, color=colour, linewidth=1, label=label)
    for row, pair in zip(rows, axes, strict=True):
        for axis, text in zip(pair, ("million sequences", "minutes on one CPU thread"), strict=True):
            axis.axhline(PLAIN_ANSWER, color="grey", linestyle="--", linewidth=1)
            axis.set(yscale="log", xlabel=text, ylabel=f"{row}: test error")
            axis.grid(alpha=0.3)
        pair[0].legend(fontsize="small")
    figure.suptitle("adding: mean squared error; dashed: always answering 1")
    return figure
