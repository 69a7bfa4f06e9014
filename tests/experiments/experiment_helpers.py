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
    return subprocess.run(
        [sys.executable, "-m", "fused_rin.experiments", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
