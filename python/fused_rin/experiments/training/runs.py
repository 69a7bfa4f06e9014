"""The run folder: settings, metrics, checkpoint and curves of one training run.

    config.json      every setting, and the versions the run started with
    metrics.jsonl    one JSON object a line: step, split ("train" or "test"), loss, accuracy, ...
    checkpoint.pt    the newest checkpoint; always a whole one, it is replaced in one step
    checkpoint.previous.pt    the one before it
    curves.png       loss and accuracy against the step

A folder that holds anything else is never written to.
"""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import FolderLock, is_free, reporting, write_atomically
from .settings import Settings

FORMAT = "fused-rin run"
VERSION = 1
THERE = "holds a run already; go on with --resume, or name another folder"


class Run:
    """A run folder: a new one with `Run.new(...)` and, when all is known to be well, `create()`; an old one
    with `Run.open(...)`. Every method raises UserError when the disk refuses."""

    def __init__(self, path: Path, settings: Settings):
        self.path, self.settings = path, settings
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoint_path = path / "checkpoint.pt"
        self.curves_path = path / "curves.png"
        self._lock = FolderLock(path)

    @classmethod
    def new(cls, path: Path | str, settings: Settings) -> Run:
        """A run in a folder that does not exist yet or is empty; touches nothing.

        Of several processes only the first one looks: the others may find what it has made already.
        """
        path = Path(path)
        if not is_main_process():
            return cls(path, settings)
        with reporting(path, "use the run folder"):
            if not is_free(path):
                raise UserError(f"{path}: {THERE if _is_run(path) else 'is not empty and not a run folder'}")
        return cls(path, settings)

    def claim(self) -> None:
        """Takes the folder for this process until `release`, or its end. UserError if another one trains there."""
        self._lock.take("trains")
        self._lock.tidy()

    def release(self) -> None:
        self._lock.release()

    def create(self) -> None:
        """Makes and claims the folder, with the configuration in it."""
        config = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings.to_dict(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        with reporting(self.path, "write to the run folder"):
            self.path.mkdir(parents=True, exist_ok=True)
        self.claim()
        if _is_run(self.path):  # made by another process since `new` looked
            self.release()
            raise UserError(f"{self.path}: {THERE}")
        with reporting(self.path, "write to the run folder"):
            write_atomically(self.path / "config.json", (json.dumps(config, indent=2) + "\n").encode())
            self.metrics_path.touch()

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run in an existing folder, with the settings it was started with."""
        path = Path(path)
        if not _is_run(path):
            raise UserError(f"{path}: is not a run folder (no config.json of fused-rin in it)")
        try:
            return cls(path, Settings.from_dict(_read_config(path)["settings"]))
        except (KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{path / 'config.json'}: settings cannot be used: {error}") from error

    def append_metrics(self, record: dict[str, Any]) -> None:
        with reporting(self.path, "write to the run folder"), self.metrics_path.open("a") as file:
            file.write(_to_json(record) + "\n")

    def sync_metrics(self) -> None:
        """Returns when what was appended is on the disk."""
        with reporting(self.path, "write to the run folder"), self.metrics_path.open("a") as file:
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records, oldest first; none of a run that has not begun. A last line cut short by a crash is left out."""
        if not self.metrics_path.exists():
            return []
        records = []
        with reporting(self.path, "read the metrics of"):
            for line in self.metrics_path.read_text().splitlines():
                try:
                    values = json.loads(line)
                except json.JSONDecodeError:
                    break
                records.append({name: math.nan if value is None else value for name, value in values.items()})
        return records

    def rewind_metrics(self, step: int) -> None:
        """Drops what was recorded after `step`: it will be recorded again by the resumed run."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        with reporting(self.path, "write to the run folder"):
            write_atomically(self.metrics_path, "".join(_to_json(record) + "\n" for record in kept).encode())


def is_main_process() -> bool:
    """True but in the second and further processes that torchrun has started."""
    return int(os.environ.get("RANK", 0)) == 0


def _to_json(record: dict[str, Any]) -> str:
    """JSON has no NaN and no infinity: null stands for them."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite)


def _is_run(path: Path) -> bool:
    try:
        return _read_config(path)["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())
