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
    """pip's error, in a line without addresses: that there is no such version, or the first of several."""
    errors = [line.removeprefix("ERROR:").strip() for line in text.splitlines() if line.startswith("ERROR:")]
    told = next((line for line in errors if "No matching distribution" in line), errors[0] if errors else "pip failed")
    return re.sub(r"\S+://\S+", "...", told)[:200]


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
