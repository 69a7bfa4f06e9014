"""Draws docs/architecture.svg: the modules of fused_rin by what they import, lowest at the bottom.

    python -m tools.draw_modules [FILE]

An arrow that follows from others is left out. Raises SystemExit where modules import each other in a circle.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PICTURE = ROOT / "python" / "fused_rin", ROOT / "docs" / "architecture.svg"
# What lies below the Python modules, as they reach it; a name of several words is a folder.
NATIVE = {"cpu": "csrc/cpu", "cuda": "csrc/cuda", "library": "csrc/operators", "triton_kernels": "Triton"}
WIDTH, HEIGHT, GAP_X, GAP_Y = 118, 30, 14, 46


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Which modules of the package each of them imports, anywhere in its text."""
    files = {file.stem: file for file in package.glob("*.py") if not file.stem.startswith("__")}
    files["triton_kernels"] = package / "triton_kernels" / "__init__.py"
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                parts = node.module.split(".")
                if parts[0] == "fused_rin":
                    found[name] |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # for importlib, when it is wanted
                found[name] |= {node.value.removeprefix("fused_rin.")} if node.value.startswith("fused_rin.") else set()
        found[name] = (found[name] & set(files)) - {name}
    return found


def levels(found: Mapping[str, set[str]]) -> dict[str, int]:
    """One above the highest of what a module imports."""
    known: dict[str, int] = {}

    def level(name: str, path: tuple[str, ...]) -> int:
        if name in path:
            raise SystemExit(f"a circle of imports: {' -> '.join([*path[path.index(name) :], name])}")
        if name not in known:
            known[name] = 1 + max((level(other, (*path, name)) for other in found[name]), default=0)
        return known[name]

    for name in found:
        level(name, ())
    return known


def needed(found: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """The arrows that do not follow from others."""

    def below(name: str) -> set[str]:
        return {other for first in found[name] for other in {first, *below(first)}}

    return {(a, b) for a, names in found.items() for b in names if not any(b in below(c) for c in names - {b})}


def draw(found: Mapping[str, set[str]]) -> str:
    """The picture as SVG text."""
    level = levels(found)
    # In an order of their own: a sum over a set rounds differently from run to run, and equal places change sides.
    arrows = sorted(needed(found) | {(name, native) for name, native in NATIVE.items() if name in found})
    rows: dict[int, list[str]] = {0: list(NATIVE.values())}
    for name in sorted(found):
        rows.setdefault(level[name], []).append(name)
    columns = max(map(len, rows.values()))
    width, height = columns * (WIDTH + GAP_X) + GAP_X, len(rows) * (HEIGHT + GAP_Y)

    def spread(count: int, index: int) -> float:
        return (index + 0.5) * width / count - WIDTH / 2

    place = {name: spread(len(row), i) for row in rows.values() for i, name in enumerate(row)}

    def wish(name: str) -> float:
        near = [place[b if a == name else a] for a, b in arrows if name in (a, b)]
        return sum(near) / len(near) if near else place[name]

    for _ in range(8):  # each towards the middle of what it is connected to
        for row in rows.values():
            row.sort(key=lambda name: (wish(name), name))
            place.update({name: spread(len(row), i) for i, name in enumerate(row)})
    top = {name: height - (number + 1) * (HEIGHT + GAP_Y) + GAP_Y / 2 for number, row in rows.items() for name in row}

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#789"/></marker>',
    ]
    for a, b in arrows:
        x1, y1, x2, y2 = place[a] + WIDTH / 2, top[a] + HEIGHT, place[b] + WIDTH / 2, top[b]
        middle = (y1 + y2) / 2
        parts.append(
            f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}" '
            'fill="none" stroke="#789" marker-end="url(#head)"/>'
        )
    for name in place:
        fill = "#fdebd0" if name in NATIVE.values() else "#e8f0fb"
        parts.append(
            f'<rect x="{place[name]:.0f}" y="{top[name]:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
            f'fill="{fill}" stroke="#567"/><text x="{place[name] + WIDTH / 2:.0f}" y="{top[name] + 20:.0f}" '
            f'text-anchor="middle" font-size="14">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE).write_text(draw(imports()))
