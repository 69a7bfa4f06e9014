"""Compiles the small C++ sources beside it when they are wanted, into build/peers-native."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-O3", "-march=native", "-std=c++17")


class CannotBuild(Exception):
    """The reason, in one line."""


def compiler() -> str:
    """CXX, or the system's."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")


def build(source: Path, flags: list[str], suffix: str = "") -> Path:
    """What `source` compiles to; again only if it or a flag is another. Raises CannotBuild."""
    tool = compiler()
    if not tool:
        raise CannotBuild("no C++ compiler (CXX, c++, g++, clang++)")
    key = hashlib.sha256(source.read_bytes() + "\0".join([tool, *flags]).encode()).hexdigest()[:16]
    out = ROOT / "build" / "peers-native" / f"{source.stem}-{key}{suffix}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        own = out.with_suffix(f".{os.getpid()}")  # of two processes at once each finishes a file of its own
        # Libraries come behind what needs them.
        done = subprocess.run([*tool.split(), str(source), "-o", str(own), *flags], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"{tool} failed"]
            raise CannotBuild(lines[0].replace(f"{source.parent}{os.sep}", ""))
        own.replace(out)
    return out
