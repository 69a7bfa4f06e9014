"""Makes the virtual environment that `make` works in, with a torch in it; for the Python that calls, without packages.

    python tools/environment.py FOLDER [INDEX]

A torch that the calling Python has already is used, if it is new enough: the environment sees its packages. Else the
one of constraints.txt is installed, from the package index INDEX if that is given. FOLDER/constraints.txt is what all
other packages are installed with, so that none of them changes torch. A torch with CUDA wants a Triton of its own: that
one is written there in place of the one of constraints.txt, with which pip would find no solution (and look for it for
a quarter of an hour).
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

OLDEST = (2, 6)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def installed_torch() -> str | None:
    """Its version in the calling Python."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_new_enough(version: str | None) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= OLDEST


def pinned(constraints: str) -> str:
    found = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)
    if not found:
        raise SystemExit(f"{CONSTRAINTS}: no line torch==VERSION")
    return found[1]


def plan(folder: Path, index: str, have: str | None, constraints: str) -> tuple[list[list[str]], str, str]:
    """(commands, constraints of all other packages, what to say first) for a torch `have` in the calling Python."""
    python = str(folder / "bin" / "python")
    venv = [sys.executable, "-m", "venv", str(folder)]
    if have is not None and is_new_enough(have) and not index:
        others = constraints.replace(f"torch=={pinned(constraints)}", f"torch=={have}")
        return [[*venv, "--system-site-packages"]], others, f"torch {have} of {sys.executable} is used"
    want = pinned(constraints)
    install = [python, "-m", "pip", "install", "-q", *(["--index-url", index] if index else []), f"torch=={want}"]
    if index:
        return [venv, install], constraints, f"torch {want} is installed from {index}"
    text = f"torch {want} is installed"
    if sys.platform == "linux" and platform.machine() == "x86_64":
        text += f"; where the index has it with CUDA it is some 3 GB,\n  make ... TORCH_INDEX={CPU_INDEX} takes 200 MB"
    return [venv, install], constraints, text


def share_packages(folder: Path) -> None:
    """Lets the environment see those of the calling one, where that is an environment itself: `--system-site-packages`
    means those of the Python below both.
    """
    if sys.prefix != sys.base_prefix:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "calling_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")


def with_triton_of(torch: list[str], constraints: str) -> str:
    """The constraints with the Triton that torch requires, where it requires one; `torch`: its requirements."""
    required = [line for line in torch if re.match(r"triton\b(?!.*extra\s*==)", line)]
    if not required:
        return constraints
    others = [line for line in constraints.splitlines() if not re.match(r"triton\b", line)]
    return "\n".join([*others, *required]) + "\n"


def requirements_of_torch(python: Path) -> list[str]:
    """As the metadata of the torch in that environment have them."""
    code = "import importlib.metadata as m; print(*(m.requires('torch') or ()), sep='\\n')"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


def main() -> None:
    folder, index = Path(sys.argv[1]), "".join(sys.argv[2:3])
    constraints = CONSTRAINTS.read_text()
    commands, others, text = plan(folder, index, installed_torch(), constraints)
    if (folder / "bin" / "python").exists():
        commands = [command for command in commands if "venv" not in command]
    print(f"fused-rin: {text}", flush=True)
    for command in commands:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(error.returncode) from None
    if any("--system-site-packages" in command for command in commands):
        share_packages(folder)
    required = requirements_of_torch(folder / "bin" / "python")
    (folder / "constraints.txt").write_text(with_triton_of(required, others))


if __name__ == "__main__":
    main()
