"""What an installation brings, as type checkers and the file system see it."""

from __future__ import annotations

import sys
from pathlib import Path

import fused_rin
import pytest


def test_a_type_checker_finds_the_package():
    """mypy and pyright follow paths, not import hooks; an editable installation must be a path."""
    package = Path(fused_rin.__file__).parent
    assert str(package.parent) in sys.path
    for name in ("py.typed", "_native.pyi", "triton_kernels/plan.py"):
        assert (package / name).is_file(), name


def test_the_triton_kernels_are_one_package():
    """The folder at the top level and the one in the package are the same files, under one name."""
    import fused_rin.triton_kernels as kernels

    assert kernels.__name__ == "fused_rin.triton_kernels"
    assert Path(kernels.__file__).parent == Path(fused_rin.__file__).parent / "triton_kernels"


def test_the_picture_of_the_modules_is_of_these_modules():
    """docs/architecture.svg is what `python -m tools.draw_modules` draws; it refuses circles."""
    from tools import draw_modules

    assert draw_modules.PICTURE.read_text() == draw_modules.draw(draw_modules.imports())
    with pytest.raises(SystemExit, match="a circle of imports: b -> c -> b"):
        draw_modules.levels({"a": {"b"}, "b": {"c"}, "c": {"b"}})
