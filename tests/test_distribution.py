"""The sdist, the wheel's files and the version, without compiling. `make wheel` builds and tries the real ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import fused_rin
import pytest

from tools import wheel

ROOT = Path(__file__).resolve().parents[1]
LINK = "python/fused_rin/triton_kernels"  # to the folder at the top level; its files are in the sdist, twice
NOT_SHIPPED = {".ci/run", ".gitignore", ".github/workflows/ci.yml", ".github/workflows/wheels.yml", LINK}
STALE = ("python/fused_rin/_native.so", "python/fused_rin/gone.cpython-311.pyc", "csrc/cpu/plan.o", "tests/stale.so")

pytestmark = pytest.mark.xdist_group("distribution")


def setup(folder: Path, *arguments: str, before: str = "", **environment: str) -> str:
    """What setup.py printed. `before` is run in the same process, before it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FUSED_RIN_", "CUDA"))}
    code = f"import runpy, sys\n{before}\nsys.argv[0] = 'setup.py'\nrunpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: what belongs to the project is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def clone(tracked, tmp_path_factory) -> Path:
    """A copy of the project, with what earlier builds may have left in it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    for name in STALE:
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory) -> str:
    """Something that says it is the nvcc of CUDA 13."""
    path = tmp_path_factory.mktemp("cuda") / "nvcc"
    path.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def sdist(clone, nvcc, tmp_path_factory) -> dict[str, bytes]:
    """{name: content} of the sdist, built beside an nvcc, which is not to be seen in it."""
    folder = tmp_path_factory.mktemp("sdist")
    setup(clone, "-q", "sdist", "--dist-dir", str(folder), CUDACXX=nvcc)
    root = f"fused_rin-{fused_rin.__version__}"
    assert [path.name for path in folder.iterdir()] == [f"{root}.tar.gz"]
    with tarfile.open(folder / f"{root}.tar.gz") as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        files = [member for member in archive if member.isfile()]
        return {member.name.removeprefix(f"{root}/"): archive.extractfile(member).read() for member in files}


def test_the_sdist_has_all_sources_and_tests_and_no_results(sdist, tracked):
    assert {"CMakeLists.txt", "LICENSE", "CITATION.cff", "cmake/cuda.cmake", "csrc/bindings.cpp"} < set(sdist)
    assert set(tracked) - set(sdist) == NOT_SHIPPED
    made = [name for name in sdist if name not in tracked and not name.startswith((f"{LINK}/", "python/fused_rin.egg"))]
    assert sorted(made) == ["PKG-INFO", "setup.cfg"]


def test_the_link_is_files_in_the_sdist(sdist):
    sources = sorted((ROOT / "triton_kernels").glob("*.py"))
    assert sources
    for source in sources:
        assert sdist[f"{LINK}/{source.name}"] == sdist[f"triton_kernels/{source.name}"] == source.read_bytes()


def test_the_metadata_say_who_and_what(sdist):
    metadata = sdist["PKG-INFO"].decode()
    for line in (
        f"Version: {fused_rin.__version__}",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        "Author: fused-rin contributors",
        *(f"Classifier: Programming Language :: Python :: 3.{minor}" for minor in wheel.MINORS),
    ):
        assert f"\n{line}\n" in metadata, line
    assert f"\nversion: {fused_rin.__version__}\n".encode() in sdist["CITATION.cff"]


def test_a_wheel_has_nothing_of_an_earlier_build(clone, tmp_path):
    """Modules that are no longer there and a CUDA module that is not asked for now, from the build before."""
    find = "from setuptools.dist import Distribution as D; c = D().get_command_obj('build'); c.ensure_finalized()"
    lib = subprocess.run([sys.executable, "-c", f"{find}; print(c.build_platlib)"], capture_output=True, text=True)
    for name in ("gone.py", "_cuda.so"):
        (clone / lib.stdout.strip() / "fused_rin" / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / lib.stdout.strip() / "fused_rin" / name).touch()
    done = "subprocess.CompletedProcess((), 0, '')"
    no_compiling = f"import subprocess; subprocess.run = lambda *_, **__: {done}"
    setup(clone, "-q", "bdist_wheel", "--dist-dir", str(tmp_path), before=no_compiling, FUSED_RIN_CUDA="off")
    (built,) = tmp_path.iterdir()
    packed = {name for name in zipfile.ZipFile(built).namelist() if name.startswith("fused_rin/")}
    package = [path.relative_to(ROOT / "python") for path in (ROOT / "python/fused_rin").rglob("*.py*")]
    files = {path.as_posix() for path in package if path.suffix in (".py", ".pyi") and LINK not in f"python/{path}"}
    files |= {f"fused_rin/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}
    assert packed == files | {"fused_rin/py.typed"}
    with pytest.raises(AssertionError, match=r"has \[\]"):  # as `make wheel` finds it: no native module
        wheel.check_content(built, "cpu")


def test_the_version_tells_builds_with_cuda_apart(clone, nvcc, tmp_path):
    def version(folder=clone, **environment):
        return setup(folder, "--version", **environment).split()[-1]

    public = fused_rin.__version__
    assert version(CUDACXX=nvcc) == f"{public}+cu13"
    assert version(CUDA_HOME=str(Path(nvcc).parent), PATH=str(Path(nvcc).parent)) == f"{public}+cu13"
    assert version(CUDACXX=nvcc, FUSED_RIN_CUDA="off") == public
    # Sources from an index: the version that was looked for, unless another is asked for.
    unpacked = tmp_path / "unpacked"
    shutil.copytree(clone, unpacked, symlinks=True)
    (unpacked / "PKG-INFO").touch()
    assert version(unpacked, CUDACXX=nvcc) == public
    assert version(unpacked, CUDACXX=nvcc, FUSED_RIN_LOCAL_VERSION="cu13") == f"{public}+cu13"


def test_what_is_sent_to_older_symbols_is_read_from_the_sources():
    """cmake/portable.cmake takes the names from lines that start with OLD( or NEW(; every wrapper has to be one."""
    for source in (ROOT / "csrc/portable").glob("*.cpp"):
        text = source.read_text()
        lines = re.findall(r"^(?:OLD|NEW)\((\w+)", text, re.MULTILINE)
        assert len(lines) == len(set(lines)) == len(re.findall(r"\b(?:OLD|NEW)\((?!name)", text)), source.name
        assert lines
