"""Plays the machine code of a step of every kernel: how many cycles it takes, and where it waits.

    python -m benchmarks.gpu.predict                 cycles of the built module to benchmarks/results/step-cycles.json
    python -m benchmarks.gpu.predict --show "bfloat16 mma 128x8 forward" [--arch sm_90] [--exchange CYCLES]

Needs the built module and nvdisasm (on the PATH, under CUDA_HOME, or in Triton's package). The model is of one of an
SM's four schedulers and its warps, each of which runs in order, by the control bits of its instructions (sass.py),
round a loop from barrier to barrier; the other three schedulers run in step with it, so what the load-store unit does
for a warp it does four times. Three latencies of a load from device memory, or of a copy into shared memory: 30 cycles,
as if there were none, 280, as from L2, and 650. Where they differ, reading ahead does not hide the latency.

Of a cluster the loop goes from the wait for the peers to itself, of a grid from barrier to barrier; what is sent to the
others is there as many cycles later as the planner takes for it (cuda_plan.py; measured on an H100), with all the rows
of a tile. A packet is polled for once.

What the model does not know: bank conflicts, caches, clocks, that an instruction cache may miss. It plays a loop's code
from the first instruction to the last: of the kernels of units, whose loop has six activations and three forms, all of
them, and what it says is a bound. What it is worth is in benchmarks/NOTES-cuda.md, beside measured times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fused_rin import cuda_plan

from benchmarks.gpu.cubins import codes, compiler_release, readable
from benchmarks.gpu.sass import NO_BOARD, Instruction, disassemble, loops

TABLE = Path(__file__).resolve().parents[1] / "results" / "step-cycles.json"
LOAD_LATENCIES = (30, 280, 650)
# Measured on an H100 (benchmarks/NOTES-h100.md, latencies.json): a barrier, and a shared load past its own transfer.
BARRIER, SHARED_LATENCY = 20, 30
SHUFFLE_LATENCY, OTHER_LATENCY, OPERANDS_READ = 24, 25, 14
WARPGROUP_MMA = 10.0  # cycles of a 64x8x16; assumed (triton_kernels/NOTES.md)
MEMORY = ("LDS", "STS", "LDG", "STG", "LDSM", "LD.", "ST.", "ATOM", "RED", "SYNCS")
WIDTHS = {"64": 2, "128": 4}  # wavefronts of 128 bytes of a warp's access; 1 otherwise
ALU = (
    "LOP3",
    "IADD3",
    "VIADD",
    "ISETP",
    "SEL",
    "FSEL",
    "PRMT",
    "FMNMX",
    "F2FP",
    "FSETP",
    "LEA",
    "SHF",
    "PLOP3",
    "VIMNMX",
)
ROUNDS, COUNTED = 14, 4  # more than a ring has slots


# Of a loop, that of the warps which own sums, and, where k has several parts, that of the others.
Ways = list[list[Instruction]]


@dataclass(frozen=True)
class Played:
    """An instruction as the scheduler plays it."""

    line: Instruction
    unit: str  # what it occupies
    cycles: float  # for how long; the load-store unit for all four schedulers
    latency: float  # of a result that a scoreboard waits for, from when the unit takes it
    copies: bool = False  # into shared memory
    closes: bool = False  # a group of copies
    pending: int | None = None  # waits until no more groups are
    sends: bool = False  # what another block waits for
    polls: bool = False  # for what others send
    awaits: bool = False  # all products that the warp has issued

    @property
    def queued(self) -> bool:
        return self.unit == "memory"


def played(line: Instruction, load: float, arch: int, wavefronts: float, senders: float) -> Played:
    """senders: see Scheduler; 0 of a kernel whose blocks exchange nothing by packets."""
    opcode = line.opcode
    if line.is_send and senders:
        return Played(line, "memory", 4 * senders * WIDTHS["128"], OTHER_LATENCY, sends=True)
    if line.is_poll and senders:  # see Scheduler.issue for when it is answered
        return Played(line, "memory", 4 * WIDTHS["128"], 0.0, polls=True)
    if opcode.startswith("ATOM") or re.match(r"MEMBAR\S*GPU", opcode):  # there and back
        return Played(line, "memory", 4.0, load)
    if opcode.startswith("LDGDEPBAR"):
        return Played(line, "none", 0.0, OTHER_LATENCY, closes=True)
    if opcode.startswith(MEMORY):
        wide = next((w for name, w in WIDTHS.items() if name in opcode.split(".")), 1)
        cycles = 4 * (wavefronts if opcode.startswith("LDS.") and wide == 4 else wide)
        latency = load if opcode.startswith(("LDG", "LD.")) else cycles + SHARED_LATENCY
        return Played(line, "memory", cycles, latency, copies=opcode.startswith("LDGSTS"))
    if opcode.startswith("HGMMA"):  # of a group of four warps, each of which issues it
        return Played(line, "tensor", WARPGROUP_MMA, OTHER_LATENCY)
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return Played(line, "none", 0.0, OTHER_LATENCY, awaits=True)
    if opcode.startswith("HMMA"):
        return Played(line, "tensor", 6.2 if arch == 90 else 8.0, OTHER_LATENCY)
    if opcode.startswith("MUFU"):
        return Played(line, "special", 8.0, OTHER_LATENCY)
    if opcode.startswith(ALU):
        return Played(line, "alu", 2.0, OTHER_LATENCY)
    if opcode.startswith(("FFMA", "FADD", "FMUL")):
        return Played(line, "fma", 2.0 if arch == 80 else 1.0, OTHER_LATENCY)
    latency = SHUFFLE_LATENCY if opcode.startswith("SHFL") else OTHER_LATENCY
    pending = int(line.text.rsplit(",", 1)[1], 0) if opcode.startswith("DEPBAR.LE") else None
    return Played(line, "none", 0.0, latency, pending=pending)


@dataclass
class Warp:
    loop: list[Played]
    at: int = 0  # in it
    ready: float = 0.0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)  # when each scoreboard is free
    copies: float = 0.0  # when all copies into shared memory that were asked for have arrived
    groups: list[float] = field(default_factory=list)  # the same when each group was closed
    barriers: int = 0  # that it has arrived at
    sent: float = 0.0  # when its last store to a peer was on its way
    sent_in: int = 0  # and in which round
    products: float = 0.0  # when those of its warp group that it has issued are done
    earliest: float | None = None  # when its next instruction may issue, as far as that hangs on the warp alone


class Scheduler:
    """Plays a loop a warp. `load`: latency of device memory; `wavefronts`: of a 128-bit load from shared memory, on
    average; `senders`: how many of a scheduler's warps send to peers, on average of the four; `exchange`: from the last
    of what is sent until all that the peers have sent is seen.

    `waited`: {place in the loop: cycles that its instruction waited for more than its predecessor's stall}.
    """

    def __init__(
        self,
        ways: Sequence[list[Instruction]],
        load: float,
        arch: int,
        wavefronts: float = 4.0,
        senders: float = 1.0,
        exchange: float = 0.0,
    ) -> None:
        barriers = {sum(line.is_barrier or line.is_phase for line in loop) for loop in ways}
        if len(barriers) > 1 or not min(barriers):
            raise ValueError(f"all warps have to pass as many barriers, and at least one, got {barriers}")
        self.barriers = barriers.pop()  # of a round
        loops_of = {id(loop): [played(line, load, arch, wavefronts, senders) for line in loop] for loop in ways}
        self.warps = [Warp(loops_of[id(loop)]) for loop in ways]
        self.exchange = exchange
        self.free = dict.fromkeys(("issue", "memory", "tensor", "special", "alu", "fma", "none"), 0.0)
        self.released: list[float] = []  # when each barrier was
        self.waited: dict[int, float] = {}

    def earliest(self, warp: Warp) -> float:
        next_ = warp.loop[warp.at]
        if warp.earliest is None:
            now = max([warp.ready, *(warp.boards[board] for board in next_.line.waits)])
            if next_.pending is not None:
                now = max([now, *warp.groups[: len(warp.groups) - next_.pending][-1:]])
            if next_.awaits:
                now = max(now, warp.products)
            warp.earliest = now
        now = max(warp.earliest, self.free["issue"])
        # A barrier does not stop a warp at once: arithmetic goes on, what touches memory and the next barrier wait.
        # That a phase has ended is asked for, and nothing goes on before.
        if next_.queued or next_.line.is_barrier or warp.loop[0].line.is_phase:
            if warp.barriers > len(self.released):
                return math.inf
            if next_.polls and max(w.sent_in for w in self.warps) < warp.barriers:
                return math.inf  # asks in vain
            return max(now, self.released[warp.barriers - 1]) if warp.barriers else now
        return max(now, self.free[next_.unit])

    def issue(self, warp: Warp, now: float) -> None:
        next_ = warp.loop[warp.at]
        begin = max(now, self.free[next_.unit])
        self.free[next_.unit], self.free["issue"] = begin + next_.cycles, now + 1
        result, line = begin + next_.latency, next_.line
        if next_.polls:
            result = max(result, max(w.sent for w in self.warps) + self.exchange)
        if next_.copies:
            warp.copies = max(warp.copies, result)
        elif next_.closes:
            warp.groups.append(warp.copies)
        elif line.writes != NO_BOARD:
            warp.boards[line.writes] = max(warp.boards[line.writes], result)
        if line.reads != NO_BOARD:
            warp.boards[line.reads] = max(warp.boards[line.reads], begin + OPERANDS_READ)
        if line.opcode.startswith("HGMMA"):
            warp.products = result
        if next_.sends:
            warp.sent, warp.sent_in = begin + next_.cycles, warp.barriers
        if line.is_barrier or line.is_phase:
            warp.barriers += 1
            if min(w.barriers for w in self.warps) > len(self.released):
                arrived = max(w.sent for w in self.warps) + self.exchange if line.is_phase else now + BARRIER
                self.released.append(max(now, arrived))
        if (
            len(self.released) // self.barriers == self.rounds - 1
            and now > warp.ready
            and warp.loop is self.warps[0].loop
        ):
            self.waited[warp.at] = self.waited.get(warp.at, 0.0) + now - warp.ready
        warp.ready = now + max(1, line.stall)
        if line.opcode.startswith("BAR.SYNC") and not line.is_barrier:  # a pair of warps
            warp.ready += BARRIER
        warp.at = (warp.at + 1) % len(warp.loop)
        warp.earliest = None

    def play(self, rounds: int = ROUNDS) -> float:
        """Cycles of a round, on average of the last ones."""
        self.rounds = rounds
        while len(self.released) < rounds * self.barriers:
            turns = [self.earliest(warp) for warp in self.warps]
            now = min(turns)
            if now == math.inf:
                raise ValueError("every warp waits for what nobody sends")
            self.issue(self.warps[turns.index(now)], now)
        return (self.released[-1] - self.released[-1 - COUNTED * self.barriers]) / COUNTED


def kernel_of(name: str) -> cuda_plan.Kernel:
    _, math_, size, _ = name.split()
    kind, _, product = math_.rpartition("-")
    every = {
        "": cuda_plan.KERNELS,
        "units": cuda_plan.UNIT_KERNELS,
        "cluster": cuda_plan.CLUSTER_KERNELS,
        "grid": cuda_plan.GRID_KERNELS,
    }[kind]
    return next(k for k in every if (k.math, size_of(k)) == (product, size))


def size_of(kernel: cuda_plan.Kernel) -> str:
    """As in a kernel's name: of a grid with the number of its blocks."""
    return f"{kernel.hidden}x{kernel.rows}" + (f"/{kernel.ctas}" if kernel.grid else "")


def wavefronts(kernel: cuda_plan.Kernel) -> float:
    """Of a 128-bit load from shared memory. What few rows have is read by several lanes at once."""
    if kernel.math != "fma":
        return 4.0
    chunks, outputs = kernel.hidden // kernel.parts // 16, kernel.outputs * kernel.parts // (8 * kernel.warps)
    state, matrix = chunks * kernel.rows, (chunks - kernel.register_parts) * outputs
    return (state * 1 + matrix * 4) / (state + matrix)


def named(found: Sequence[list[Instruction]]) -> dict[str, list[Instruction]]:
    """A kernel's three loops: ReLU is the shortest, and the general one compares the most. Or, of units, the one."""
    if not found:
        return {}
    if len(found) == 1:
        return {"general": found[0]}
    relu, *others = sorted(found, key=len)
    tanh, general = sorted(others, key=lambda loop: sum(line.opcode.startswith("ISETP") for line in loop))
    return {"relu": relu, "tanh": tanh, "general": general}


def scheduler(kernel: cuda_plan.Kernel, ways: Ways, load: float, arch: int) -> Scheduler:
    """The first one, which has an owner of sums; the other warps give it their parts."""
    warps = max(1, kernel.warps // 4)
    owners = warps // kernel.parts or 1
    of_warps = [ways[0]] * owners + [ways[-1]] * (warps - owners)
    return Scheduler(
        of_warps, load, arch, wavefronts(kernel), warps / kernel.parts, kernel.exchange_cycles(kernel.rows)
    )


def cycles(kernel: cuda_plan.Kernel, ways: Ways, arch: int) -> list[int]:
    """Of a step, at each of LOAD_LATENCIES."""
    return [round(scheduler(kernel, ways, load, arch).play()) for load in LOAD_LATENCIES]


def digests(module: Path) -> dict[tuple[str, str], str]:
    """{(architecture, kernel): a digest of its machine code}; empty kernels too."""
    return {(f"sm_{arch}", readable(name)): code for arch, found in codes(module) for name, code in found.items()}


def kernels(module: Path, only: Collection[str] = ()) -> Iterator[tuple[str, str, dict[str, Ways]]]:
    """(architecture, kernel, the ways of its warps round its loops) of what is not empty there; of all, or of some
    kernels only.
    """

    def wanted(mangled: str) -> bool:
        return not only or readable(mangled) in only

    for arch, functions in disassemble(module, wanted):
        for mangled, code in functions.items():
            if not wanted(mangled):
                continue
            if owners := named(loops(code)):
                gives = any(isinstance(line, Instruction) and line.is_gift for line in code)
                givers = named(loops(code, giving=True)) if gives else {}
                ways = {kind: [loop, givers[kind]] if gives else [loop] for kind, loop in owners.items()}
                yield f"sm_{arch}", readable(mangled), ways


def built() -> Path:
    spec = importlib.util.find_spec("fused_rin._cuda")
    if spec is None or not spec.origin:
        raise SystemExit("fused_rin._cuda is not built: install with nvcc on the PATH")
    return Path(spec.origin)


def write(module: Path) -> None:
    """The table, with a line a kernel so that a difference shows what changed."""
    lines: dict[str, list[str]] = {}
    code = digests(module)
    for arch, name, found in kernels(module):
        number = int(arch.removeprefix("sm_"))
        row: dict[str, object] = {kind: cycles(kernel_of(name), ways, number) for kind, ways in found.items()}
        lines.setdefault(arch, []).append(f"   {json.dumps(name)}: {json.dumps({**row, 'code': code[arch, name]})}")
    body = ",\n".join(f'  "{arch}": {{\n' + ",\n".join(sorted(rows)) + "\n  }" for arch, rows in sorted(lines.items()))
    head = f' "nvcc": {json.dumps(compiler_release(module))},\n "load latencies": {json.dumps(LOAD_LATENCIES)},\n'
    TABLE.write_text("{\n" + head + ' "cycles": {\n' + body + "\n }\n}\n")


def show(wanted: str, wanted_arch: str, exchange: float | None) -> None:
    for arch, name, found in kernels(built(), [wanted]):
        if arch != wanted_arch:
            continue
        kernel = kernel_of(name)
        for kind, ways in found.items():
            player = scheduler(kernel, ways, LOAD_LATENCIES[-1], int(arch.removeprefix("sm_")))
            if exchange is not None:
                player.exchange = exchange
            print(f"{name}, {kind}: {player.play():.0f} cycles, {len(ways[0])} instructions")
            for i, line in enumerate(ways[0]):
                waited = f"waits {player.waited[i]:.0f}" if i in player.waited else ""
                print(f"  {line.stall:2d} {waited:10s} {line.text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", metavar="KERNEL", help="print its loops, and where they wait")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--exchange", type=float, help="between blocks, cycles; without it the planner's")
    arguments = parser.parse_args()
    if arguments.show:
        show(arguments.show, arguments.arch, arguments.exchange)
    else:
        write(built())


if __name__ == "__main__":
    main()
