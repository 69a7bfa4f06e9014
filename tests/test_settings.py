"""Environment variables: what each accepts at import, and that docs/environment.md has all of them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from fused_rin import cpu, library, settings

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "environment.md"
BUILD_OPTIONS = {"FUSED_RIN_NVCC"}  # what setup.py hands to CMake and nobody else sets


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([*warm.PYTHON, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("FUSED_RIN_BACKEND", settings.BACKENDS),
        ("FUSED_RIN_CPU_ISA", tuple(cpu.instruction_sets())),
        ("FUSED_RIN_TRITON_FP32", ("tf32", "tf32x3", "ieee")),
    ],
)
def test_a_value_that_means_nothing_ends_the_import(name, accepted):
    done = run("import fused_rin", **{name: "Abacus"})
    expected = f"ValueError: {name} must be one of {', '.join(map(repr, accepted))}, got 'Abacus'"
    assert done.stderr.splitlines()[-1] == expected


def test_values_that_are_accepted_are_taken():
    code = (
        "import fused_rin; from fused_rin.triton_kernels.device import fp32_precision;"
        "print(fused_rin.explain((4, 1, 64)), fp32_precision())"
    )
    worst = cpu.instruction_sets()[-1]
    done = run(code, FUSED_RIN_BACKEND="cpu", FUSED_RIN_CPU_ISA=worst, FUSED_RIN_TRITON_FP32="ieee")
    assert done.stdout.startswith(f"cpu: {worst}, "), done.stderr
    assert "asked for by name" in done.stdout
    assert done.stdout.split()[-1] == "ieee"
    done = run(code, FUSED_RIN_BACKEND="", FUSED_RIN_CPU_ISA="", FUSED_RIN_TRITON_FP32="")  # as if not set
    assert done.stdout.startswith(f"cpu: {cpu.instruction_sets()[0]}, "), done.stderr
    assert "first choice" in done.stdout
    assert done.stdout.split()[-1] == "tf32x3"


@pytest.mark.skipif(library._why_not("cpu") is not None, reason="there is no C++ library of the operators here")
def test_the_operators_without_python_name_the_variable_too():
    code = (
        f"import torch; torch.ops.load_library({library.operator_library()!r});"
        "torch.ops.fused_rin.sweep_forward(torch.zeros(2, 1, 1, 3), torch.zeros(1, 3, 3), None, None, None, None,"
        "1.0, 'relu', 0, 'cpu')"
    )
    done = run(code, FUSED_RIN_CPU_ISA="sse9")
    assert "FUSED_RIN_CPU_ISA: CPU instruction set 'sse9' is not available here; expected one of: " in done.stderr
    assert run(code, FUSED_RIN_CPU_ISA=cpu.instruction_sets()[-1]).returncode == 0


def of_python(source: str) -> set[str]:
    """Variables that a Python file reads: os.environ[...], .get(...) of an environment, getenv, settings.choice."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            reads = name.endswith(("environ.get", "environment.get", "env.get", "getenv", "choice"))
            key = node.args[0] if reads and node.args else None
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            reads = ast.unparse(node.value).endswith(("environ", "environment", "env"))
            key = node.slice if reads else None
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            reads = ast.unparse(node.comparators[0]).endswith(("environ", "environment", "env"))
            key = node.left if reads else None
        else:
            continue
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and key.value.isupper():
            found.add(key.value)
    return found


def in_the_sources() -> set[str]:
    """Every variable that a file of the project reads, tests' own apart."""
    found = set()
    folders = ("python", "triton_kernels", "tools", "benchmarks", "examples")
    files = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    for path in files:
        source = path.read_text()
        found |= of_python(source)
        # Those of a loop over names, as of tools/cuda_toolkit.py; and whatever has the project's own prefix.
        found |= set(re.findall(r'"(CUDA_HOME|CUDA_PATH)"', source))
        found |= set(re.findall(r'["\'](FUSED_RIN_[A-Z0-9_]+)["\']', source))
    for path in (ROOT / "csrc").rglob("*.*"):
        found |= set(re.findall(r'getenv\("(\w+)"\)', path.read_text()))
    for path in (ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir()):
        text = path.read_text()
        found |= set(re.findall(r"ENV\{?\s*(\w+)", text))
        found |= set(re.findall(r"^\s*option\((\w+)", text, re.MULTILINE))
        found |= set(re.findall(r"^\s*set\((FUSED_RIN_\w+) \S* CACHE", text, re.MULTILINE))
    make = re.sub(r"(^|\s)#.*", "", (ROOT / "Makefile").read_text())
    found |= set(re.findall(r"^(\w+) \?=", make, re.MULTILINE))
    assigned = set(re.findall(r"^(\w+) :?=", make, re.MULTILINE))
    found |= set(re.findall(r"(?<!\$)\$\((?:if \$\(|or \$\()?([A-Z_]+)\b", make)) - assigned
    for path in (ROOT / "tests").rglob("conftest.py"):
        found |= of_python(path.read_text())
    return found - BUILD_OPTIONS


def on_the_page() -> list[str]:
    """The first column of every table."""
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row)]


def test_every_variable_is_on_the_page_and_no_other():
    names = on_the_page()
    assert len(names) == len(set(names)), "a variable stands twice"
    assert in_the_sources() == set(names)


def test_what_counts_as_reading_a_variable():
    source = """
os.environ.get("A"); os.environ["B"]; "C" in env; os.getenv("D"); env.get("E", "x"); settings.choice("F", ())
os.environ["WRITTEN"] = "1"; dictionary["NOT"]; monkeypatch.setenv("NOR", "x"); os.environ.get("lower")
"""
    assert of_python(source) == set("ABCDEF")


def test_the_page_has_what_is_accepted():
    """As the error messages have it."""
    text = PAGE.read_text()
    for values in (settings.BACKENDS, ("tf32", "tf32x3", "ieee"), ("auto", "on", "off")):
        assert ", ".join(f"`{value}`" for value in values) in text
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        for name in cpu.instruction_sets():
            assert f"`{name}`" in text
