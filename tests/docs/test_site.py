"""The documentation as a site: it builds without a warning, links and anchors included, and the reference is whole."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import fused_rin
import pytest
from mkdocstrings import Inventory

from tools import draw_kernels, mkdocs_hooks

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "fused_rin"
pytestmark = pytest.mark.xdist_group("site")

# Pages that tell of the inside. What the others name of the package is there for its users.
INNER = {"architecture.md", "kernels.md", "packaging.md"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_in_the_site(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    pages |= {Path("index.html"), Path("CONTRIBUTING.html"), Path("benchmarks/NOTES.html")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}


def test_a_link_out_of_docs_leads_to_the_file_in_the_site(site):
    assert 'href="benchmarks/results/cpu.html"' in (site / "migration.html").read_text()
    assert 'href="../reproduction.html"' in (site / "benchmarks" / "NOTES-recipe.html").read_text()
    assert (site / "benchmarks" / "results" / "cpu.json").is_file()  # linked by the README
    assert 'src="architecture.svg"' in (site / "architecture.html").read_text()


def test_a_link_to_nothing_is_not_rewritten():
    assert mkdocs_hooks.linked("docs/migration.md", "../benchmarks/results/cpu.md") == "benchmarks/results/cpu.md"
    assert mkdocs_hooks.linked("docs/migration.md", "../benchmarks/results/no.md") is None
    assert mkdocs_hooks.linked("README.md", "https://example.org/docs/migration.md") is None


def test_lists_are_lists(site):
    """Where the repository is read a list may follow a paragraph; the site wants an empty line between them."""
    broken = [
        f"{page.relative_to(site)}: {text}"
        for page in site.rglob("*.html")
        for text in re.findall(r"<p>[^<]*\n(?:[-*+]|\d+\.) [^<\n]*", page.read_text())
    ]
    assert broken == []


def public_names(module: ModuleType) -> set[str]:
    """What a module defines for others."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    return {f"{module.__name__}.{name}" for name in names}


def named_modules() -> set[str]:
    """Modules of the package that pages for users name, as `fused_rin.diagnostics`."""
    found = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if page.name in INNER:
            continue
        text = re.sub(r"^.*Error: .*$", "", page.read_text(), flags=re.MULTILINE)  # where an error comes from
        names = re.findall(r"fused_rin\.(\w+)", text)
        names += re.findall(r"\w+", " ".join(re.findall(r"from fused_rin import (.*)", text)))
        found |= {name for name in names if (PACKAGE / f"{name}.py").is_file()}
    return found


def test_the_reference_has_every_public_name(site):
    with (site / "objects.inv").open("rb") as file:
        documented = set(Inventory.parse_sphinx(file))
    modules = named_modules()
    assert {"diagnostics", "identity_prior", "onnx"} <= modules
    wanted = public_names(fused_rin)
    for name in modules:
        wanted |= public_names(__import__(f"fused_rin.{name}", fromlist=["*"]))
    for owner in (fused_rin.RIN, fused_rin.RINCell):
        wanted |= {f"fused_rin.{owner.__name__}.{method}" for method in ("forward", "from_rnn", "to_rnn")}
    assert wanted - documented == set()


def test_the_reference_has_nothing_private(site):
    with (site / "objects.inv").open("rb") as file:
        documented = set(Inventory.parse_sphinx(file))
    assert [name for name in documented if any(part.startswith("_") for part in name.split("."))] == []


@pytest.mark.parametrize("name", draw_kernels.PICTURES)
def test_the_pictures_of_the_kernels_are_up_to_date(name):
    """`python -m tools.draw_kernels` draws them."""
    assert (draw_kernels.FOLDER / name).read_text() == draw_kernels.PICTURES[name]()
