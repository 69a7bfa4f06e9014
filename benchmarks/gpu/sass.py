"""Machine code as nvdisasm prints it: instructions with their control bits, and the loops from barrier to barrier.

Each instruction of Volta and newer says for how many cycles its warp stalls after it, which of six scoreboards it
releases when its result has arrived or its operands are read, and which ones it waits for (bits 105 to 121 of 128).
"""

from __future__ import annotations

import functools
import heapq
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.cubins import cubins, find_tool, images

NO_BOARD = 7


@dataclass(frozen=True)
class Instruction:
    text: str
    stall: int  # cycles until the warp's next one
    writes: int  # scoreboard that its result releases, or NO_BOARD
    reads: int  # that is released when its operands are read, or NO_BOARD
    waits: tuple[int, ...]  # scoreboards that have to be free

    @functools.cached_property
    def opcode(self) -> str:
        return re.sub(r"^@\S+\s+", "", self.text).split()[0]

    @functools.cached_property
    def is_barrier(self) -> bool:
        """Of a block: all its threads wait for each other."""
        return bool(re.match(r"BAR\.SYNC\S* 0x0\b", self.text))

    @functools.cached_property
    def is_phase(self) -> bool:
        """Of an mbarrier, where a block of a cluster waits for its peers."""
        return self.opcode.startswith("SYNCS.PHASECHK")

    @functools.cached_property
    def is_send(self) -> bool:
        """To a peer's shared memory, or to whoever polls for it."""
        return self.opcode.startswith("STAS") or bool(re.match(r"STG\S*\.STRONG\.GPU", self.opcode))

    @functools.cached_property
    def is_poll(self) -> bool:
        """For what another block of a grid sends."""
        return bool(re.match(r"LDG\S*\.STRONG\.GPU", self.opcode))

    @property
    def is_gift(self) -> bool:
        """A barrier at which a warp only arrives: it has given another one its part of the sums."""
        return self.opcode.startswith("BAR.ARV")


Code = list[Instruction | str]  # a str is a label


def functions(disassembly: str) -> dict[str, Code]:
    """{mangled name: code} of `nvdisasm -c -hex`, which prints an instruction's second half on a line of its own."""
    found: dict[str, Code] = {}
    code: Code | None = None
    text = ""
    for line in disassembly.splitlines():
        if section := re.match(r"\s*\.section\s+(\S+?),", line):
            name = section[1]
            code = found.setdefault(name.removeprefix(".text."), []) if name.startswith(".text.") else None
        elif code is None:
            continue
        elif label := re.match(r"(\.L\w+):", line):
            code.append(label[1])
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]+ \*/", line):
            text = instruction[1]
        elif text and (high := re.match(r"\s*/\* 0x([0-9a-f]+) \*/", line)):
            bits = int(high[1], 16) >> 41
            waits = tuple(board for board in range(6) if bits >> 11 >> board & 1)
            code.append(Instruction(text, bits & 15, bits >> 5 & 7, bits >> 8 & 7, waits))
            text = ""
    return found


def disassemble(module: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[int, dict[str, Code]]]:
    """(sm number, {mangled kernel name: code}) for every cubin in a file that has a wanted kernel."""
    for image, (arch, kernels) in zip(images(module), cubins(module), strict=True):
        if not any(map(wanted, kernels)):
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(image)
            file.flush()
            command = [find_tool("nvdisasm"), "-c", "-hex", file.name]
            yield arch, functions(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def loops(code: Code, *, giving: bool = False) -> list[list[Instruction]]:
    """Every loop from a block barrier to itself by the shortest way, once each; the barrier comes first.

    Of a cluster, from the wait for the peers to itself, by the shortest way on which something is sent to them, or
    given to another warp; of a grid, from a barrier to itself, on which theirs is polled for, too. No warp is divided.
    """
    target = {line: i for i, line in enumerate(code) if isinstance(line, str)}
    places = {i: line for i, line in enumerate(code) if isinstance(line, Instruction)}
    phases = {i for i, line in places.items() if line.is_phase}
    barriers = phases or {i for i, line in places.items() if line.is_barrier}
    needed = 1 if phases else 2 if any(line.is_poll for line in places.values()) else 0

    def following(i: int) -> Iterator[int]:
        line = code[i]
        if isinstance(line, Instruction):
            branch = re.match(r"(?:@\S+\s+)?BRA(?!\.DIV)\S*\s.*`\((\.L\w+)\)", line.text)
            if branch and branch[1] in target:
                yield target[branch[1]]
            if re.match(r"(BRA(?!\.DIV)|EXIT|RET|BPT)\b", line.text):  # without a predicate
                return
        if i + 1 < len(code):
            yield i + 1

    # A place on a way, and what of that was done before it: 1 it has sent, or given, 2 and polled.
    Place = tuple[int, int]

    def done(line: Instruction | str, so_far: int) -> int:
        if isinstance(line, str):
            return so_far
        next_ = (line.is_gift if giving else line.is_send) if so_far == 0 else line.is_poll
        return so_far + (next_ and so_far < needed)

    def way_to_next(barrier: int) -> list[int]:
        """From a barrier to the next one, both included; empty if there is none. Back to itself if that can be: the way
        out of the loop, to a barrier behind it, may be the shorter one.
        """
        start = (barrier, 0)
        cost: dict[Place, int] = {start: 0}
        origin: dict[Place, Place] = {}
        queue = [(0, start)]
        nearest: Place | None = None

        def way_to(place: Place) -> list[int]:
            way = [place]
            while way[-1] != start or len(way) == 1:
                way.append(origin[way[-1]])
            return [at for at, _ in reversed(way)]

        while queue:
            so_far, place = heapq.heappop(queue)
            i, stage = place
            if i in barriers and so_far:
                if i == barrier and stage == needed:
                    return way_to(place)
                if stage == needed:  # or a phase is asked for again
                    nearest = nearest or place
                continue
            for further_on in following(i):
                line = code[further_on]
                after = (further_on, done(line, stage))
                further = so_far + isinstance(line, Instruction)
                if further < cost.get(after, further + 1) or (after == start and after not in origin):
                    cost[after], origin[after] = further, place
                    heapq.heappush(queue, (further, after))
        return way_to(nearest) if nearest else []

    ways = {start: way_to_next(start) for start in sorted(barriers)}
    found: dict[int, list[Instruction]] = {}
    for start in ways:
        seen: list[int] = []
        while start not in seen and ways.get(start):
            seen.append(start)
            start = ways[start][-1]
        if start in seen:
            around = seen[seen.index(start) :]
            found[min(around)] = [places[i] for barrier in around for i in ways[barrier][:-1] if i in places]
    return [found[first] for first in sorted(found)]


def longest_loop(code: Code) -> list[Instruction]:
    """What one pass through the loop with the longest code executes, loops within it once: of a kernel with one loop
    over time, whatever barriers a step passes.
    """
    places = {line: i for i, line in enumerate(code) if isinstance(line, str)}
    longest: list[Instruction] = []
    for i, line in enumerate(code):
        branch = isinstance(line, Instruction) and re.search(r"\bBRA\b.*`\((\.L\w+)\)", line.text)
        if branch and (start := places.get(branch[1], i)) < i:
            inside = [each for each in code[start : i + 1] if isinstance(each, Instruction)]
            longest = max(longest, inside, key=len)
    return longest
