"""Which backend runs, and that it says so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import fused_rin
import pytest
import torch
from fused_rin import BackendError, backends, cpu, cuda, explain, recurrence, triton_kernels, use_backend
from fused_rin.device import Device

from tests import warm
from tests.conftest import CudaModule, make_case


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
    assert "input product and gradients in chunks" in explain((50, 2, 8), input_size=3).plan
    assert "input product in chunks" in explain((50, 2, 2, 8), input_size=3).plan
    assert "input product" not in explain((50, 2, 8), input_size=3, backend="reference").plan
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
    monkeypatch.setattr(cpu, "_missing", "no such file")
    choice = explain((5, 2, 8))
    assert choice.backend == "reference"
    assert "no such file" in choice.passed_over["cpu"]
    case = make_case(3, 2, 4)
    with pytest.raises(BackendError, match=r"'cpu' was asked for and cannot run.*no such file"):
        recurrence(case.pre, case.weight, backend="cpu")


def test_a_gpu_that_is_not_here(monkeypatch):
    """On a machine without one, problems "on cuda" can be asked about all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends._kept_reason.cache_clear()
    choice = explain((5, 2, 8), device="cuda")
    backends._kept_reason.cache_clear()
    assert choice.backend == "reference"
    assert set(choice.passed_over) == {"cuda", "triton"}
    missing = importlib.util.find_spec("triton") is None
    assert ("Triton is not installed" if missing else "no GPU here") in choice.passed_over["triton"]


class TestOnAGpu:
    """What "auto" does where the first GPU backend, or both, cannot run, and how a named one refuses; on GPUs that
    are not here."""

    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch):
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(triton_kernels, "_missing", lambda: None)
        self.be(Device("H200", (9, 0), 132, 227 * 1024, 65536, 50 << 20, 16))
        yield
        backends._kept_reason.cache_clear()

    def be(self, device):
        backends._kept_reason.cache_clear()
        self.monkeypatch.setattr(cuda, "_cuda", CudaModule())  # anew: what it can use of a device is remembered
        self.monkeypatch.setattr(cuda, "device_record", lambda index: device)
        self.monkeypatch.setattr(triton_kernels, "device_record", lambda index: device)

    def refuses(self, backend, hidden, dtype, reason):
        with pytest.raises(BackendError, match=f"'{backend}' was asked for and cannot run: .*{reason}"):
            explain((5, 2, hidden), device="cuda", dtype=dtype, backend=backend)

    def test_cuda_first(self):
        choice = explain((5, 2, 128), device="cuda", dtype=torch.bfloat16)
        assert (choice.backend, choice.passed_over) == ("cuda", {})

    def test_triton_where_cuda_has_no_plan(self):
        choice = explain((5, 2, 2100), device="cuda", dtype=torch.bfloat16)
        assert choice.backend == "triton"
        assert "before it cannot run" in choice.reason
        assert "hidden sizes up to 2048" in choice.passed_over["cuda"]
        assert "use backend='triton'" in choice.passed_over["cuda"]
        assert "not cuda: " in str(choice)

    def test_triton_where_cuda_was_not_built(self):
        self.monkeypatch.setattr(cuda, "_cuda", None)
        self.monkeypatch.setattr(cuda, "_missing", "no module")
        choice = explain((5, 2, 128), device="cuda")
        assert choice.backend == "triton"
        assert "no module" in choice.passed_over["cuda"]

    def test_the_reference_where_the_matrix_fits_nothing(self):
        choice = explain((5, 2, 100_000), device="cuda", dtype=torch.bfloat16)
        assert choice.backend == "reference"
        assert 'use backend="reference"' in choice.passed_over["triton"]
        assert "hidden size of 100000" in choice.passed_over["triton"]
        self.refuses("triton", 100_000, torch.bfloat16, 'use backend="reference"')

    @pytest.mark.parametrize("reason", ["is not installed", "is older than"])
    def test_triton_absent_or_too_old(self, reason):
        self.monkeypatch.setattr(triton_kernels, "_missing", lambda: f'Triton {reason}; use backend="auto"')
        choice = explain((5, 2, 3000), device="cuda")
        assert choice.backend == "reference"
        assert reason in choice.passed_over["triton"]
        self.refuses("triton", 3000, torch.float32, f"{reason}.*use backend=")

    def test_an_old_gpu(self):
        self.be(Device("T4", (7, 5), 40, 64 * 1024, 65536, 4 << 20, 1))
        choice = explain((5, 2, 64), device="cuda", dtype=torch.float16)
        assert choice.backend == "reference"
        assert all("T4 has 7.5" in why for why in choice.passed_over.values())
        self.refuses("triton", 64, torch.float16, 'T4 has 7.5; use backend="reference"')

    def test_a_device_of_another_kind(self):
        assert explain((5, 2, 64), device="xpu").backend == "reference"
        with pytest.raises(BackendError, match=r"'triton' was asked for .* got xpu; use backend=\"auto\""):
            explain((5, 2, 64), device="xpu", backend="triton")


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
        return subprocess.run([*warm.PYTHON, "-c", code], env=environment, capture_output=True, text=True)

    assert run("reference").stdout.strip() == "reference"
    assert "FUSED_RIN_BACKEND must be one of" in run("abacus").stderr


def test_importing_the_package_is_cheap():
    """Beside torch it brings in its own files, and nothing that is slow to import: no Triton, no plots, no ONNX."""
    code = (
        "import sys, torch; before = set(sys.modules); import fused_rin;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"fused_rin", "torch"}


def test_all_names_exist():
    assert all(hasattr(fused_rin, name) for name in fused_rin.__all__)
