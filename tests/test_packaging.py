"""What an installation brings, as type checkers and the file system see it."""

from __future__ import annotations

import sys
from pathlib import Path

import fused_rin


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
