"""Draws docs/kernels/cpu-sweep.svg and docs/kernels/block-step.svg, with the kernels' own numbers.

    python -m tools.draw_kernels [FOLDER]

Numbers come from csrc/cpu and from `cuda_plan.KERNELS`, so a picture that is out of date differs from what this draws.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_rin import cuda_plan

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "kernels"
BLUE, GREEN, ORANGE, GREY, WHITE = "#e8f0fb", "#dff3e3", "#fdebd0", "#eef0f2", "#fff"


class Picture:
    """SVG text, piece by piece. Sizes in pixels, y downwards."""

    def __init__(self, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" fill="#456"/></marker>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, *lines: str, dashed: bool = False
    ) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" '
            f'stroke="#567"{dash}/>'
        )
        self.text(x + width / 2, y + height / 2 - 8 * (len(lines) - 1) + 5, *lines, anchor="middle")

    def text(self, x: float, y: float, *lines: str, anchor: str = "start", size: int = 13, bold: bool = False) -> None:
        weight = ' font-weight="bold"' if bold else ""
        for number, line in enumerate(lines):
            safe = line.replace("&", "&amp;").replace("<", "&lt;")
            self.parts.append(
                f'<text x="{x:g}" y="{y + 16 * number:g}" text-anchor="{anchor}" font-size="{size}"{weight}>'
                f"{safe}</text>"
            )

    def arrow(self, *points: tuple[float, float]) -> None:
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{path}" fill="none" stroke="#456" stroke-width="1.5" marker-end="url(#head)"/>')

    def stripes(self, x: float, y: float, width: float, height: float, fills: Sequence[str], across: bool) -> None:
        """A matrix in parts: rows one below the other, or with `across` columns side by side."""
        for number, fill in enumerate(fills):
            if across:
                self.box(x + number * width / len(fills), y, width / len(fills), height, fill)
            else:
                self.box(x, y + number * height / len(fills), width, height / len(fills), fill)

    def done(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def constant(file: str, name: str) -> str:
    """What a constexpr of csrc is set to."""
    found = re.search(rf"constexpr \w+ {name} = ([^;]+);", (ROOT / "csrc" / file).read_text())
    if not found:
        raise SystemExit(f"csrc/{file} has no constexpr {name}")
    return found[1]


def cpu_sweep() -> str:
    """The product of one tile of rows with one panel, and the two ways of sharing the work."""
    rows = int(constant("cpu/sweep.h", "kMaxTileRows"))
    wide, narrow = re.findall(r"\d+", constant("cpu/dot.h", "kNarrow").split("?")[1])
    p = Picture(900, 560)
    p.text(20, 28, f"A step of a tile of up to {rows} sequences", size=15, bold=True)
    p.stripes(20, 60, 150, 96, [GREEN] * rows, across=False)
    p.text(95, 176, "state of step t - 1", f"up to {rows} rows x D", anchor="middle")
    p.text(186, 114, "x", size=20)
    p.stripes(215, 44, 168, 130, [WHITE, ORANGE, WHITE, WHITE], across=True)
    p.text(299, 192, "U, cut into panels", f"a panel: {wide} vectors wide ({narrow} with", anchor="middle")
    p.text(299, 224, "16 registers), read front to back", anchor="middle")
    p.arrow((278, 60), (278, 160))
    p.arrow((392, 109), (432, 109))
    p.box(436, 72, 150, 74, BLUE, f"sums, {rows} x {wide} vectors,", "in registers")
    p.arrow((586, 109), (626, 109))
    p.box(630, 60, 250, 98, GREY, "epilogue", "+ skip x state of step t - 1", "+ pre_t", "ReLU or tanh")
    p.arrow((700, 158), (700, 196))
    p.box(630, 200, 120, 40, GREEN, "state of step t", "(2nd buffer)")
    p.arrow((820, 158), (820, 196))
    p.box(770, 200, 110, 40, WHITE, "out_t")
    p.text(436, 176, "the skip is added last, in the", "type of the sums: U is small", "against I")

    p.text(20, 286, "Threads share sequences", size=15, bold=True)
    p.stripes(20, 306, 120, 96, [GREEN, GREEN, GREEN, BLUE, BLUE, BLUE], across=False)
    p.text(152, 334, "thread 0")
    p.text(152, 382, "thread 1")
    p.stripes(260, 306, 130, 96, [GREY] * 4, across=True)
    p.text(325, 420, "each reads all of U", anchor="middle")
    p.text(20, 446, "In the sweep they never meet. Taken where there", "are sequences enough.")

    p.text(470, 286, "Threads share outputs", size=15, bold=True)
    p.stripes(470, 306, 110, 32, [GREY] * 2, across=False)
    p.text(525, 356, "all of the state", anchor="middle")
    p.stripes(610, 306, 130, 96, [GREEN, GREEN, BLUE, BLUE], across=True)
    p.text(642, 420, "thread 0", anchor="middle")
    p.text(708, 420, "thread 1", anchor="middle")
    p.arrow((750, 354), (776, 354))
    p.stripes(780, 338, 100, 32, [GREEN, BLUE], across=True)
    p.text(830, 388, "next state", anchor="middle")
    p.text(
        470, 446, "They meet once a step. Taken for few sequences", "and a large U, which stays in the cores' caches."
    )

    p.box(
        20, 488, 860, 56, GREY,
        "Either way the order of every sum is the same, so the number of threads changes no bit, and a team",
        "whose members wait longer than they work ends at any step: thread 0 goes on alone.",
    )  # fmt: skip
    return p.done()


def block_step() -> str:
    """Where a CTA keeps what, and what happens when in a step. By the kernel for 128 units in 16 bits."""
    k = next(kernel for kernel in cuda_plan.KERNELS if (kernel.math, kernel.hidden, kernel.rows) == ("mma", 128, 8))
    state = k.rows * (k.hidden * k.element_bytes + 64) + k.rows // 2 * 32
    p = Picture(900, 610)
    p.box(20, 16, 860, 44, GREY, "device memory: pre [T, B, G, D] is read once, out [T, B, G, D] is written once")
    p.box(20, 92, 830, 276, WHITE)
    p.text(
        34, 114, f"one CTA: {k.threads} threads, {k.rows} sequences, one recurrence's whole U, for all steps", bold=True
    )

    p.text(34, 142, "registers")
    p.box(
        34, 150, 330, 76, ORANGE,
        f"U: {k.hidden} x {k.hidden}, {k.hidden**2 * k.element_bytes // 1024} KB in bfloat16",
        "read from device memory once;", "of larger matrices a part is in shared memory",
    )  # fmt: skip
    p.box(34, 254, 330, 84, GREEN, "sums, and the state in float32,", "each in the thread that owns it")
    p.text(690, 142, f"shared memory, {k.shared_bytes(backward=False) / 1024:.0f} KB")
    p.box(500, 150, 160, 60, GREEN, "state of step t - 1,", f"rounded, {state / 1024:.1f} KB")
    p.box(680, 150, 156, 60, GREEN, "state of step t;", "the two take turns", dashed=True)
    p.arrow((640, 150), (640, 62))
    p.text(630, 82, "out, by 16 bytes", anchor="end")
    p.arrow((500, 180), (368, 180))
    p.text(434, 172, "product", anchor="middle")
    p.arrow((200, 226), (200, 250))
    p.text(500, 262, f"ring: pre of {k.forward_slots} steps, read ahead")
    for slot in range(k.forward_slots):
        fill = BLUE if slot else ORANGE
        p.box(500 + slot * 336 / k.forward_slots, 270, 336 / k.forward_slots, 44, fill, f"+{slot}" if slot else "t")
    p.text(500, 334, "filled by cp.async: no thread waits for device", "memory, no register is kept for it")
    p.arrow((866, 60), (866, 292), (840, 292))
    p.arrow((500, 292), (368, 292))
    p.arrow((364, 268), (434, 268), (434, 232), (758, 232), (758, 214))

    p.text(20, 396, "A step", size=15, bold=True)
    stages = [
        ("barrier", 70, GREY), ("load state", 110, GREEN), ("products with U on", 240, ORANGE),
        ("+ pre_t, + skip", 140, BLUE), ("ReLU, tanh", 120, BLUE), ("store state", 180, GREEN),
    ]  # fmt: skip
    x = 20.0
    for name, width, fill in stages:
        p.box(x, 412, width, 46, fill, *((name, "tensor cores or FMA") if "products" in name else (name,)))
        x += width
    p.text(20, 484, "behind the products:")
    p.box(200, 468, 240, 46, WHITE, "write out of step t - 1,", f"ask for pre of step t + {k.forward_slots}")
    p.text(470, 484, "behind the store:")
    p.box(620, 468, 260, 46, WHITE, "read pre of step t + 1 from the ring")
    p.box(
        20, 536, 860, 56, GREY,
        "One barrier a step: the rounded state goes to the buffer that the step before did not read, so a warp that is",
        "a step ahead overwrites nothing. Blocks never meet: others have other sequences or other recurrences.",
    )  # fmt: skip
    return p.done()


PICTURES = {"cpu-sweep.svg": cpu_sweep, "block-step.svg": block_step}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw())
