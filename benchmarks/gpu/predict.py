"""Predicts the cycles of one step of every kernel from its SASS, so that the first measurement tests a model.

    python -m benchmarks.gpu.predict [sm number] > table.md

Needs the built module and nvdisasm (on the PATH, under CUDA_HOME, or in Triton's package). What is counted is the
shortest way through the code from one block barrier to the next: that is the plain step, with ReLU, without resets or
packing. The model, in cycles, for w warps on each of the four schedulers of an SM:

    barrier + max(load of the state, w * instructions before the first product)
            + max(w * products * their rate, chain * their latency, shared memory traffic)
            + latency of the last product + w * instructions after it
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fused_rin import cuda_plan

from benchmarks.gpu.cubins import cubins, find_tool, images, readable

BARRIER = 30.0  # arrive, and be released: figures in public microbenchmarks lie between 20 and 40
LOAD = 33.0  # a 128-bit load from shared memory
LATENCY = {"HMMA": 24.0, "FFMA": 4.0}
CLOCK_GHZ = 1.98  # the highest SM clock of an H200


@dataclass(frozen=True)
class Step:
    """Warp instructions of one step, along the shortest way from barrier to barrier."""

    before: int  # the first product
    products: int  # HMMA, or FFMA
    between: int  # other instructions among the products
    after: int  # the last product
    loads: int  # 128-bit loads from shared memory
    kind: str  # "HMMA" or "FFMA"


def functions(disassembly: str) -> dict[str, list[str]]:
    """{mangled name: lines of code and labels} of nvdisasm's output."""
    found: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in disassembly.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section:
            name = section.group(1)
        elif re.match(r"\s*\.section", line):
            name = ""
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        label = re.match(r"(\.L\w+):", line)
        if name and instruction:
            found[name].append(instruction.group(1))
        elif name and label:
            found[name].append(label.group(1) + ":")
    return dict(found)


def shortest_step(code: list[str]) -> list[str]:
    """The instructions after one block barrier up to the next one, on the shortest way between any two."""
    target = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    barriers = {i for i, line in enumerate(code) if "BAR.SYNC" in line}

    def following(i: int) -> Iterable[int]:
        branch = re.match(r"(@\S+\s+)?(?:BRA|BRA\.\w+)\b.*`\((\.L\w+)\)", code[i])
        if branch and branch.group(2) in target:
            yield target[branch.group(2)]
        ends = re.match(r"(BRA|EXIT|RET)", code[i])  # without a predicate
        if not ends and i + 1 < len(code):
            yield i + 1

    best: list[int] = []
    starts = sorted(barriers)
    for start in starts[1:] or starts:  # the first may belong to the way in, unless it is the only one
        distance, origin, queue = {start: 0}, {}, [(0, start)]
        while queue:
            steps, i = heapq.heappop(queue)
            if (i in barriers and i != start) or (i == start and steps):
                way = [i]
                while way[-1] != start or len(way) == 1:
                    way.append(origin[way[-1]])
                if not best or len(way) < len(best):
                    best = way[::-1]
                break
            if steps > distance.get(i, steps):
                continue
            for after in following(i):
                cost = steps + (0 if code[after].endswith(":") else 1)
                known = distance.get(after)
                if known is None or cost < known or (after == start and after not in origin):
                    distance[after], origin[after] = cost, i
                    heapq.heappush(queue, (cost, after))
    return [code[i] for i in best[1:] if not code[i].endswith(":")]


def count(instructions: list[str]) -> Step:
    names = [re.sub(r"^@\S+\s+", "", line).split()[0] for line in instructions]
    kind = "HMMA" if any(n.startswith("HMMA") for n in names) else "FFMA"
    at = [i for i, n in enumerate(names) if n.startswith(kind)]
    return Step(
        before=at[0],
        products=len(at),
        between=at[-1] - at[0] + 1 - len(at),
        after=len(names) - 1 - at[-1],
        loads=sum(n.startswith("LDS") and "128" in n for n in names),
        kind=kind,
    )


def cycles(step: Step, kernel: cuda_plan.Kernel, capability: tuple[int, int]) -> float:
    warps = kernel.warps / 4  # on a scheduler
    state = kernel.warps * min(kernel.rows, 8) / 2 * (kernel.hidden * kernel.element_bytes / 64)  # wavefronts
    shared = state * max(1, kernel.rows // 8) + kernel.matrix_shared_bytes / 128
    if step.kind == "HMMA":
        rate = cuda_plan._MMA_CYCLES[capability]
        tiles = kernel.hidden // 16 // kernel.warps * max(1, kernel.rows // 8)
        chain = step.products / tiles / (2 if tiles < 4 else 1)  # two accumulators where tiles are few
        work = max(
            warps * step.products * rate, chain * LATENCY["HMMA"], shared, warps * (step.products + step.between)
        )
    else:
        lanes = 0.5 if capability == (8, 0) else 1.0  # of a warp per clock and scheduler
        work = max(warps * (step.products / lanes + step.between), shared)
    return BARRIER + max(LOAD, warps * step.before) + work + LATENCY[step.kind] + warps * step.after


def table(module: Path, arch: int) -> str:
    capability = (arch // 10, arch % 10)
    lines = [
        "| kernel | warps | before, products, between, after | 128-bit loads | cycles | us at 1.98 GHz |",
        "|---|---|---|---|---|---|",
    ]
    for image, (number, _) in zip(images(module), cubins(module), strict=True):
        if number != arch:
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(image)
            file.flush()
            text = subprocess.run(
                [find_tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True
            ).stdout
        for mangled, code in functions(text).items():
            name = readable(mangled)
            _, math, size, _ = name.split()
            hidden, rows = map(int, size.split("x"))
            kernel = next(k for k in cuda_plan.KERNELS if (k.math, k.hidden, k.rows) == (math, hidden, rows))
            step = count(shortest_step(code))
            total = cycles(step, kernel, capability)
            parts = f"{step.before}, {step.products}, {step.between}, {step.after}"
            us = total / CLOCK_GHZ / 1000
            lines.append(f"| {name} | {kernel.warps} | {parts} | {step.loads} | {total:.0f} | {us:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="?", type=int, default=90)
    arch = parser.parse_args().arch
    spec = importlib.util.find_spec("fused_rin._cuda")
    if spec is None or not spec.origin:
        raise SystemExit("fused_rin._cuda is not built: install with nvcc on the PATH")
    print(table(Path(spec.origin), arch))


if __name__ == "__main__":
    main()
