"""The `grid` kernels whose CTAs take minutes on fibres, up to 32,768 threads side by side: `make cuda-large`."""

from __future__ import annotations

import pytest
from fused_rin.cuda_plan import GRID_KERNELS

from tests.cuda_on_cpu.test_shared_tiles import check_compiled, name


@pytest.mark.parametrize("kernel", [k for k in GRID_KERNELS if k.hidden > 512], ids=name)
def test_every_compiled_kernel(native, force, kernel):
    check_compiled(native, force, kernel)
