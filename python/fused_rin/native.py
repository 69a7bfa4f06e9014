"""Loads the compiled modules, and keeps what the loader said of one that it could not load."""

from __future__ import annotations

import importlib
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def load(name: str, without: str, *, optional: bool = False) -> tuple[Any, str]:
    """(the compiled module `name` of this package, "") or (None, why not).

    A module that is missing or cannot be loaded is a RuntimeWarning, once in a process since importers are: `without`
    says what becomes of calls. One that is `optional` may be missing, in silence.
    """
    # Not `from fused_rin import name`: while the package is being imported that speaks of a circle of imports.
    try:
        return importlib.import_module(f"fused_rin.{name}"), ""
    except ImportError as error:
        found = sorted(path.name for path in _FOLDER.glob(f"{name}.*") if path.suffix in (".so", ".pyd"))
        missing = isinstance(error, ModuleNotFoundError) and error.name == f"fused_rin.{name}"
        reason = str(error)  # as dlopen has it, with the file's path
        if missing:
            reason = f"no file {name}*{EXTENSION_SUFFIXES[-1]} in {_FOLDER}"
        if missing and found:
            reason = (
                f"{', '.join(found)} in {_FOLDER} is of another Python, this one loads {name}{EXTENSION_SUFFIXES[0]}"
            )
    if not (optional and missing and not found):
        again = "install fused-rin again with this Python (`pip install .` in its sources)"
        warnings.warn(f"fused_rin.{name} could not be loaded, so {without}; {again}. {reason}", RuntimeWarning, 2)
    return None, reason
