"""What `make wheel` runs with the Python of a fresh environment that has a wheel and nothing else of this project.

python wheel_smoke.py VERSION cpu|cuda    the package, in an environment with torch
python wheel_smoke.py MODULE.so           the native module alone, for want of a torch for this Python
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path


def raises(error: type[Exception], words: str, call, *arguments) -> None:
    """An exception of C++ arrives as Python's."""
    try:
        call(*arguments)
    except error as caught:
        said = str(caught)
    else:
        said = f"nothing was raised by {call}"
    assert words in said, said


def load(path: str) -> None:
    loader = importlib.machinery.ExtensionFileLoader("_native", path)
    spec = importlib.util.spec_from_loader("_native", loader)
    assert spec is not None
    native = importlib.util.module_from_spec(spec)
    loader.exec_module(native)
    assert "baseline" in native.isas() or "neon" in native.isas(), native.isas()
    for isa in native.isas():
        assert native.plan((10, 3, 1, 16), 8, 0, 2, isa)["threads"] >= 1
    raises(ValueError, "no such", native.plan, (10, 3, 1, 16), 8, 0, 2, "no such")
    print("the native module loads:", *native.isas())


def whole(version: str, variant: str) -> None:
    import fused_rin
    import torch

    folder = Path(fused_rin.__file__).parent
    assert folder.is_relative_to(sys.prefix), folder
    assert importlib.metadata.version("fused-rin") == version, importlib.metadata.version("fused-rin")
    for name in ("triton_kernels/sweep.py", "experiments/cli.py", "py.typed", "_native.pyi"):
        assert (folder / name).is_file(), name
    command = Path(sys.executable).with_name("fused-rin")
    assert subprocess.run([command, "--version"], check=True, capture_output=True).stdout.startswith(b"fused-rin ")

    from fused_rin import _native

    for torchs_threads in (True, False):  # and those of the module
        _native.use_torchs_threads(torchs_threads)
        torch.manual_seed(0)
        torch.set_num_threads(2)
        plain = torch.nn.RNN(8, 32, num_layers=2, nonlinearity="relu", batch_first=True)
        fused = fused_rin.RIN(8, 32, num_layers=2, batch_first=True, skip=0)
        fused.load_state_dict(plain.state_dict())
        x = torch.randn(16, 50, 8)
        with fused_rin.use_backend("cpu"):  # by name: it runs or raises
            out, h_n = fused(x)
            (out.square().sum() + h_n.sum()).backward()
        expected, expected_h_n = plain(x)
        (expected.square().sum() + expected_h_n.sum()).backward()
        torch.testing.assert_close((out, h_n), (expected, expected_h_n), rtol=1e-4, atol=1e-5)
        for got, wanted in zip(fused.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-4)
    raises(ValueError, "no such", _native.plan, (10, 3, 1, 16), 8, 0, 2, "no such")

    numbers = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
    if numbers >= (2, 10):
        devices = ("cpu", "cuda") if variant == "cuda" else ("cpu",)
        without_the_package(*(fused_rin.operator_library(device) for device in devices))
    if variant == "cuda":
        from fused_rin import _cuda

        assert _cuda.architectures
        assert _cuda.versions()  # asks the CUDA runtime, which looks for a driver
    else:
        assert not list(folder.glob("*cuda*.so"))
    print(f"the wheel works with torch {torch.__version__}")


def without_the_package(*libraries: str) -> None:
    """The operators' libraries in a process of their own: they compute, and what they refuse is a RuntimeError."""
    code = """
import sys, torch
for library in sys.argv[1:]:
    torch.ops.load_library(library)
sweep = torch.ops.fused_rin.sweep_forward
pre, weight = torch.randn(5, 2, 1, 8), torch.randn(1, 8, 8) / 8
out, h_n = sweep(pre, weight, None, None, None, None, 1.0, "relu", 0, "cpu")
h = torch.zeros(2, 1, 8)
for t in range(5):
    h = torch.relu(pre[t] + h + torch.einsum("bgd,ged->bge", h, weight))
torch.testing.assert_close(h_n, h, rtol=1e-4, atol=1e-5)
try:
    sweep(pre, weight[:, :4], None, None, None, None, 1.0, "relu", 0, "cpu")
except RuntimeError as error:
    assert "weight" in str(error), error
else:
    raise AssertionError("a weight that does not fit was taken")
assert not any(name.startswith("fused_rin") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, *libraries], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        load(sys.argv[1])
    else:
        whole(*sys.argv[1:])
