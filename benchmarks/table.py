"""Turns pytest-benchmark's JSON of test_cpu.py and test_streaming_cpu.py into a small results file and a table.

python -m benchmarks.table RAW.json RESULTS.json     writes RESULTS.json and RESULTS.md beside it, prints the table
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fused_rin.experiments.machine import machine


def render(rows: list[dict[str, object]]) -> str:
    lines = []
    for what in ("inference", "training"):
        lines += [f"{what}: us a step, RIN / nn.RNN (ratio)", ""]
        lines.append(f"{'B, T, H':>14} {'in':>5} {'start':>5}   {'1 thread':>24}   {'2 threads':>24}")
        points: dict[tuple, dict[int, dict]] = {}
        for row in rows:
            if row["what"] == what:
                key = (row["B"], row["T"], row["H"], row["input_size"], row["start"])
                points.setdefault(key, {})[row["threads"]] = row
        for (b, t, h, i, start), by_threads in points.items():
            cells = [
                f"{r['us_per_step']:7.2f} / {r['nn_rnn_us_per_step']:7.2f} ({r['ratio']:4.1f}x)"
                for _, r in sorted(by_threads.items())
            ]
            lines.append(f"{f'{b}, {t}, {h}':>14} {i:>5} {start:>5}   " + "   ".join(f"{c:>24}" for c in cells))
        lines.append("")
    worst = min(rows, key=lambda row: row["ratio"])
    lines.append(
        f"lowest ratio: {worst['ratio']:.2f}x ({worst['what']}, B={worst['B']} T={worst['T']} H={worst['H']}, "
        f"{worst['threads']} thread(s), start {worst['start']})"
    )
    return "\n".join(lines)


def render_calls(rows: list[dict[str, object]]) -> str:
    """The points of test_streaming_cpu.py."""
    lines = ["short calls, B = 1, 1 thread: us a call, RIN / nn.RNN or RINCell / nn.RNNCell (ratio)", ""]
    lines.append(f"{'what':>10} {'module':>8} {'T, H':>8} {'h_0':>5}")
    for row in rows:
        sizes, state = f"{row['T']}, {row['H']}", "given" if row["state"] else "none"
        times = f"{row['us_per_call']:7.1f} / {row['torch_us_per_call']:7.1f} ({row['ratio']:5.2f}x)"
        lines.append(f"{row['what']:>10} {row['module']:>8} {sizes:>8} {state:>5}   {times}")
    return "\n".join(lines)


def main(raw: str, results: str) -> None:
    """`points` of the results file are those of test_cpu.py, `calls` those of test_streaming_cpu.py."""
    rows = [entry["extra_info"] for entry in json.loads(Path(raw).read_text())["benchmarks"]]
    points, calls = ([row for row in rows if ("us_per_call" in row) is short] for short in (False, True))
    about = machine()
    table = "\n\n".join(draw(part) for draw, part in ((render, points), (render_calls, calls)) if part)
    Path(results).write_text(json.dumps({"machine": about, "points": points, "calls": calls}, indent=1) + "\n")
    heading = (
        "# RIN against torch.nn.RNN(relu) on the CPU\n\nThe same function, the same weights, float32; `make bench-cpu`."
    )
    sets = ", ".join(about["instruction_sets"])
    where = (
        f'{about["cpu"]} ({sets}), torch {about["torch"]}. `start` is the initialisation: "rnn" leaves about half of '
    )
    where += 'the states at 0, "rin" few.'
    Path(results).with_suffix(".md").write_text(f"{heading}\n{where}\n\n```text\n{table}\n```\n")
    print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
