"""Pictures, drawn without a display and without pyplot's global state."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .files import reporting, write_atomically

Records = list[dict[str, Any]]


def save_figure(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with reporting(path, "write the picture"):
        write_atomically(path, buffer.getbuffer())


def draw_curves(
    runs: dict[str, Records],
    title: str,
    *,
    baseline: float | None = None,
    splits: tuple[str, ...] = ("train", "test"),
) -> Figure:
    """Loss and accuracy against the step, a colour a run; training pale where both splits are drawn.

    Args:
        runs: the metrics of each run by its name.
        baseline: a loss to draw as a grey line, e.g. that of always giving the mean.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        for colour, (name, records) in enumerate(runs.items()):
            for split in splits:
                chosen = [record for record in records if record["split"] == split]
                label = split if len(runs) == 1 else name
                axis.plot(
                    [record["step"] for record in chosen],
                    [record[quantity] for record in chosen],
                    color=f"C{colour}",
                    label=label if split == splits[-1] or len(runs) == 1 else None,
                    **({"linewidth": 0.9, "alpha": 0.5} if split == "train" and len(splits) > 1 else {}),
                )
        axis.set_xlabel("step")
        axis.set_ylabel(quantity)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(-0.02, 1.02)
    if baseline is not None:
        axes[0].axhline(baseline, color="grey", linestyle="--", linewidth=1)
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    return figure
