"""Which nvcc the CUDA part is built with, for which architectures, and whether it works: the one place that decides.

    python tools/cuda_toolkit.py [--cuda auto] [--archs auto] [--nvcc PATH]

prints the nvcc (an empty line for none) and the architectures, as cmake/cuda.cmake reads them; setup.py, whose version
depends on it, and the tests call `choose`. An nvcc that is there and does not work is a warning of three lines where
the CUDA part is asked for with "auto", and an error (exit code 1) where with "on". --nvcc names one that was tried.
Standard library only, since it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

OLDEST = (12, 3)  # the first with PTX 8.3, whose loads and stores of 16 bytes are one access (.b128)
ALL = ("80", "86", "89", "90a", "100", "120")
WITHOUT_GPU = ("80", "90a")
SECONDS = 120  # a trial takes 1 to 3; one that hangs is no compiler

# What every kernel needs: the runtime's headers, the host's compiler and its library, C++17, a launch, the linker.
TRIAL = """
#include <cuda_runtime.h>
#include <cstdint>
#include <type_traits>
template <typename T>
__global__ void fill(T* out) {
  if constexpr (std::is_same_v<T, float>) out[threadIdx.x] = 1;
}
int main(int count, char**) {
  if (count > 9) fill<float><<<1, 32>>>(nullptr);
  return 0;
}
"""


class Refused(ValueError):
    """The CUDA part cannot be built as it was asked for; the message is for the user."""


class OldGpu(Refused):
    """This machine's GPUs are older than the kernels."""


class Choice(NamedTuple):
    """nvcc: None where the CUDA part is not built. release: as in (13, 0). warning: why not, if that is a surprise."""

    nvcc: str | None
    release: tuple[int, int] | None = None
    architectures: tuple[str, ...] = ()
    warning: str = ""


def wanted(cuda: str) -> str:
    """auto, on or off. Raises Refused."""
    if cuda.lower() not in ("auto", "on", "off"):
        raise Refused(f"FUSED_RIN_CUDA must be auto, on or off, got '{cuda}'")
    return cuda.lower()


