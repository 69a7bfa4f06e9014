"""What several tests of the experiments use."""

import json
import subprocess
import sys


def metrics(folder):
    """The metrics of a run without the clock times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def fused_rin(*arguments, **options):
    """Runs the command line in a process of its own."""
    return _run("fused_rin.experiments", *arguments, **options)


def torchrun(processes, *arguments, **options):
    """Runs the command line in several processes that train together."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m", "fused_rin.experiments"]
    return _run(*launcher, *arguments, **options)


def _run(*arguments, **options):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
