"""Calls from Python at their worst (calls.py), in processes of their own; `make sanitize` runs them for longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fused_rin import cpu

from . import calls

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
    pytest.mark.skipif(cpu._native is None, reason="the native module was not built"),
]

# The import of torch is most of the time: what leaves a process as it was shares one.
TOGETHER = ["no_more_threads", "many_threads", "nested_calls", "exceptions", "forks_after_calls"]


@pytest.mark.parametrize(
    "scenarios", [["forks_before_the_first_call", "exits_during_a_call"], TOGETHER], ids=["first", "together"]
)
def test_every_result_is_as_alone(scenarios):
    command = [sys.executable, "-m", "tests.sanitize.calls", *scenarios]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("as alone") == len(scenarios), done.stdout


def test_no_scenario_is_left_out():
    assert {"forks_before_the_first_call", "exits_during_a_call", *TOGETHER} == set(calls.SCENARIOS)
