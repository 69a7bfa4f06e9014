"""Where the warps of a kernel stand in a step, by ncu's samples: each instruction of the loop with its share.

    python -m benchmarks.gpu.stalls KERNEL [KERNEL ...]      names as in benchmarks.gpu.steps

Clocks are left as they are. An instruction's samples are of warps that are about to issue it, so its share says what it
waited for; "selected" is a cycle in which it was issued.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.cubins import find_tool

SECTIONS = ("SourceCounters", "WarpStateStats")
OFTEN = 0.9  # of the executions of the instruction that ran most: the loop


def profile(kernel: str, folder: Path) -> list[list[str]]:
    """Rows of ncu's source page. Raises RuntimeError with what ncu said."""
    report = folder / "report"
    command = [find_tool("ncu"), "--clock-control", "none", "--warp-sampling-interval", "0", "-f", "-o", str(report)]
    for section in SECTIONS:
        command += ["--section", section]
    command += ["-k", "regex:(block|cluster|grid)_sweep", "-c", "1", sys.executable, "-m", "benchmarks.gpu.steps"]
    command += [str(folder / "steps.json"), "--only", kernel, "--launches", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ncu: {(done.stdout + done.stderr).strip()[-500:]}")
    page = [find_tool("ncu"), "--import", f"{report}.ncu-rep", "--page", "source", "--csv"]
    text = subprocess.run(page, capture_output=True, text=True, check=True).stdout
    return list(csv.reader(text.splitlines()))


def lines(rows: list[list[str]]) -> list[str]:
    """The kernel's stalls in percent, then its loop; without ncu's table, nothing."""
    head = next((i for i, row in enumerate(rows) if row and row[0] == "Address"), None)
    if head is None:
        return []
    names = rows[head]
    source, samples, executed = (names.index(n) for n in ("Source", "# Samples", "Instructions Executed"))
    kinds = [(i, n.removeprefix("stall_")) for i, n in enumerate(names) if n.startswith("stall_") and "Not" not in n]
    body = [row for row in rows[head + 1 :] if row and row[0].startswith("0x")]
    total = sum(int(row[samples]) for row in body)
    most = max(int(row[executed]) for row in body)

    def share(count: float) -> str:
        return f"{100 * count / max(1, total):.1f}%"

    all_kinds = sorted(((sum(int(row[i] or 0) for row in body), kind) for i, kind in kinds), reverse=True)
    found = [f"{total} samples: " + ", ".join(f"{kind} {share(n)}" for n, kind in all_kinds if n > total / 200)]
    for row in body:
        if int(row[executed]) >= OFTEN * most:
            count = int(row[samples])
            why = [
                f"{kind} {share(int(row[i]))}" for i, kind in kinds if int(row[i] or 0) > max(total / 200, count / 4)
            ]
            found.append(f"  {row[source].strip()[:80]:80} {share(count):>6} {', '.join(why)}".rstrip())
    return found


def main() -> None:
    for kernel in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            print(f"#### {kernel}")
            print("\n".join(lines(profile(kernel, Path(folder)))), flush=True)


if __name__ == "__main__":
    main()
