"""docs/comparison.md: its figures are those of the results, its links lead somewhere, every row has its source."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/comparison.md").read_text()
TEXT = " ".join(PAGE.split())
H100 = (ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3/ring/table.md").read_text()


def cells(kind: str, units: int, batch: int) -> list[str]:
    """A forward row of the GPU's table: type, D, B, and cuda, triton, nn.RNN, ... in us, as a graph in brackets."""
    forward = H100.split("## forward")[1].split("\n## ")[0]
    (row,) = re.findall(rf"^\| {kind} \| {units} \| {batch} \|.*$", forward, re.MULTILINE)
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_figures_of_the_gpu():
    large = cells("bfloat16", 2048, 64)
    assert f"a step takes {large[4].split()[0]} us where nn.RNN takes {large[5].split()[0]}." in TEXT
    ours, cudnn = (float(re.findall(r"\((.*)\)", cells("bfloat16", 128, 1)[column])[0]) for column in (3, 5))
    assert f"takes {ours + 1e-9:.2f} us on an H100, cuDNN's {cudnn:.1f};" in TEXT
    slower, points = re.findall(r"Slower than torch.nn.RNN at (\d+) of (\d+) points", H100)[0]
    assert (slower, points) == ("8", "234")
    assert "Of 234 points on an H100 eight are slower than nn.RNN, seven of them in float32" in TEXT
    rows = [row.split("|") for row in H100.splitlines() if "| **" in row]
    assert [row[1].strip() for row in rows].count("float32") == 7
    assert {row[2].strip() for row in rows if "float32" in row[1]} == {"64", "128"}


def test_figures_of_the_cpu():
    table = (ROOT / "benchmarks/results/cpu.md").read_text()
    forward = table[table.index("forward: us a step") : table.index("training: us a step")]
    lines = re.findall(r"^ *1, 512, .*$", forward, re.MULTILINE)
    ratios = [float(ratio) for line in lines for ratio in re.findall(r"\( *([\d.]+)x\)", line)]
    assert len(ratios) == 12
    assert f"a step takes {min(ratios):.1f} to {max(ratios):.0f} times less than nn.RNN's" in TEXT


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target


def test_every_row_has_its_source():
    tables = [re.findall(r"^\| (?!\|)([^|]+?) \|", part, re.MULTILINE) for part in PAGE.split("\n## ")[1:]]
    first, second, sources = (names for names in tables if names)
    assert first == second
    assert len(first) == 9
    covered = [name.replace("**", "") for name in first if "fused-rin" not in name]
    assert [name.split(":")[0].split(",")[0].split(" `")[0] for name in covered] == [n.split(",")[0] for n in sources]
