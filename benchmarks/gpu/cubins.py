"""Reads what nvcc compiled out of a binary: registers, stack and shared memory of every kernel, per architecture.

A fat binary that was not compressed (cmake/cuda.cmake sees to that, but for all architectures at once) holds its
cubins as plain ELF files; their `.nv.info` sections carry the resources. No CUDA tool is needed then. Format: elf.h for
the containers; the attributes are those that `cuobjdump -elf` prints by name (EIATTR_*).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EM_CUDA = 190
_REGCOUNT, _FRAME_SIZE, _MIN_STACK_SIZE = 0x2F, 0x11, 0x12


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int  # bytes a thread, spills included
    static_shared: int  # bytes a block, besides what is asked for at launch


def find_tool(name: str) -> str:
    """The path of one of CUDA's tools: on the PATH, under CUDA_HOME, in Triton's package. Or FileNotFoundError."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which(name, path=os.pathsep.join(places))
    if not found:
        raise FileNotFoundError(f"{name} is not in {', '.join(places)}")
    return found


def images(path: Path) -> list[bytes]:
    """Every cubin in a file, as what nvdisasm takes (with what follows it in the file).

    Those of a compressed binary (FUSED_RIN_CUDA_ARCHS=all) are unpacked by cuobjdump; FileNotFoundError without it.
    """
    data = path.read_bytes()
    found = []
    for match in re.finditer(rb"\x7fELF\x02\x01", data):
        start = match.start()
        if struct.unpack_from("<H", data, start + 18)[0] == EM_CUDA:
            headers, _, _, _, _, entry_size, count = struct.unpack_from("<QIHHHHH", data, start + 40)
            found.append(data[start : start + headers + entry_size * count + 64 * 1024])
    if found:
        return found
    with tempfile.TemporaryDirectory() as folder:
        command = [find_tool("cuobjdump"), "-xelf", "all", str(path.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return [file.read_bytes() for file in sorted(Path(folder).glob("*.cubin"))]


def cubins(path: Path) -> Iterator[tuple[int, dict[str, Resources]]]:
    """(sm number, {mangled kernel name: resources}) for every cubin in a file."""
    for image in images(path):
        yield _parse(image)


def codes(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(sm number, {mangled kernel name: a digest of its machine code}) for every cubin in a file."""
    for image in images(path):
        sections = _Sections(image)
        yield (
            sections.arch,
            {
                name.removeprefix(".text."): hashlib.sha256(sections.content(i)).hexdigest()[:12]
                for name, i in sections.places.items()
                if name.startswith(".text.")
            },
        )


def readable(mangled: str) -> str:
    """`bfloat16 mma 128x8 forward` of block_sweep<MmaConfig<...>, false, false>; `units-mma` if the last is true,
    `cluster-mma` of cluster_sweep<MmaConfig<...>, false>; and `grid-mma 512x8/32` of grid_sweep, of 32 blocks.
    """
    kind = re.search(r"(Mma|Fma)ConfigI", mangled)
    assert kind, f"a kernel that is not a block sweep: {mangled}"
    numbers = re.findall(r"Li(\d+)E", mangled)
    found = re.search(r"MathE(\d)E", mangled)
    math = ("mma", "tf32", "tf32x3")[int(found.group(1))] if found else "fma"
    dtype = next((n for tag, n in (("8BFloat16", "bfloat16"), ("7Float16", "float16")) if tag in mangled), "float32")
    flags = re.search(r"Lb\dEEELb(\d)E(?:Lb(\d)E)?", mangled)  # behind the configuration's own
    assert flags, f"a sweep of an older form: {mangled}"
    direction = "backward" if flags.group(1) == "1" else "forward"
    grid = "grid_sweep" in mangled
    of = "grid-" if grid else "cluster-" if "cluster_sweep" in mangled else "units-" if flags.group(2) == "1" else ""
    size = f"{numbers[0]}x{numbers[1]}" + (f"/{numbers[6]}" if grid else "")
    return f"{dtype} {of}{math} {size} {direction}"


def compiler_release(path: Path) -> str:
    """Of nvcc, e.g. "13.0"; "" where the binary does not say."""
    match = re.search(rb"Cuda compilation tools, release ([0-9.]+)", path.read_bytes())
    return match.group(1).decode() if match else ""


def _text(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


class _Sections:
    """Of an ELF file: `places` is {name: number}."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        section_offset, flags = struct.unpack_from("<QI", data, 40)
        entry_size, count, names_index = struct.unpack_from("<HHH", data, 58)
        self.headers = [
            struct.unpack_from("<IIQQQQIIQQ", data, section_offset + i * entry_size) for i in range(count)
        ]  # name, type, flags, address, offset, size, link, info, alignment, entry size
        names = self.content(names_index)
        self.places = {_text(names, h[0]): i for i, h in enumerate(self.headers)}
        self.arch = flags >> 8 & 0xFF

    def content(self, i: int) -> bytes:
        return self.data[self.headers[i][4] : self.headers[i][4] + self.headers[i][5]]


def _parse(data: bytes) -> tuple[int, dict[str, Resources]]:
    sections = _Sections(data)
    section, content = sections.places, sections.content
    symbols, strings = content(section[".symtab"]), content(section[".strtab"])
    attributes: dict[str, dict[int, int]] = {}
    info, at = content(section[".nv.info"]), 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != 4:  # only EIFMT_SVAL carries `size` bytes after the header
            continue
        if size == 8:
            symbol, value = struct.unpack_from("<II", info, at)
            name = _text(strings, struct.unpack_from("<I", symbols, symbol * 24)[0])
            attributes.setdefault(name, {})[attribute] = value
        at += size
    kernels = {}
    for name, values in attributes.items():
        if f".text.{name}" not in section:
            continue
        shared = section.get(f".nv.shared.{name}")
        kernels[name] = Resources(
            registers=values[_REGCOUNT],
            stack=max(values.get(_FRAME_SIZE, 0), values.get(_MIN_STACK_SIZE, 0)),
            static_shared=sections.headers[shared][5] if shared is not None else 0,
        )
    return sections.arch, kernels
