"""The table of a results file, as Markdown, and two pictures: ratio to the best peer, share of the roofline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import MODES, Case, Measurement, Results
from benchmarks.peers import roofline
from benchmarks.peers.cases import SHAPES, inputs, label
from benchmarks.peers.registry import OURS, PEERS
from benchmarks.peers.run import failures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Measurement]


def best(row: Row) -> Measurement | None:
    """The fastest that is not ours."""
    timed = [m for name, m in row.items() if name != OURS and m.us]
    return min(timed, key=lambda m: m.us or 0.0, default=None)


def ratio(row: Row) -> float | None:
    """How many times faster than the best peer."""
    mine, other = row.get(OURS), best(row)
    return other.us / mine.us if other and other.us and mine and mine.us else None


def write(results: Results, out: Path) -> list[Path]:
    """Beside `out`, NAME.json: NAME.md, and NAME-ratio.png and NAME-roofline.png if there are shapes in it."""
    page = out.with_suffix(".md")
    page.write_text(table(results))
    written = [page]
    if any(is_shape(case) for case in results.by_case()):
        from fused_rin.experiments.plots import save_figure

        for name, draw in (("ratio", draw_ratio), ("roofline", draw_roofline)):
            path = out.with_name(f"{out.stem}-{name}.png")
            save_figure(draw(results), path)
            written.append(path)
    return written


def is_shape(case: Case) -> bool:
    """One of the plain shapes, whatever was chosen of them."""
    plain = Case("float32", case.batch, case.hidden, case.mode, case.steps, case.input_size, threads=case.threads)
    return case == plain and (case.batch, case.steps, case.hidden, inputs(case)) in SHAPES


def table(results: Results) -> str:
    about = results.machine
    rows = results.by_case()
    starved, passes = any(row.starved for row in results.rows), about.get("passes", 1)
    names = [name for name in PEERS if any(name in row for row in rows.values())]
    lines = ["# The RIN and its peers on the CPU", "", _where(results), ""]
    lines += [
        f"Times are us a step, medians; bold is the fastest, and behind it the ratio of the best peer to {OURS}.",
        "Roof: the share of what multiply-adds and caches allow (`benchmarks/peers/roofline.py`). Every row was first",
        "compared with nn.RNN in float64: gradients too, in training. A dash: not run, the reasons are at the end.",
        *([f"Of {passes} passes, minutes apart, the fastest row of each counts."] if passes > 1 else []),
        *(["A question mark: others had the processor for a tenth of the time or more."] if starved else []),
    ]
    for mode in MODES:
        for threads in sorted({case.threads for case in rows}):
            chosen = {case: row for case, row in rows.items() if (case.mode, case.threads) == (mode, threads)}
            if not chosen:
                continue
            title = {"forward": "inference", "training": "forward and backward"}[mode]
            lines += ["", f"## {title}, {threads} thread{'s' if threads > 1 else ''}", ""]
            lines += [f"| case | {' | '.join(names)} | ratio | roof |", "|---" * (len(names) + 3) + "|"]
            for case, row in chosen.items():
                lines.append(_line(case, row, names, about.get("roofline", {})))
    lines += ["", "## What is not there", ""]
    lines += [f"- {name}: {reason}." for name, reason in about.get("missing", {}).items()] or ["- No peer is missing."]
    lines += _reasons(results.rows)
    lines += ["", "## Settings and load", ""]
    for peer, versions in about.get("peers", {}).items():
        text = ", ".join(f"{package} {version}" for package, version in versions.items())
        lines.append(f"- {peer}: {text}; threads by {about['settings'][peer]}.")
    others = [entry["others"] for entry in about.get("load", []) if entry.get("others") is not None]
    if others:
        lines.append(
            f"- Other processes used {min(others):.2f} to {max(others):.2f} processors while a block ran"
            f"{': not a quiet run' if max(others) > QUIET else ''}."
        )
    return "\n".join(lines) + "\n"


QUIET = 0.1  # processors that others may use


def _where(results: Results) -> str:
    about = results.machine
    caches = ", ".join(f"{name} {size}" for name, size in about.get("caches", {}).items())
    peaks = [
        f"{threads} thread{'s' if threads != '1' else ''}: "
        + ", ".join(f"{value:.0f} GFLOP/s {dtype}" for dtype, value in rates["gflops"].items())
        for threads, rates in about.get("roofline", {}).items()
        if threads != "missing"
    ]
    return f"{about['cpu']} ({', '.join(about['instruction_sets'])}; {caches}). " + "; ".join(peaks) + "."


def _line(case: Case, row: Row, names: list[str], rates: dict) -> str:
    fastest = min((m.us for m in row.values() if m.us), default=None)
    cells = []
    for name in names:
        us = row[name].us if name in row else None
        text = f"{us:.3g}" if us and us < 100 else f"{us:.0f}" if us else "-"
        cells.append((f"**{text}**" if us and us == fastest else text) + "?" * (us is not None and row[name].starved))
    times = ratio(row)
    mine = row[OURS].us if OURS in row else None
    roof = roofline.share(case, mine, rates) if mine else None
    cells += [f"{times:.2f}" if times else "-", f"{roof:.0%}" if roof else "-"]
    return f"| {label(case).removeprefix(case.mode + '-')} | {' | '.join(cells)} |"


def _reasons(rows: Iterable[Measurement]) -> list[str]:
    """Each once, with how many cases it is the reason of; failures by their case."""
    rows = list(rows)
    counts: dict[tuple[str, str], int] = {}
    failed = failures(rows)
    for row in rows:
        if row.us is None and row not in failed:
            key = row.implementation, row.note
            counts[key] = counts.get(key, 0) + 1
    lines = [f"- {name}, {count} rows: {note}." for (name, note), count in counts.items()]
    return lines + [
        f"- {row.implementation}, {label(row.case)}, {row.case.threads} thread(s): {row.note}" for row in failed
    ]


def draw_ratio(results: Results) -> Figure:
    """A field for each mode and number of threads: D to the right, B upwards, in each cell the ratio and the peer."""
    rows = {case: row for case, row in results.by_case().items() if is_shape(case) and inputs(case) == case.hidden}
    values = {case: value for case, row in rows.items() if (value := ratio(row))}
    batches, sizes = sorted({case.batch for case in values}), sorted({case.hidden for case in values})
    figure, axes = _panels(results, f"Time of the fastest peer by time of {OURS}, float32, input_size = D")
    for (mode, threads), axis in axes.items():
        for case, value in values.items():
            if (case.mode, case.threads) != (mode, threads):
                continue
            x, y = sizes.index(case.hidden), batches.index(case.batch)
            strength = min(abs(value - 1), 1.0)
            colour = (0.12, 0.47, 0.71) if value >= 1 else (0.84, 0.15, 0.16)
            axis.add_patch(_square(x, y, (*colour, 0.1 + 0.5 * strength)))
            other = best(rows[case])
            assert other is not None
            axis.text(x, y + 0.12, f"{value:.2f}", ha="center", va="center", fontsize=10)
            axis.text(x, y - 0.22, other.implementation, ha="center", va="center", fontsize=5.5)
        axis.set_xticks(range(len(sizes)), map(str, sizes))
        axis.set_yticks(range(len(batches)), map(str, batches))
        axis.set_xlim(-0.5, len(sizes) - 0.5)
        axis.set_ylim(-0.5, len(batches) - 0.5)
        axis.set_xlabel("D, units")
        axis.set_ylabel("B, sequences")
    return figure


def draw_roofline(results: Results) -> Figure:
    """A line for each B: the share of the roof over D, ours solid, the best peer's dashed."""
    rates = results.machine.get("roofline", {})
    rows = {case: row for case, row in results.by_case().items() if is_shape(case) and inputs(case) == case.hidden}
    batches = sorted({case.batch for case in rows})
    figure, axes = _panels(
        results, f"Share of the roofline, float32, input_size = D: {OURS} solid, the fastest peer dashed"
    )
    for (mode, threads), axis in axes.items():
        for colour, batch in enumerate(batches):
            cases = sorted(
                (c for c in rows if (c.mode, c.threads, c.batch) == (mode, threads, batch)), key=lambda c: c.hidden
            )
            for style, pick in (("-o", lambda row: row.get(OURS)), ("--x", best)):
                points = [
                    (case.hidden, roofline.share(case, found.us, rates))
                    for case in cases
                    if (found := pick(rows[case])) and found.us
                ]
                points = [point for point in points if point[1] is not None]
                if points:
                    name = f"B = {batch}" if style == "-o" else None
                    x, y = zip(*points, strict=True)
                    axis.plot(x, y, style, color=f"C{colour}", label=name, markersize=3, linewidth=1.2)
        axis.set_xscale("log", base=2)
        sizes = sorted({case.hidden for case in rows})
        axis.set_xticks(sizes, map(str, sizes))
        axis.set_xlabel("D, units")
        axis.set_ylabel("share")
        axis.set_ylim(0, max(1.1, 1.05 * axis.get_ylim()[1]))
        axis.axhline(1, color="grey", linewidth=1)
        axis.grid(alpha=0.3)
        if axis.lines[1:]:
            axis.legend(fontsize="x-small")
    return figure


def _panels(results: Results, title: str) -> tuple[Figure, dict]:
    from matplotlib.figure import Figure

    shapes = [case for case in results.by_case() if is_shape(case)]
    threads = sorted({case.threads for case in shapes})
    modes = [mode for mode in MODES if any(case.mode == mode for case in shapes)]
    figure = Figure(figsize=(5.2 * len(threads), 3.6 * len(modes)), layout="constrained")
    grid = figure.subplots(len(modes), len(threads), squeeze=False)
    axes = {(mode, n): grid[i][j] for i, mode in enumerate(modes) for j, n in enumerate(threads)}
    for (mode, number), axis in axes.items():
        axis.set_title(f"{mode}, {number} thread{'s' if number > 1 else ''}", fontsize=10)
    figure.suptitle(f"{title}\n{results.machine['cpu']}", fontsize=10)
    return figure, axes


def _square(x: int, y: int, colour: tuple[float, float, float, float]):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=colour, edgecolor="none")
