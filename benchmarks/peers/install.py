"""Installs the packages of the extra `peers`, one by one: one that cannot be had leaves the others.

    python benchmarks/peers/install.py CONSTRAINTS MISSING.json REQUIREMENT...

MISSING.json then holds {package: why}, which the results name.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path


def reason(text: str) -> str:
    """pip's last error without addresses."""
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")] or ["pip failed"]
    return re.sub(r"\S+://\S+", "...", errors[-1].removeprefix("ERROR:").strip())


def main() -> None:
    constraints, missing, *requirements = sys.argv[1:]
    found = {}
    for requirement in requirements:
        command = [sys.executable, "-m", "pip", "install", "-q", "-c", constraints, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            found[requirement] = reason(done.stderr)
            print(f"{requirement}: {found[requirement]}", flush=True)
    Path(missing).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
