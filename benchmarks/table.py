"""Turns pytest-benchmark's JSON of test_cpu.py into a small results file and a table.

python -m benchmarks.table RAW.json RESULTS.json     writes RESULTS.json and RESULTS.md beside it, prints the table
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fused_rin.experiments.machine import machine

from benchmarks.cpu import OURS, is_call
from benchmarks.harness import MODES, PEER, Case, Measurement, Results, measurement

Rows = dict[Case, dict[str, Measurement]]


def ratio(row: dict[str, Measurement]) -> float:
    """How many times faster than the peer."""
    mine, peer = row[OURS].us, row[PEER].us
    assert mine
    assert peer
    return peer / mine


def render(rows: Rows) -> str:
    """The long sequences."""
    lines = []
    for mode in MODES:
        lines += [f"{mode}: us a step, RIN / nn.RNN (ratio)", ""]
        lines.append(f"{'B, T, H':>14} {'in':>5} {'start':>5}   {'1 thread':>24}   {'2 threads':>24}")
        points: dict[tuple[str, int, str], dict[int, str]] = {}
        for case, row in rows.items():
            if case.mode == mode:
                sizes = f"{case.batch}, {case.steps}, {case.hidden}"
                text = f"{row[OURS].us:7.2f} / {row[PEER].us:7.2f} ({ratio(row):4.1f}x)"
                points.setdefault((sizes, case.input_size or case.hidden, case.start), {})[case.threads] = text
        for (sizes, inputs, start), texts in points.items():
            lines.append(
                f"{sizes:>14} {inputs:>5} {start:>5}   " + "   ".join(f"{texts[n]:>24}" for n in sorted(texts))
            )
        lines.append("")
    worst = min(rows, key=lambda case: ratio(rows[case]))
    lines.append(
        f"lowest ratio: {ratio(rows[worst]):.2f}x ({worst.mode}, B={worst.batch} T={worst.steps} H={worst.hidden}, "
        f"{worst.threads} thread(s), start {worst.start})"
    )
    return "\n".join(lines)


def render_calls(rows: Rows) -> str:
    """The short calls."""
    lines = ["short calls, B = 1, 1 thread: us a call, RIN / nn.RNN or RINCell / nn.RNNCell (ratio)", ""]
    lines.append(f"{'what':>10} {'module':>8} {'T, H':>8} {'h_0':>5}")
    for case, row in rows.items():
        mine, peer = ((row[name].us or 0.0) * case.steps for name in (OURS, PEER))
        sizes, state = f"{case.steps}, {case.hidden}", "given" if case.state else "none"
        times = f"{mine:7.1f} / {peer:7.1f} ({ratio(row):5.2f}x)"
        lines.append(f"{case.mode:>10} {case.module:>8} {sizes:>8} {state:>5}   {times}")
    return "\n".join(lines)


def page(results: Results) -> str:
    """All of it, as Markdown."""
    rows = results.by_case()
    parts = [
        draw({case: row for case, row in rows.items() if is_call(case) is short})
        for draw, short in ((render, False), (render_calls, True))
        if any(is_call(case) is short for case in rows)
    ]
    about = results.machine
    head = (
        "# RIN against torch.nn.RNN(relu) on the CPU\n\nThe same function, the same weights, float32; `make bench-cpu`."
    )
    where = f"{about['cpu']} ({', '.join(about['instruction_sets'])}), torch {about['torch']}."
    start = '`start` is the initialisation: "rnn" leaves about half of the states at 0, "rin" few.'
    table = "\n\n".join(parts)
    return f"{head}\n{where} {start}\n\n```text\n{table}\n```\n"


def main(raw: str, out: str) -> None:
    rows = [measurement(entry["extra_info"]) for entry in json.loads(Path(raw).read_text())["benchmarks"]]
    results = Results(machine(), rows)
    results.save(Path(out))
    text = page(results)
    Path(out).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
