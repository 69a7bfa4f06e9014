"""Builds the native modules with CMake, and the version; everything else is in pyproject.toml.

Environment: FUSED_RIN_CUDA=auto|on|off and FUSED_RIN_CUDA_ARCHS choose the CUDA part (see cmake/cuda.cmake),
FUSED_RIN_TORCH is the folder of the torch that the operators' library is built on (see cmake/operators.cmake),
FUSED_RIN_CMAKE_ARGS adds arguments to the configuring call, FUSED_RIN_BUILD_DIR keeps the build for the next time,
CMAKE_BUILD_PARALLEL_LEVEL is how many jobs it may start, FUSED_RIN_LOCAL_VERSION names the build (see `version`).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
CMAKE_OPTIONS = ("FUSED_RIN_CUDA", "FUSED_RIN_CUDA_ARCHS", "FUSED_RIN_TORCH")


def build_path() -> str:
    """The PATH of the build: the tools of this Python environment first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def find_nvcc() -> str | None:
    """The nvcc that the CUDA part is built with, or None if it is not built."""
    if os.environ.get("FUSED_RIN_CUDA", "auto").lower() == "off":
        return None
    named = os.environ.get("CUDACXX")
    folders = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [named, *(f"{folder}/nvcc" for folder in folders), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, (shutil.which(place, path=build_path()) for place in places if place)), None)


def public_version() -> str:
    source = (ROOT / "python/fused_rin/__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


def version() -> str:
    """`__version__`, and a local version that says which CUDA the binary has: 0.1.0+cu13.

    A build from an sdist has one only if FUSED_RIN_LOCAL_VERSION names it: an installer that found fused-rin 0.1.0 in
    an index refuses a build that says it is another version.
    """
    public = public_version()
    local = os.environ.get("FUSED_RIN_LOCAL_VERSION")
    if local is None and not (ROOT / "PKG-INFO").exists() and (nvcc := find_nvcc()):
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        local = f"cu{re.search(r'release ([0-9]+)', said)[1]}"
    return f"{public}+{local}" if local else public


def cmake_executable() -> str:
    """The cmake of this Python environment if it has one, else the one on the PATH."""
    try:
        import cmake
    except ImportError:
        found = shutil.which("cmake")
        if found is None:
            raise SystemExit("fused-rin: cmake >= 3.24 is needed to build; try `pip install cmake`") from None
        return found
    return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")


class PlainSdist(sdist):
    """Sources have no local version, whatever compilers are beside them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.distribution.metadata.version = public_version()


class FreshBuild(build):
    """What an earlier build left is not packed: files that are no longer there, a CUDA module not asked for now."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake build makes all; `_cuda` is there only if nvcc is, the operators' library only if torch is."""

    def get_ext_filename(self, fullname: str) -> str:
        if "libfused_rin_operators" in fullname:  # loaded by C++ programs: no Python's tag in its name
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "fused_rin._native":
            return
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(os.environ.get("FUSED_RIN_BUILD_DIR", Path(self.build_temp) / "cmake")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DCMAKE_BUILD_TYPE=Release",
            *(f"-D{name}={os.environ[name]}" for name in CMAKE_OPTIONS if name in os.environ),
            *([f"-DFUSED_RIN_NVCC={nvcc}"] if nvcc else []),  # the one that the version speaks of
            *shlex.split(os.environ.get("FUSED_RIN_CMAKE_ARGS", "")),
        ]  # fmt: skip
        env = {**os.environ, "PATH": build_path()}
        # By its path: one remembered from an isolated build before this one is gone with that build's environment.
        ninja = shutil.which("ninja", path=env["PATH"])
        generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        cmake = cmake_executable()
        subprocess.run([cmake, "-S", ROOT, "-B", folder, *generator, *options], check=True, env=env)
        parallel = [] if "CMAKE_BUILD_PARALLEL_LEVEL" in env else ["--parallel"]
        subprocess.run([cmake, "--build", folder, *parallel], check=True, env=env)


setup(
    version=version(),
    ext_modules=[
        Extension("fused_rin._native", sources=[]),
        Extension("fused_rin._cuda", sources=[], optional=True),
        Extension("fused_rin.libfused_rin_operators", sources=[], optional=True),
        Extension("fused_rin.libfused_rin_operators_cuda", sources=[], optional=True),
    ],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild, "sdist": PlainSdist},
)
