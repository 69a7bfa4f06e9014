"""Checkpoints: written in one step, read without running code from them, and checked before anything is loaded.

The file is what torch.save writes, a zip archive, with a sha256 of everything before it as the archive's comment.
torch.load reads it, but would not notice a flipped bit in a weight: torch does not look at the archive's own checksums.
"""

from __future__ import annotations

import hashlib
import io
import shlex
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io import TorchCheckpointIO
from torch import nn

from ..errors import UserError
from ..files import reporting, write_atomically

FORMAT = "fused-rin checkpoint"
VERSION = 2  # 1 had no checksum
SEAL = b"fused-rin sha256 "
SEALED = len(SEAL) + 64  # bytes of the comment


class AtomicCheckpointIO(TorchCheckpointIO):
    """How Fabric writes and reads our checkpoints.

    Fabric's own writing goes through a file in the system's temporary folder, from where it is copied when
    that is another file system; a run that is killed then leaves half a checkpoint. Here the old one stays
    until the new one is on the disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, buffer)
        with reporting(Path(path), "write the checkpoint"):
            write_atomically(Path(path), _seal(buffer.getvalue()), keep=previous(Path(path)))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        checkpoint = read_checkpoint(path)
        return {key: value for key, value in checkpoint.items() if key not in ("format", "version")}


def previous(path: Path) -> Path:
    """Where the checkpoint is kept that was at `path` before."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises UserError when the file is damaged or no checkpoint of this package; the text then names the one before
    it, if that is sound.
    """
    path = Path(path)
    try:
        return _read(path)
    except UserError as error:
        try:
            step = int(_read(previous(path))["step"])
        except (UserError, KeyError, TypeError, ValueError):
            raise error from error.__cause__
        back = shlex.join(["cp", str(previous(path)), str(path)])
        raise UserError(f"{error}; the one before it, of step {step}, is sound; to go back to it: {back}") from error


def _read(path: Path) -> dict[str, Any]:
    with reporting(path, "read the checkpoint"):
        content = path.read_bytes()
    sealed = _check_seal(path, content)
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler and its zip reader stumble over
        raise UserError(f"{path}: is damaged or not a checkpoint") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: is not a checkpoint of fused-rin")
    if checkpoint.get("version") not in (1, VERSION):
        raise UserError(f"{path}: checkpoint version {checkpoint.get('version')}, expected {VERSION}")
    if checkpoint["version"] == VERSION and not sealed:
        raise UserError(f"{path}: is damaged: its checksum is missing")
    return checkpoint


def _seal(archive: bytes) -> bytes:
    """A zip archive without a comment, with its checksum as the comment."""
    body = archive[:-2] + SEALED.to_bytes(2, "little")  # an archive ends with the length of its comment
    return body + SEAL + hashlib.sha256(body).hexdigest().encode()


def _check_seal(path: Path, content: bytes) -> bool:
    """Whether there is a checksum. Raises UserError when it is not that of the content."""
    body, seal = memoryview(content)[:-SEALED], content[-SEALED:]
    if not seal.startswith(SEAL):
        return False
    found, written = hashlib.sha256(body).hexdigest().encode(), seal[len(SEAL) :]
    if found != written:
        raise UserError(f"{path}: is damaged: its sha256 is {found.decode()}, written was {written.decode('latin-1')}")
    return True


def check_model_state(state: dict[str, Any], model: nn.Module) -> None:
    """Raises UserError when `state` is not a state of `model`: names and shapes are compared."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise UserError(f"{name} should be {expected.get(name, 'absent')}, is {found.get(name, 'absent')}")
