"""Results of benchmarks.gpu.measure as a table and a plot.

python -m benchmarks.gpu.report RESULTS/bench.json
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

from benchmarks.gpu.cases import BATCHES, DTYPES, HIDDEN, TF32, WIDE_HIDDEN
from benchmarks.harness import MODES, PEER, STEPS, Case, Measurement, Results

SIZES = HIDDEN + WIDE_HIDDEN


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def rows_of(results: Results) -> dict[tuple[Case, bool], dict[str, Measurement]]:
    """{(case, whether TF32 is allowed): {implementation: what it took}}"""
    found: dict[tuple[Case, bool], dict[str, Measurement]] = {}
    for case, row in results.by_case().items():
        for name, measured in row.items():
            found.setdefault((case, name.endswith(TF32)), {})[name.removesuffix(TF32)] = measured
    return found


def best(row: dict[str, Measurement]) -> Measurement | None:
    """The faster of our backends that has a time."""
    ours = [m for name, m in row.items() if name != PEER and m.us is not None]
    return min(ours, key=lambda m: m.us or math.inf, default=None)


def ratio(row: dict[str, Measurement]) -> float | None:
    """How many times faster than the peer the faster of our backends is."""
    mine, peer = best(row), row.get(PEER)
    if mine is None or mine.us is None or peer is None or peer.us is None:
        return None
    return peer.us / mine.us


def table(results: Results) -> str:
    """Markdown: us per step, replayed as a graph in brackets; the points where we lose stand out in bold."""
    lines = [f"# {results.machine.get('gpu', 'GPU')}: one layer, T = {STEPS}, us per step", ""]
    lines += [f"- {key}: {value}" for key, value in results.machine.items()]
    rows = rows_of(results)
    losses = [case for case, row in rows.items() if (ratio(row) or math.inf) < 1]
    lines += ["", f"Slower than {PEER} at {len(losses)} of {len(rows)} points.", ""]
    head = "| type | D | B | cuda | triton | nn.RNN | times faster | memory kept, ours / nn.RNN (MB) |"
    for mode in MODES:
        lines += [f"## {mode}", "", head, "|---|---|---|---|---|---|---|---|"]
        for dtype in DTYPES:
            for hidden in SIZES:
                for batch, tf32 in itertools.product(BATCHES, (False, True)):
                    row = rows.get((Case(dtype, batch, hidden, mode), tf32))
                    if row:
                        lines.append(_line(dtype + TF32 * tf32, hidden, batch, row))
        lines.append("")
    notes = sorted({f"{m.implementation}: {m.note}" for m in results.rows if m.note})
    return "\n".join([*lines, *(["## Notes", "", *(f"- {note}" for note in notes), ""] if notes else [])])


def _line(dtype: str, hidden: int, batch: int, row: dict[str, Measurement]) -> str:
    def cell(name: str) -> str:
        m = row.get(name)
        return "-" if m is None or m.us is None else f"{number(m.us)} ({number(m.us_graph)})"

    times = ratio(row)
    shown = "-" if times is None else f"**{times:.2f}**" if times < 1 else f"{times:.1f}"
    mine, peer = best(row), row.get(PEER)
    memory = [None if m is None or m.kept_bytes is None else m.kept_bytes / 1e6 for m in (mine, peer)]
    kept = " / ".join(map(number, memory))
    return f"| {dtype} | {hidden} | {batch} | {cell('cuda')} | {cell('triton')} | {cell(PEER)} | {shown} | {kept} |"


def plot(results: Results, path: Path) -> None:
    """Times faster than the peer over the hidden size, a line per batch; a row of panels per mode, one per type."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = rows_of(results)
    figure, axes = pyplot.subplots(len(MODES), len(DTYPES), figsize=(13, 7), sharex=True, sharey=True, squeeze=False)
    for i, mode in enumerate(MODES):
        for j, dtype in enumerate(DTYPES):
            axis = axes[i][j]
            for batch in BATCHES:
                points = [(d, ratio(rows.get((Case(dtype, batch, d, mode), False), {}))) for d in SIZES]
                points = [(d, r) for d, r in points if r is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=f"B = {batch}")
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(title=f"{dtype}, {mode}", xscale="log", yscale="log", xticks=SIZES)
            axis.set_xticklabels(map(str, SIZES), fontsize=7)
            axis.minorticks_off()
    axes[0][0].legend()
    figure.supxlabel("hidden size")
    figure.supylabel(f"times faster than {PEER}")
    figure.suptitle(results.machine.get("gpu", ""))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", type=Path)
    path = parser.parse_args().bench
    results = Results.load(path)
    path.with_name("table.md").write_text(table(results))
    plot(results, path.with_name("speedup.png"))
    print(f"wrote {path.with_name('table.md')} and {path.with_name('speedup.png')}")


if __name__ == "__main__":
    main()