def find(environment: Mapping[str, str] = os.environ) -> str | None:
    """The nvcc that the environment means, whether it works or not, or None.

    CUDACXX alone where it is set, since nobody who names a compiler wants another; else the first of CUDA_HOME,
    CUDA_PATH, the PATH and /usr/local/cuda that has one.
    """
    path = environment.get("PATH", os.defpath)
    if named := environment.get("CUDACXX"):
        return shutil.which(named, path=path) or named
    folders = [f"{environment[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    places = (*(f"{folder}/nvcc" for folder in folders), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next(filter(None, (shutil.which(place, path=path) for place in places)), None)


def architectures(asked: str) -> tuple[str, ...]:
    """The compute capabilities that kernels are built for, oldest first.

    Raises Refused for what is none or is below 8.0, and OldGpu for "auto" where every GPU of this machine is.
    """
    if asked == "auto":
        return _of_this_machine() or WITHOUT_GPU
    if asked == "all":
        return ALL
    found = tuple(part.strip() for part in re.split("[;,]", asked))
    for part in found:
        if not re.fullmatch("[0-9]{2,3}[af]?", part) or _number(part) < 80:
            raise Refused(
                "FUSED_RIN_CUDA_ARCHS must be auto, all or a list of compute capabilities from 80 on such as 80;90a, "
                f"got '{asked}'"
            )
    return tuple(sorted(found, key=_number))


def _number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def _of_this_machine() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = sorted({"".join(pair) for pair in re.findall(r"([0-9]+)\.([0-9])", said)}, key=int)
    if found and int(found[-1]) < 80:
        raise OldGpu(
            f"the GPU of this machine is of compute capability {found[-1]}, the kernels need 80 or later "
            "(FUSED_RIN_CUDA_ARCHS builds them for other machines)"
        )
    return tuple("90a" if number == "90" else number for number in found if int(number) >= 80)


def _run(command: list[str]) -> tuple[str, str]:
    """(what it printed, why it failed or "")."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"did not end within {SECONDS} seconds"
    except OSError as error:
        return "", f"cannot be run ({error.strerror})"
    if done.returncode == 0:
        return done.stdout, ""
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    # Of a compiler's many lines the one that names the trouble.
    telling = [line for line in lines if re.search(r"\b(error|fatal|not found|No such file|cannot)\b", line)]
    said = (telling or lines or ["nothing"])[0]
    return "", f"ended with exit code {done.returncode} and said: {said[:300]}"


def release_of(nvcc: str) -> tuple[tuple[int, int] | None, str]:
    """(release, what is wrong with it or "")."""
    said, failed = _run([nvcc, "--version"])
    if failed:
        return None, f"--version {failed}"
    found = re.search(r"release ([0-9]+)\.([0-9]+)", said)
    if not found:
        return None, f"--version names no release: {' '.join(said.split())[:300] or 'nothing'}"
    release = int(found[1]), int(found[2])
    if release < OLDEST:
        old, oldest = (".".join(map(str, numbers)) for numbers in (release, OLDEST))
        return release, f"it is of CUDA {old}, CUDA {oldest} or later is needed"
    return release, ""


def trouble(nvcc: str, archs: tuple[str, ...], compressed: bool = False) -> str:
    """What is wrong with an nvcc, or "": a small program is compiled and linked as cmake/cuda.cmake does it."""
    _, failed = release_of(nvcc)
    if failed:
        return failed
    options = ["-std=c++17", "--compress-mode=size" if compressed else "--no-compress"]
    for arch in archs:
        options += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    if host := os.environ.get("CUDAHOSTCXX"):
        options += ["-ccbin", host]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cu"
        source.write_text(TRIAL)
        _, failed = _run([nvcc, *options, str(source), "-o", str(source.with_suffix(""))])
    return f"compiling a small program {failed}" if failed else ""


def choose(cuda: str = "auto", archs: str = "auto", environment: Mapping[str, str] = os.environ) -> Choice:
    """What the CUDA part is built with. Raises Refused for values that mean nothing, and if "on" cannot be."""
    cuda, archs = wanted(cuda or "auto"), archs or "auto"  # empty: as if not set
    if archs != "auto":
        architectures(archs)  # what means nothing is refused whether it is needed or not
    if cuda == "off":
        return Choice(None)
    nvcc = find(environment)
    if nvcc is None:
        if cuda == "on":
            raise Refused("FUSED_RIN_CUDA=on, but there is no nvcc; set CUDA_HOME or put it on the PATH")
        return Choice(None)
    try:
        found = architectures(archs)
        reason = trouble(nvcc, found, archs == "all")
        if not reason:
            return Choice(nvcc, release_of(nvcc)[0], found)
        reason = f"{nvcc} does not work: {reason}"
    except OldGpu as refused:
        reason = str(refused)
    if cuda == "on":
        raise Refused(f"FUSED_RIN_CUDA=on, but {reason}")
    warning = (
        "warning: the CUDA part is not built, the rest is",
        reason,
        "CUDACXX or CUDA_HOME names another nvcc; FUSED_RIN_CUDA=off says nothing, FUSED_RIN_CUDA=on makes it an error",
    )
    return Choice(None, warning="\n".join(warning))


def prefixed(text: str) -> str:
    return "\n".join(f"fused-rin: {line}" for line in text.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", default=os.environ.get("FUSED_RIN_CUDA", "auto"))
    parser.add_argument("--archs", default=os.environ.get("FUSED_RIN_CUDA_ARCHS", "auto"))
    parser.add_argument("--nvcc", default="")
    options = parser.parse_args()
    try:
        if options.nvcc:
            choice = Choice(options.nvcc, architectures=architectures(options.archs or "auto"))
        else:
            choice = choose(options.cuda, options.archs)
    except Refused as refused:
        raise SystemExit(prefixed(str(refused))) from None
    if choice.warning:
        print(prefixed(choice.warning), file=sys.stderr)
    print(choice.nvcc or "", ";".join(choice.architectures), sep="\n")


if __name__ == "__main__":
    main()
