"""Writing files so that nothing is ever half there, and saying in one line what the disk refused."""

from __future__ import annotations

import json
import os
import re
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


def write_atomically(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Writes a file so that, whatever happens, `path` holds either the old content or the new one, whole.

    Args:
        keep: a file beside it that gets the old content, in the same way; where there are no hard links, it does not.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None:
            _keep(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _keep(path: Path, keep: Path) -> None:
    link = _temporary(keep)
    try:
        os.link(path, link)
        os.replace(link, keep)  # does nothing when both are one file already
    except OSError:  # there is no old content, or a file system without hard links
        pass
    finally:
        link.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """Files that `write_atomically` was killed over."""
    return [path for path in folder.iterdir() if re.fullmatch(r"\..+\.\d+\.tmp", path.name)]


def is_free(folder: Path) -> bool:
    """Whether there is no such folder, or nothing in it but what a killed process has left of its first file."""
    return not folder.exists() or len(leftovers(folder)) == sum(1 for _ in folder.iterdir())


class FolderLock:
    """A folder for one process at a time, until it releases it or ends. Where there are no locks, for everybody."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None

    def take(self, does: str) -> None:
        """Takes the folder, which is there. UserError if it is taken: "another process {does} in this folder"."""
        try:
            import fcntl
        except ImportError:  # not on this system
            return
        with reporting(self.folder, "use the folder"):
            descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{self.folder}: another process {does} in this folder; name another one") from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def tidy(self) -> None:
        """Removes the leftovers of killed processes, if the folder is taken: else they may be another one's at work."""
        if self._descriptor is not None:
            with reporting(self.folder, "use the folder"):
                for path in leftovers(self.folder):
                    path.unlink(missing_ok=True)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


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
