"""Data sets on the disk: found, checked, read, and fetched from their public home when a user asks for it.

A data folder holds `mnist/` with the four official IDX files (gzipped or not), and `babi/` with the archive
of the bAbI tasks v1.2. It is the one that is named, else $FUSED_RIN_DATA, else `data` in the working
directory.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError
from .files import reporting, write_atomically

MNIST_HOME = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# sha256 of the uncompressed files: the gzipped ones differ from one mirror to the other.
MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
BABI_HOME = "https://s3.amazonaws.com/text-datasets/babi_tasks_1-20_v1-2.tar.gz"
BABI_ARCHIVE = "tasks_1-20_v1-2.tar.gz"
# sha256 over name, NUL and sha256 of each of the 40 files of the English tasks with 1,000 questions, by name.
BABI_SHA256 = "d986d2f0b8339fec28918fbe72c8fc6c512ec67f9854d2324f01a82e6d2bcb05"

Labelled = tuple[Tensor, Tensor]


def data_folder(named: str = "") -> Path:
    """The folder to look for data in; `named` is what the user gave."""
    return Path(named or os.environ.get("FUSED_RIN_DATA") or "data")


def read_mnist(folder: Path) -> tuple[Labelled, Labelled]:
    """(images [60000, 28, 28], labels [60000]) to train on and the 10,000 to test, as uint8 and int64.

    Raises UserError when a file is missing or its checksum is wrong.
    """
    with _saying_how_to_replace("mnist", folder):
        contents = {name: _check_mnist(name, _read_mnist_file(folder / "mnist", name)) for name in MNIST}

    def part(name: str) -> Labelled:
        pixels, labels = contents[f"{name}-images-idx3-ubyte"][16:], contents[f"{name}-labels-idx1-ubyte"][8:]
        images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 28, 28)
        return images, torch.frombuffer(bytearray(labels), dtype=torch.uint8).long()

    return part("train"), part("t10k")


def read_babi(folder: Path) -> dict[str, str]:
    """The text of each of the 40 files, by name, e.g. "qa1_single-supporting-fact_train.txt".

    Raises UserError when the archive is missing or its content is not what its checksum says.
    """
    path = folder / "babi" / BABI_ARCHIVE
    with _saying_how_to_replace("babi", folder):
        return _read_babi_archive(path)


def download(name: str, folder: Path) -> list[Path]:
    """Fetches "mnist" or "babi" into the data folder, with a progress bar. Keeps what is there already and is sound.

    Raises UserError when the source cannot be reached or what it sent is wrong; nothing is written then.
    """
    try:
        if name == "mnist":
            read_mnist(folder)
        else:
            read_babi(folder)
        return []
    except UserError:
        pass
    written = []
    with reporting(folder, "write to the data folder"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if name == "mnist":
        for file in MNIST:
            packed = _fetch(f"{MNIST_HOME}{file}.gz")
            _check_mnist(file, _gunzip(f"{MNIST_HOME}{file}.gz", packed))
            written.append(_write(folder / "mnist" / f"{file}.gz", packed))
        return written
    written.append(_write(folder / "babi" / BABI_ARCHIVE, _fetch(BABI_HOME)))
    read_babi(folder)
    return written


class _Damaged(UserError):
    """A file that is there, but not what it should be."""


@contextmanager
def _saying_how_to_replace(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except _Damaged as error:
        raise UserError(f"{error}; {_how_to_get(name, folder)}") from error


def _read_babi_archive(path: Path) -> dict[str, str]:
    if not path.exists():
        raise UserError(_missing("bAbI", path, path.parent.parent, "babi"))
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                place, _, name = member.name.rpartition("/")
                if place.endswith("/en") and name.startswith("qa") and member.isfile():
                    files[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise _Damaged(f"{path}: is damaged: {error}") from error
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    if digest.hexdigest() != BABI_SHA256:
        raise _Damaged(f"{path}: is damaged or not bAbI v1.2: the sha256 of its tasks is {digest.hexdigest()}")
    return {name: content.decode() for name, content in files.items()}


def _read_mnist_file(folder: Path, name: str) -> bytes:
    plain, packed = folder / name, folder / f"{name}.gz"
    with reporting(folder, "read"):
        if packed.exists():
            return _gunzip(str(packed), packed.read_bytes())
        if plain.exists():
            return plain.read_bytes()
    raise UserError(_missing("MNIST", packed, folder.parent, "mnist"))


def _check_mnist(name: str, content: bytes) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != MNIST[name]:
        raise _Damaged(f"{name}: is damaged or not MNIST: its sha256 is {found}, expected {MNIST[name]}")
    return content


def _gunzip(name: str, packed: bytes) -> bytes:
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise _Damaged(f"{name}: is damaged: {error}") from error


def _missing(what: str, path: Path, folder: Path, name: str) -> str:
    return f"{what} is not there: {path} is missing; {_how_to_get(name, folder)}"


def _how_to_get(name: str, folder: Path) -> str:
    return (
        f"put it there, name another folder with --data-dir or FUSED_RIN_DATA, or fetch it: "
        f"fused-rin download {name} --data-dir {folder}"
    )


def _fetch(url: str) -> bytes:
    from .bars import Bar  # tqdm is one of the extras

    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            parts = []
            with Bar(url.rpartition("/")[2], total=total, unit="B", unit_scale=True) as bar:
                while part := response.read(1 << 16):
                    parts.append(part)
                    bar.update(len(part))
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: cannot be fetched: {error}") from error
    return b"".join(parts)


def _write(path: Path, content: bytes) -> Path:
    with reporting(path, "write"):
        write_atomically(path, content)
    return path
