"""Builds the native modules with CMake; everything else is in pyproject.toml.

Environment: FUSED_RIN_CUDA=auto|on|off and FUSED_RIN_CUDA_ARCHS choose the CUDA part (see cmake/cuda.cmake),
FUSED_RIN_CMAKE_ARGS adds arguments to the configuring call, FUSED_RIN_BUILD_DIR keeps the build for the next time.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CMAKE_OPTIONS = ("FUSED_RIN_CUDA", "FUSED_RIN_CUDA_ARCHS")


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
        build = Path(os.environ.get("FUSED_RIN_BUILD_DIR", Path(self.build_temp) / "cmake")).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DCMAKE_BUILD_TYPE=Release",
            *(f"-D{name}={os.environ[name]}" for name in CMAKE_OPTIONS if name in os.environ),
            *shlex.split(os.environ.get("FUSED_RIN_CMAKE_ARGS", "")),
        ]  # fmt: skip
        env = dict(os.environ)
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
        # By its path: one remembered from an isolated build before this one is gone with that build's environment.
        ninja = shutil.which("ninja", path=env["PATH"])
        generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        cmake = cmake_executable()
        subprocess.run([cmake, "-S", ROOT, "-B", build, *generator, *options], check=True, env=env)
        subprocess.run([cmake, "--build", build, "--parallel"], check=True, env=env)


setup(
    ext_modules=[
        Extension("fused_rin._native", sources=[]),
        Extension("fused_rin._cuda", sources=[], optional=True),
        Extension("fused_rin.libfused_rin_operators", sources=[], optional=True),
        Extension("fused_rin.libfused_rin_operators_cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
