"""Builds the CUDA module from nothing for a set of architectures, and writes down what that takes and what comes out.

    python -m tools.cuda_build all     80 86 89 90a 100 120 and PTX, compressed, as FUSED_RIN_CUDA_ARCHS=all builds it
    python -m tools.cuda_build 80;90a  what is built where there is no GPU

Writes benchmarks/results/cuda-build.json (processor time, size) and the registers of every kernel on every architecture
that was built to tests/cuda_aot/resources.json; ends with exit code 1 and an unchanged table if a kernel has a stack.
`all` takes ten to fifteen minutes of one core.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pybind11

import cmake

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda-build.json"


def build(architectures: str, folder: Path) -> tuple[Path, dict[str, float]]:
    """The module, and what building it took."""
    shutil.rmtree(folder, ignore_errors=True)
    executable = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    generator = ["-GNinja"] if shutil.which("ninja", path=environment["PATH"]) else []
    configure = [executable, "-S", str(ROOT), "-B", str(folder), *generator, "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += ["-DFUSED_RIN_CUDA=on", f"-DFUSED_RIN_CUDA_ARCHS={architectures}"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'module'}"]
    subprocess.run(configure, check=True, env=environment)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [executable, "--build", str(folder), "--parallel", "2", "--target", "_cuda"]
    subprocess.run(command, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (module,) = (folder / "module").glob("_cuda*.so")
    return module, {
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        "elapsed_seconds_two_jobs": round(time.monotonic() - start),
        "megabytes": round(module.stat().st_size / 1e6, 1),
    }


def main() -> None:
    from benchmarks.gpu.cubins import find_tool
    from tests.cuda_aot import test_resources

    (architectures,) = sys.argv[1:] or ["all"]
    module, taken = build(architectures, ROOT / "build" / "cuda-build")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    version = subprocess.run([find_tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([0-9.]+)", version)  # the module itself says it only where it is not compressed
    assert found, version
    results[architectures] = {"nvcc": found.group(1), **taken}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{architectures}: {taken}")
    test_resources.write(module, found.group(1))


if __name__ == "__main__":
    main()
