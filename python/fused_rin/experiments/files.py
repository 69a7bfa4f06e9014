"""Writing files so that nothing is ever half there, and saying in one line what the disk refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def reporting(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot {action}: {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes) -> None:
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
