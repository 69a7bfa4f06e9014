"""What a build says and does where a tool is missing or broken, or a variable means nothing. Compiles nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import fused_rin
import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "cmake", "tools", "csrc")

pytestmark = pytest.mark.xdist_group("distribution")

# cmake's calls are written down; with CONFIGURE the configuring ones are made, and the building ones answered by BUILD.
BEFORE = """
import os, pathlib, subprocess, sysconfig
real = subprocess.run
target = "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY="
def run(command, **options):
    if "cmake" not in os.path.basename(str(command[0])):
        return real(command, **options)
    print("CMAKE", *map(str, command), flush=True)
    if "-S" in command:
        folder = pathlib.Path(*(word.removeprefix(target) for word in command if word.startswith(target)))
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("_native" + sysconfig.get_config_var("EXT_SUFFIX")).touch()
        if "CONFIGURE" in os.environ:
            return real(command, **options)
    return subprocess.CompletedProcess(command, int(os.environ.get("BUILD", 0)) if "--build" in command else 0, "")
subprocess.run = run
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """What a build reads, in a folder of its own."""
    folder = tmp_path / "project"
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "python", folder / "python", symlinks=True, ignore=shutil.ignore_patterns("*.so", "__py*"))
    (folder / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    return folder


def build(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py with a clean environment, in place as an editable installation has it."""
    code = f"import runpy, sys\n{BEFORE}\nsys.argv[0] = 'setup.py'\nrunpy.run_path('setup.py', run_name='__main__')"
    unset = ("FUSED_RIN_", "CUDA", "CXX", "CMAKE_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    return subprocess.run(
        [sys.executable, "-c", code, "-q", *(arguments or ("build_ext", "--inplace"))],
        cwd=folder,
        env={**clean, "FUSED_RIN_BUILD_DIR": "build/cmake", "FUSED_RIN_CUDA_ARCHS": "80", **environment},
        capture_output=True,
        text=True,
    )


def nvcc(folder: Path, script: str) -> str:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


WORKS = "echo 'Cuda compilation tools, release 13.0, V13.0.48'"


def test_an_nvcc_that_does_not_work_costs_three_lines_and_the_cuda_part(project):
    """And what an earlier build has left of it, which an editable installation would go on loading."""
    package, suffix = project / "python/fused_rin", sysconfig.get_config_var("EXT_SUFFIX")
    earlier = [package / f"_cuda{suffix}", package / "libfused_rin_operators_cuda.so"]
    other = package / "_cuda.of-another-python.so"
    for path in (*earlier, other):
        path.touch()
    broken = nvcc(project, "echo 'libnvvm is gone' >&2; exit 1")
    done = build(project, CUDACXX=broken, CONFIGURE="1")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("fused-rin: ")]
    assert len(said) == 3, done.stderr
    assert said[1] == f"fused-rin: {broken} does not work: --version ended with exit code 1 and said: libnvvm is gone"
    cache = (project / "build/cmake/CMakeCache.txt").read_text()
    assert "\nFUSED_RIN_CUDA:STRING=off\n" in cache
    assert "CMAKE_CUDA_COMPILER" not in cache
    configuring, building = [line for line in done.stdout.splitlines() if line.startswith("CMAKE ")]
    assert " -S " in configuring
    assert " --build " in building
    assert [path.exists() for path in (*earlier, other)] == [False, False, True]
    public = build(project, "--version", CUDACXX=broken).stdout.split()[-1]
    assert public == fused_rin.__version__


def test_asked_for_by_name_it_is_an_error(project):
    broken = nvcc(project, "exit 1")
    done = build(project, CUDACXX=broken, FUSED_RIN_CUDA="on")
    assert done.returncode == 1
    expected = f"FUSED_RIN_CUDA=on, but {broken} does not work: --version ended with exit code 1 and said: nothing"
    assert done.stderr == f"fused-rin: {expected}\n"
    assert "CMAKE" not in done.stdout


def test_one_that_works_is_handed_on_with_its_release(project):
    """Whatever is not set is handed on too: a folder that is kept would remember it from the time before."""
    works = nvcc(project, WORKS)
    done = build(project, CUDACXX=works, FUSED_RIN_CMAKE_ARGS='-DA=1 "-DB=2 3"')
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    words = done.stdout.split()
    for word in ("-DFUSED_RIN_CUDA=on", f"-DFUSED_RIN_NVCC={works}", "-DFUSED_RIN_CUDA_ARCHS=80", "-DFUSED_RIN_TORCH="):
        assert word in words
    assert "-DA=1 -DB=2 3" in done.stdout
    done = build(project, CUDACXX=works, FUSED_RIN_CUDA="off", FUSED_RIN_TORCH="/torch")
    assert {"-DFUSED_RIN_CUDA=off", "-DFUSED_RIN_NVCC=", "-DFUSED_RIN_TORCH=/torch"} < set(done.stdout.split())
    done = build(project, CUDACXX=works, BUILD="2")
    assert done.returncode == 1
    assert done.stderr == (
        "fused-rin: the build failed with exit code 2, what failed stands above; FUSED_RIN_CUDA=off builds without the "
        "CUDA part\n"
    )


@pytest.mark.parametrize("compiler", ["/no/such/g++", "stub"])
def test_no_compiler_is_one_sentence(project, compiler):
    """None of CMake's pages, and not remembered: a compiler that is there the next time is found. That of an earlier
    build, which the folder remembers, is not kept to where CXX names another, and not missed where it is gone."""
    if compiler == "stub":
        (project / "g++").write_text("#!/bin/sh\nexit 1\n")
        (project / "g++").chmod(0o755)
        compiler = str(project / "g++")
    earlier = shutil.which("true") if compiler.endswith("such/g++") else "/gone/g++"
    (project / "build/cmake").mkdir(parents=True)
    (project / "build/cmake/CMakeCache.txt").write_text(f"CMAKE_CXX_COMPILER:FILEPATH={earlier}\n")
    done = build(project, FUSED_RIN_CUDA="off", CXX=compiler, CONFIGURE="1")
    assert done.returncode == 1
    expected = f"the C++ compiler that CXX names does not work: '{compiler}'; name another, or unset CXX"
    assert done.stderr == f"fused-rin: {expected}\n"
    assert "CMake" not in done.stdout
    assert "CMAKE_CXX_COMPILER:" not in (project / "build/cmake/CMakeCache.txt").read_text()


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FUSED_RIN_CUDA", "maybe", "FUSED_RIN_CUDA must be auto, on or off, got 'maybe'"),
        ("FUSED_RIN_CUDA_ARCHS", "75", "FUSED_RIN_CUDA_ARCHS must be auto, all or a list"),
        ("FUSED_RIN_LOCAL_VERSION", "cu 13", "FUSED_RIN_LOCAL_VERSION must be letters and digits"),
        ("FUSED_RIN_CMAKE_ARGS", "-DA='", 'FUSED_RIN_CMAKE_ARGS must be words as a shell takes them, got "-DA=\'"'),
        ("FUSED_RIN_BUILD_DIR", "setup.py", "FUSED_RIN_BUILD_DIR must be a folder that can be written to"),
    ],
)
def test_values_that_mean_nothing(project, variable, value, expected):
    done = build(project, CUDACXX=nvcc(project, WORKS), **{variable: value})
    assert done.returncode == 1
    assert done.stderr.startswith(f"fused-rin: {expected}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "CMAKE" not in done.stdout


def test_a_torch_that_is_none_is_refused(project):
    done = build(project, FUSED_RIN_CUDA="off", FUSED_RIN_TORCH="/no/torch", CONFIGURE="1")
    assert done.returncode == 1
    expected = "FUSED_RIN_TORCH must be the folder of an installed torch >= 2.10 (torch.__path__[0]), got '/no/torch'"
    assert done.stderr == f"fused-rin: {expected}\n"


def test_make_refuses_a_python_that_is_too_old(tmp_path):
    python = tmp_path / "python3.9"
    python.write_text("#!/bin/sh\nexit 1\n")  # as one says to the Makefile's question
    python.chmod(0o755)
    done = subprocess.run(
        ["make", f"VENV={tmp_path}/venv", f"PYTHON={python}", "setup"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"PYTHON must be Python 3.10 or newer, got '{python}'" in done.stderr
    assert not (tmp_path / "venv").exists()
