"""Which backend runs, and that it says so."""

from __future__ import annotations

import os
import subprocess
import sys

import fused_rin
import pytest
import torch
from fused_rin import BackendError, cpu, explain, recurrence, use_backend

from tests.conftest import make_case


def test_explain_names_backend_plan_and_reason():
    choice = explain((512, 1, 64))
    assert choice.backend == "cpu"
    assert cpu.instruction_sets()[0] in choice.plan
    assert "first choice for cpu tensors" in choice.reason
    assert str(choice).startswith("cpu: ")
    assert explain(torch.randn(3, 2, 1, 4, dtype=torch.float64)).plan.count("float64") == 2
    assert explain((5, 2, 1, 8), backend="reference").backend == "reference"
    with pytest.raises(ValueError, match=r"problem must be \(T, B, G, D\) or \(T, B, D\), got \(5,\)"):
        explain((5,))


def test_devices_without_kernels_go_to_the_reference_and_say_why():
    choice = explain((5, 2, 8), device="mps")
    assert choice.backend == "reference"


def test_a_layer_is_explained():
    assert "input product" not in explain((5, 2, 8)).plan
    assert "input product and gradients in chunks" in explain((5, 2, 8), input_size=3).plan
    assert "input product in chunks" in explain((5, 2, 2, 8), input_size=3).plan
    assert "input product" not in explain((5, 2, 8), input_size=3, backend="reference").plan
    with pytest.raises(ValueError, match="input_size must not be negative, got -1"):
        explain((5, 2, 8), input_size=-1)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_asked_for_by_name_raises_with_the_reason(backend):
    case = make_case(3, 2, 4)
    with pytest.raises(BackendError, match=f"'{backend}'"):
        recurrence(case.pre, case.weight, backend=backend)
    with pytest.raises(BackendError, match=f"'{backend}'"), use_backend(backend):
        recurrence(case.pre, case.weight)
    with pytest.raises(BackendError, match=f"'{backend}'"):
        explain((3, 2, 4), backend=backend)


def test_a_missing_native_module_is_said_and_not_hidden(monkeypatch):
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(cpu, "_import_error", ImportError("no such file"), raising=False)
    choice = explain((5, 2, 8))
    assert choice.backend == "reference"
    assert "no such file" in choice.passed_over["cpu"]
    case = make_case(3, 2, 4)
    with pytest.raises(BackendError, match=r"'cpu' was asked for and cannot run.*no such file"):
        recurrence(case.pre, case.weight, backend="cpu")


def test_use_backend_changes_what_auto_means():
    case = make_case(30, 2, 40)
    kernel = recurrence(case.pre, case.weight)[0]
    with use_backend("reference"):
        loop = recurrence(case.pre, case.weight)[0]
        assert explain(case.pre).backend == "reference"
        assert torch.equal(recurrence(case.pre, case.weight, backend="cpu")[0], kernel)
    assert torch.equal(loop, recurrence(case.pre, case.weight, backend="reference")[0])
    assert explain(case.pre).backend == "cpu"
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("abacus"):
        pass


def test_the_environment_chooses_and_is_checked():
    def run(value):
        code = "import fused_rin; print(fused_rin.explain((2, 1, 3)).backend)"
        environment = {**os.environ, "FUSED_RIN_BACKEND": value}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("reference").stdout.strip() == "reference"
    assert "FUSED_RIN_BACKEND must be one of" in run("abacus").stderr


def test_importing_the_package_is_cheap():
    """Under 0.2 s on top of torch's own, the best of three."""
    code = (
        "import torch, time; t = time.perf_counter(); import fused_rin; print(time.perf_counter() - t);"
        "import sys; assert 'triton' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.2, times


def test_all_names_exist():
    assert all(hasattr(fused_rin, name) for name in fused_rin.__all__)
