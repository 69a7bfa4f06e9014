"""Builds the native modules with CMake, and the version; everything else is in pyproject.toml.

The environment variables that it reads are on docs/environment.md. A value that means nothing ends it, with a sentence.
"""

import functools
import importlib.util
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
LOCAL_VERSION = "[a-z0-9]+([-_.][a-z0-9]+)*"  # PEP 440


def build_environment() -> dict[str, str]:
    """With the tools of this Python environment first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path}


def end(text: str) -> SystemExit:
    return SystemExit("\n".join(f"fused-rin: {line}" for line in text.splitlines()))


@functools.cache
def chosen_cuda():
    """The `Choice` of tools/cuda_toolkit.py, which is loaded from its file: `tools` may be anybody's on the path."""
    spec = importlib.util.spec_from_file_location("cuda_toolkit", ROOT / "tools" / "cuda_toolkit.py")
    toolkit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toolkit)
    env = build_environment()
    try:
        return toolkit.choose(env.get("FUSED_RIN_CUDA", ""), env.get("FUSED_RIN_CUDA_ARCHS", ""), env)
    except toolkit.Refused as refused:
        raise end(str(refused)) from None


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
    if local and not re.fullmatch(LOCAL_VERSION, local, re.IGNORECASE):
        raise end(f"FUSED_RIN_LOCAL_VERSION must be letters and digits with single dots between, got '{local}'")
    if local is None and not (ROOT / "PKG-INFO").exists() and chosen_cuda().nvcc:
        local = f"cu{chosen_cuda().release[0]}"
    return f"{public}+{local}" if local else public


def cmake_executable() -> str:
    """The cmake of this Python environment if it has one, else the one on the PATH."""
    try:
        import cmake
    except ImportError:
        found = shutil.which("cmake")
        if found is None:
            raise end("cmake >= 3.24 is needed to build; try `pip install cmake`") from None
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

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: an optional module of an earlier build would go on being loaded."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if ext.optional and not built.exists():
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "fused_rin._native":
            return
        try:
            import pybind11
        except ImportError:
            raise end("pybind11 >= 2.13 is needed to build; try `pip install pybind11`") from None
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(os.environ.get("FUSED_RIN_BUILD_DIR") or Path(self.build_temp) / "cmake").resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise end(f"FUSED_RIN_BUILD_DIR must be a folder that can be written to: {error}") from None
        try:
            more_options = shlex.split(os.environ.get("FUSED_RIN_CMAKE_ARGS", ""))
        except ValueError as error:
            said = os.environ["FUSED_RIN_CMAKE_ARGS"]
            raise end(f"FUSED_RIN_CMAKE_ARGS must be words as a shell takes them, got {said!r}: {error}") from None
        cuda = chosen_cuda()
        if cuda.warning:
            print(*(f"fused-rin: {line}" for line in cuda.warning.splitlines()), sep="\n", file=sys.stderr, flush=True)
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DCMAKE_BUILD_TYPE=Release",
            # Whether they are set or not: a folder that is kept would remember those of the time before.
            f"-DFUSED_RIN_CUDA={'on' if cuda.nvcc else 'off'}",
            f"-DFUSED_RIN_NVCC={cuda.nvcc or ''}",  # the one that the version speaks of
            f"-DFUSED_RIN_CUDA_ARCHS={os.environ.get('FUSED_RIN_CUDA_ARCHS') or 'auto'}",
            f"-DFUSED_RIN_TORCH={os.environ.get('FUSED_RIN_TORCH', '')}",
            *more_options,
        ]  # fmt: skip
        env = build_environment()
        # By its path: one remembered from an isolated build before this one is gone with that build's environment.
        ninja = shutil.which("ninja", path=env["PATH"])
        generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        cmake = cmake_executable()
        configure(folder, [cmake, "-S", str(ROOT), "-B", str(folder), *generator, *options], env)
        parallel = [] if "CMAKE_BUILD_PARALLEL_LEVEL" in env else ["--parallel"]
        if failed := subprocess.run([cmake, "--build", folder, *parallel], env=env).returncode:
            without = "; FUSED_RIN_CUDA=off builds without the CUDA part" if cuda.nvcc else ""
            raise end(f"the build failed with exit code {failed}, what failed stands above{without}")


def compiler_has_changed(folder: Path, env: dict[str, str]) -> bool:
    """Whether the compiler of an earlier build in this folder is gone, or CXX names another: CMake would keep to it."""
    cache = folder / "CMakeCache.txt"
    found = re.search("^CMAKE_CXX_COMPILER:[A-Z]+=(.+)$", cache.read_text() if cache.exists() else "", re.MULTILINE)
    if not found:
        return False
    named = env.get("CXX")
    return not Path(found[1]).exists() or bool(named and (shutil.which(named, path=env["PATH"]) or named) != found[1])


def configure(folder: Path, command: list[str], env: dict[str, str]) -> None:
    """Where the project's own files refuse (cmake/toolchain.cmake), their words alone are shown."""
    refusal = folder / "fused_rin_refusal.txt"
    refusal.unlink(missing_ok=True)
    if compiler_has_changed(folder, env):
        command = [*command, "--fresh"]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode and refusal.exists():
        raise end(refusal.read_text().strip().replace("fused-rin: ", ""))
    print(done.stdout, flush=True)
    if done.returncode:
        raise end(f"cmake ended with exit code {done.returncode}, its words stand above")


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
