"""What several tests of the experiments use."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from fused_rin.experiments.cli import main

from tests import warm

# MNIST and bAbI: where the environment says, else beside the checkout.
BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL = Path(os.environ.get("FUSED_RIN_DATA") or BESIDE)


def needs(name):
    """Skips a test, with the reason, where a real data set does not lie."""
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason=f"{REAL / name} is not there (set FUSED_RIN_DATA)")


def metrics(folder):
    """The metrics of a run without the clock times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def called(*arguments):
    """The exit code of the command line, in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def fused_rin(*arguments, **options):
    """Runs the command line in a process of its own."""
    return run_module("fused_rin.experiments", *arguments, **options)


def torchrun(processes, *arguments, **options):
    """Runs the command line in several processes that train together."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--no-python", *warm.PYTHON]
    return run_module(*launcher, "-m", "fused_rin.experiments", *arguments, **options)


def run_module(*arguments, **options):
    command = [*warm.PYTHON, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
