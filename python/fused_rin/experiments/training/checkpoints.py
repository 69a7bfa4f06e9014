"""Checkpoints: written in one step, read without running code from them, and checked before anything is loaded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io import TorchCheckpointIO
from torch import nn

from ..errors import UserError
from ..files import reporting, write_atomically

FORMAT = "fused-rin checkpoint"
VERSION = 1


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
            write_atomically(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        checkpoint = read_checkpoint(path)
        return {key: value for key, value in checkpoint.items() if key not in ("format", "version")}


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises UserError when the file is no checkpoint of this package."""
    path = Path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read the checkpoint: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises whatever its unpickler and its zip reader stumble over
        raise UserError(f"{path}: is damaged or not a checkpoint") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: is not a checkpoint of fused-rin")
    if checkpoint.get("version") != VERSION:
        raise UserError(f"{path}: checkpoint version {checkpoint.get('version')}, expected {VERSION}")
    return checkpoint


def check_model_state(state: dict[str, Any], model: nn.Module) -> None:
    """Raises UserError when `state` is not a state of `model`: names and shapes are compared."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise UserError(f"{name} should be {expected.get(name, 'absent')}, is {found.get(name, 'absent')}")
