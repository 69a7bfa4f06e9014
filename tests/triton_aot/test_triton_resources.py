"""What the compiled kernels cost on GPUs that are not here, against a committed table (resources.json).

The limits are the larger of what Triton 3.6 and the newest release make. A rise is either a regression or, after a
look at it, a new line of the table (`python -m tests.triton_aot.triton_aot_compile --write`).
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
TABLE = json.loads((HERE / "resources.json").read_text())
CLOSE = 1.05  # other releases of Triton schedule a little differently


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


@pytest.mark.parametrize("name", TABLE)
def test_within_the_table(name: str, compiled: dict) -> None:
    found = compiled["found"][name]
    assert found["stack"] == 0, f"{name}: {found['stack']} bytes of registers are spilled"
    for figure, limit in TABLE[name].items():
        assert found[figure] <= CLOSE * limit, f"{name}: {figure} {found[figure]}, the table allows {limit}"


def test_the_table_is_complete(compiled: dict) -> None:
    assert set(compiled["found"]) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_bounds_shared_memory(name: str, compiled: dict) -> None:
    assert compiled["found"][name]["shared_memory"] <= compiled["found"][name]["bound"]


def test_u_stays_on_chip(compiled: dict) -> None:
    """The loop of a plan that keeps U in registers loads no more than the step's own inputs.

    Read from global memory by 8 warps, a 128 x 128 bfloat16 U would be 8 loads of 16 bytes a thread, and as many
    ldmatrix from shared memory.
    """
    for arch in ("sm_80", "sm_90", "sm_100"):
        found = compiled["found"][f"{arch} 128 bfloat16 forward"]
        assert found["global_loads"] == 1  # pre
        assert found["shared_loads"] <= 16  # the exchange of the state's fragments between warps


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
