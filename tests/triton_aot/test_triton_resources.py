"""What the compiled kernels cost on GPUs that are not here, against a committed table (resources.json).

The table has a part for every release of Triton, since each schedules differently. A change is either a regression or,
after a look at it, a new part of the table (`python -m tests.triton_aot.triton_aot_compile --write`). With a release
that the table does not have, nothing may spill and the plan's bounds hold. `make test-triton TRITON=3.6.0` runs these
tests and those of the interpreter with another release.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings

import pytest
from fused_rin import triton_kernels

from tests.triton_aot import triton_aot_compile

pytest.importorskip("triton", reason="Triton has no wheel for this system, or was not installed")

HERE = pathlib.Path(__file__).parent
TABLES = json.loads((HERE / "resources.json").read_text())
TABLE = TABLES.get(importlib.metadata.version("triton"), {})
NAMES = [
    triton_aot_compile.name_of(arch, *instance)
    for arch in triton_aot_compile.DEVICES
    for instance in triton_aot_compile.INSTANCES
]


def script(name: str) -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    module = f"tests.triton_aot.{name}"
    run = subprocess.run(
        [sys.executable, "-m", module], cwd=HERE.parent.parent, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled() -> dict:
    return script("triton_aot_compile")


@pytest.fixture(scope="module")
def called() -> dict:
    return script("triton_jit_calls")


def test_the_oldest_and_the_newest_are_in_the_table() -> None:
    """The oldest that the backend takes, the one that this environment is made with, and the release before it."""
    assert {tuple(map(int, version.split(".")[:2])) for version in TABLES} >= {triton_kernels.OLDEST, (3, 8), (3, 9)}
    for table in TABLES.values():
        assert set(table) == set(NAMES)
        assert all(figures["stack"] == 0 for figures in table.values())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills_and_the_plan_bounds_what_it_takes(name: str, compiled: dict) -> None:
    found = compiled["found"][name]
    assert found["stack"] == 0, f"{name}: {found['stack']} bytes of registers are spilled"
    assert found["registers"] <= found["most_registers"]
    assert found["shared_memory"] <= found["bound"]


def test_as_in_the_table(compiled: dict) -> None:
    if not TABLE:
        warnings.warn(f"Triton {compiled['triton']} is not in the table, which has {sorted(TABLES)}", stacklevel=1)
        return
    found = {name: triton_aot_compile.in_table(figures) for name, figures in compiled["found"].items()}
    for name in set(TABLE) - set(triton_aot_compile.SAMPLE):
        found[name] |= {"cycles": TABLE[name]["cycles"]} if "cycles" in TABLE[name] else {}
    assert found == TABLE, f"if this is meant: python -m {triton_aot_compile.__name__} --write"


def test_u_stays_on_chip(compiled: dict) -> None:
    """The loop of a plan that keeps U in registers loads no more than the step's own inputs.

    Read from global memory by 8 warps, a 128 x 128 bfloat16 U would be 8 loads of 16 bytes a thread, and as many
    ldmatrix from shared memory.
    """
    for arch in ("sm_80", "sm_90", "sm_100"):
        found = compiled["found"][f"{arch} 128 bfloat16 forward"]
        assert found["global_loads"] == 1  # pre
        # The exchange of the state's fragments between warps: 10 (Triton 3.6, 3.9) or 18 (3.8).
        assert found["shared_loads"] <= 18


def test_a_load_from_l2_is_hidden() -> None:
    """The input of a step, read while the one before it is computed, where programs do not meet. By the step model, in
    every release of the table; one further off costs up to two fifths of a step.
    """
    for version, table in TABLES.items():
        for name in NAMES:
            cycles = table[name].get("cycles")
            hidden = int(name.split()[1])
            if cycles is None or hidden > 256:
                continue
            assert cycles[1] <= 1.15 * cycles[0], f"{version} {name}"
            assert cycles[2] <= 1.45 * cycles[0], f"{version} {name}"


def test_no_batch_and_no_length_compiles_again(called: dict) -> None:
    """T and B of 1, of multiples of 16 and of none, which Triton would tell apart; T beyond 65,535."""
    for name, counts in called["kernels"].items():
        assert counts["first"] == 2, name  # forward and backward
        assert counts["later"] == 0, name


def test_a_first_call_compiles_in_less_than_3_s(called: dict) -> None:
    for name, counts in called["kernels"].items():
        assert counts["seconds"] < 3, name


def test_every_kind_of_input_compiles(called: dict) -> None:
    assert called["kinds"] == 6 + 4 * 4  # those above; forward, and backward with both gradients or either


def test_waves_leave_every_program_an_sm(called: dict) -> None:
    """18 tiles of 32 slices on 132 SMs: four tiles at a time, forward and backward."""
    assert called["waves"] == [[4, 32], [4, 32], [4, 32], [4, 32], [2, 32]] * 2


def test_the_barrier_releases_and_acquires(compiled: dict) -> None:
    """In PTX: stores of x, a barrier of the block, a releasing arrival, acquiring polls, a barrier, loads past L1."""
    assert compiled["ptx"]
    for name, ptx in compiled["ptx"].items():
        loop = [
            mnemonic
            for line in ptx.splitlines()
            if (mnemonic := re.match(r"(?:@!?%p\d+ )?((?:st|ld|atom)\.global\S*|bar\.sync|bra\S*)", line.strip()))
        ]
        order = [m[1] for m in loop]
        arrival = next(k for k, m in enumerate(order) if m.startswith("atom.global.gpu.acq_rel.add"))
        before = [m for m in order[:arrival] if not m.startswith("bra")]
        assert before[-1] == "bar.sync", f"{name}: other threads' stores are not ordered before the arrival"
        last_store = max(k for k, m in enumerate(before) if m.startswith("st.global"))
        assert "bar.sync" in before[last_store:], name
        poll = next(k for k, m in enumerate(order) if k > arrival and "acquire" in m)
        assert "bar.sync" in order[poll : poll + 2], f"{name}: threads may load before the poll is over"
        # Every read of the other programs' state bypasses L1, and nothing else needs to.
        past_l1 = [m for m in order if m.startswith("ld.global.cg")]
        assert past_l1, name
