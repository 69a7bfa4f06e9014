"""Writing files so that nothing is ever half there, and saying in one line what the disk refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError


@contextmanager
def reporting(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot {action}: {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that, whatever happens, `path` holds either the old content or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_results(path: Path, format: str, version: int, what: str) -> dict[str, Any]:
    """A JSON object that says of itself {"format": format, "version": version, what: [...]}.

    Raises UserError when it is missing, damaged, of another format or version, and when `what` is not there.
    """
    with reporting(path, "read the results"):
        text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is damaged or not a results file: {error}") from error
    if not isinstance(content, dict) or content.get("format") != format:
        raise UserError(f"{path}: is not a file of {format}")
    if content.get("version") != version:
        raise UserError(f"{path}: version {content.get('version')}, expected {version}")
    if not isinstance(content.get(what), list) or not content[what]:
        raise UserError(f"{path}: is damaged: it has no {what}")
    return content
