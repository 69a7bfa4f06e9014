"""A compiled module that is missing or cannot be loaded: one warning, the loader's own words, and no silence."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import fused_rin
import pytest

from tests import warm

SUFFIX = EXTENSION_SUFFIXES[0]
CODE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    caught.clear()
    import fused_rin
    from fused_rin import RIN, explain, recurrence
    rin, x = RIN(4, 8), torch.randn(5, 2, 4)
    for _ in range(3):
        rin(x)[0].sum().backward()
        recurrence(torch.randn(5, 2, 1, 8), torch.randn(1, 8, 8))
    choice = explain(rin, x)
    cuda = explain((5, 2, 8), device="cuda").passed_over["cuda"]
said = [f"{w.category.__name__} {w.message}" for w in caught if "fused_rin" in str(w.message)]
print(*said, sep="\\n---\\n")
print("===")
print(choice)
print("===")
try:
    recurrence(torch.randn(5, 2, 1, 8), torch.randn(1, 8, 8), backend="cpu")
except fused_rin.BackendError as error:
    print(error)
print("===")
print(cuda)
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package without its compiled modules."""
    source, folder = Path(fused_rin.__file__).parent, tmp_path / "fused_rin"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "experiments"))
    return folder


def run(package: Path) -> list[str]:
    """The warnings, what explain says, what a call by name says, what is said of CUDA."""
    path = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "FUSED_RIN_BACKEND": ""}
    done = subprocess.run([*warm.PYTHON, "-c", CODE], env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [part.strip() for part in done.stdout.split("===")]


def test_one_that_is_missing(package):
    warning, choice, by_name, cuda = run(package)
    reason = f"no file _native*.so in {package}"
    assert warning == (
        "RuntimeWarning fused_rin._native could not be loaded, so recurrences of CPU tensors run as a loop in Python, "
        "1.2 to 4 times as long as torch.nn.RNN; install fused-rin again with this Python (`pip install .` in its "
        f"sources). {reason}"
    )
    assert choice.startswith("reference: a loop of PyTorch operations")
    assert f"not cpu: the native module could not be loaded ({reason})" in choice
    assert by_name.startswith(
        f"backend 'cpu' was asked for and cannot run: the native module could not be loaded ({reason})"
    )
    assert f"the CUDA module could not be loaded (no file _cuda*.so in {package})" in cuda  # and no warning: optional


def test_one_that_is_broken_and_one_of_another_python(package):
    (package / f"_native{SUFFIX}").write_bytes(b"no machine code")
    other = package / "_cuda.cpython-27-x86_64-linux-gnu.so"
    other.touch()
    warnings, choice, by_name, cuda = run(package)
    reason = f"{package}/_native{SUFFIX}: "
    of_cpu, of_cuda = warnings.split("\n---\n")
    assert reason in of_cpu  # as the system's loader says it: file too short, invalid ELF header
    assert f"not cpu: the native module could not be loaded ({reason}" in choice
    assert reason in by_name
    assert of_cuda.startswith("RuntimeWarning fused_rin._cuda could not be loaded, so recurrences of CUDA tensors")
    expected = f"{other.name} in {package} is of another Python, this one loads _cuda{SUFFIX}"
    assert expected in of_cuda
    assert expected in cuda
