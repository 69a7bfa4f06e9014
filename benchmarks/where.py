"""Where the time of a layer's calls goes: the sampled functions of the native sweep, beside what the roof allows.

    make bench-where [RESULTS=FILE.json]     one minute; needs Linux's perf and results of `make bench-peers`

Five shapes, inference and training, float32, one thread. perf samples the processor's clock 4,000 times a second; a
sample in the native library counts for the part of the sweep that its function is, all others (torch's operators, the
interpreter, page faults) for "around it". What a step takes at least and what it took are those of the peers' results.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Results
from benchmarks.peers import roofline
from benchmarks.peers.registry import OURS

RESULTS = Path(__file__).parent / "results"
# B, T, D, I; of the shapes of benchmarks/peers/cases.py
SHAPES = [(1, 512, 128, 128), (1, 128, 1024, 1024), (16, 256, 256, 256), (64, 64, 512, 512), (128, 784, 100, 1)]
MODES = ("forward", "training")
# Part of the sweep: what the names of its functions have in them; the first that fits.
PARTS = {
    "products": r"dot|multiply_block",
    "weight gradients": r"outer|WeightGradient|load_across",
    "activation, skip, output": r"epilogue|tanh|sigmoid|softplus",
    "packing": r"pack",
    "rows, lists and loops": r"Sweep|sweep|InputProduct|Nonzero|Chunk",
}
CODE = """
import sys, torch
from fused_rin import RIN
batch, steps, hidden, inputs = map(int, sys.argv[1:5])
torch.set_num_threads(1)
rin, x = RIN(inputs, hidden), torch.randn(steps, batch, inputs)
grad = torch.randn(steps, batch, hidden)
if sys.argv[5] == "training":
    x.requires_grad_()
def call():
    with torch.set_grad_enabled(sys.argv[5] == "training"):
        out, _ = rin(x)
    if out.requires_grad:
        out.backward(grad)
for _ in range(3):
    call()
print("ready", flush=True)
while True:
    call()
"""


def sampled(shape: tuple[int, ...], mode: str) -> dict[str, float]:
    """Share of the samples by part of the sweep."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/samples"
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, *map(str, shape), mode], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"
            perf = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "4000", "-o", file, "-p", str(process.pid)]
            subprocess.run([*perf, "--", "sleep", "3"], check=True, capture_output=True)
        finally:
            process.kill()
            process.wait()
        listed = subprocess.run(
            ["perf", "report", "-i", file, "--stdio", "-q", "-F", "overhead,dso,sym", "-t", "@"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    shares: Counter[str] = Counter()
    for line in filter(None, map(str.strip, listed.splitlines())):
        share, library, symbol = (field.strip() for field in line.split("@", 2))
        part = "around it"
        if "_native" in library:
            part = next((name for name, words in PARTS.items() if re.search(words, symbol)), "rows, lists and loops")
        shares[part] += float(share.rstrip("%")) / 100
    total = sum(shares.values())
    return {part: round(shares[part] / total, 4) for part in (*PARTS, "around it")}


def rows(peers: Results) -> list[dict[str, Any]]:
    found = []
    for mode in MODES:
        for batch, steps, hidden, inputs in SHAPES:
            case = Case("float32", batch, hidden, mode, steps, inputs, threads=1)
            least, bound = roofline.seconds(case, peers.machine["roofline"]["1"])
            measured = peers.by_case()[case][OURS].us
            parts = sampled((batch, steps, hidden, inputs), mode)
            found.append(
                {"mode": mode, "batch": batch, "steps": steps, "hidden": hidden, "inputs": inputs, "bound": bound,
                 "least_us": least * 1e6, "us": measured, "parts": parts}
            )  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown; docs/speed.md has it as it stands here."""
    parts = list(results["rows"][0]["parts"])
    lines = [
        f"| call | B, D, input | bound by | at least, us a step | took | share | {' | '.join(parts)} |",
        "|---" * (6 + len(parts)) + "|",
    ]
    for row in results["rows"]:
        where = f"{row['batch']}, {row['hidden']}, {row['inputs']}"
        least, took = (f"{us:.3g}" if us < 100 else f"{us:.0f}" for us in (row["least_us"], row["us"]))
        cells = [row["mode"], where, row["bound"], least, took, f"{row['least_us'] / row['us']:.0%}"]
        cells += [f"{share:.0%}" for share in row["parts"].values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if shutil.which("perf") is None:
        raise SystemExit("perf is not here")
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "where.json"
    peers = Results.load(RESULTS / "peers.json")
    results = {"machine": {"cpu": peers.machine["cpu"], "torch": peers.machine["torch"]}, "rows": rows(peers)}
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
