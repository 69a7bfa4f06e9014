"""Kills `fused-rin train` again and again, and goes on with it each time: it has to end as if nothing had happened.

    python tests/experiments/kills.py FOLDER --times 200 --every 1

Every run is killed with SIGKILL at a random moment until one lasts to the end; then the next begins, until so many
were killed. First once before each operation on a file (open, link, rename, ...) that a run makes, or --every so many.

Processes are forked from this one, which has imported everything and computed nothing, so that a moment of the run is
hit and not one of three seconds of imports. `main` is what the command calls.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from fused_rin.experiments.cli import main
from fused_rin.experiments.training import progress  # noqa: F401  (imports what the command imports late)
from fused_rin.experiments.training.checkpoints import read_checkpoint

TINY = [
    "--task",
    "adding",
    "--length",
    "10",
    "--hidden-size",
    "8",
    "--test-size",
    "20",
    "--threads",
    "1",
    "--ema",
    "0.9",
]
TINY += ["--steps", "24", "--log-every", "5", "--eval-every", "10", "--checkpoint-every", "7"]
OPERATIONS = ("open", "os.mkdir", "os.link", "os.rename", "os.remove")


def start(folder: Path, before: int = 0) -> int:
    """A process that begins the run, or goes on with it. `before`: it kills itself before that operation on a file."""
    begun = (folder / "config.json").exists()
    arguments = ["train", "--resume", str(folder)] if begun else ["train", *TINY, "--out", str(folder)]
    if pid := os.fork():
        return pid
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if before:
            kill_before(before, folder)
        main(arguments)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def kill_before(number: int, folder: Path) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in OPERATIONS and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def ended(pid: int, folder: Path) -> bool:
    """Waits. Whether it came to its end and was not killed; anything else is a failure."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"{folder}: exit code {code}: {folder.with_suffix('.log').read_text()}")
    return code == 0


def outcome(folder: Path) -> str:
    """All that a run leaves, without the clock's times, as text that is equal where all bits are."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoint = read_checkpoint(folder / "checkpoint.pt")
    values, shape = torch.utils._pytree.tree_flatten({**checkpoint, "seconds": 0})
    values = [value.numpy().tobytes() if isinstance(value, torch.Tensor) else value for value in values]
    files = sorted(path.name for path in folder.iterdir())
    return repr(([{**record, "seconds": 0} for record in records], values, shape, files))


def check(folder: Path, expected: str) -> None:
    if outcome(folder) != expected:
        raise SystemExit(f"{folder}: ended as\n{outcome(folder)}\nand not as\n{expected}")
    shutil.rmtree(folder)


def run(out: Path, times: int, every: int, seed: int) -> None:
    out.mkdir(parents=True)
    begin = time.perf_counter()
    assert ended(start(out / "whole"), out / "whole")
    seconds = time.perf_counter() - begin
    expected = outcome(out / "whole")
    folder, operation, killed = out / "files", 1, 0
    while every and not ended(start(folder, operation), folder):
        operation, killed = operation + every, killed + 1
        assert ended(start(folder), folder)
        check(folder, expected)
    print(f"killed before {killed} of about {operation} operations on files", flush=True)
    killed, generator, most = 0, random.Random(seed), 0
    while killed < times:
        folder, here = out / f"killed-{killed}", 0
        while True:
            pid = start(folder)
            if killed < times:
                time.sleep(generator.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)  # it is ours until it is waited for
            if ended(pid, folder):
                break
            killed, here = killed + 1, here + 1
        check(folder, expected)
        most = max(most, here)
    print(f"killed {killed} times at random moments of {seconds:.2f} s, one run up to {most} times; all as not killed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that does not exist yet")
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--every", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run(options.folder, options.times, options.every, options.seed)
