"""Calls the backend as on an H200 that is not here: everything up to the launch. Run as a script, prints JSON.

Triton's driver is replaced by one that only knows the target, and its JIT is told to warm up: to look for the kernel,
compile it if need be and not launch it. The launcher, Triton's specialisation of arguments and its compile options are
the real ones.
"""

from __future__ import annotations

import json
import os
import tempfile
from types import SimpleNamespace


def main() -> None:
    import torch
    import triton
    from fused_rin import triton_kernels
    from fused_rin.problem import Rows, Rule
    from fused_rin.triton_kernels import Device, launch
    from fused_rin.triton_kernels.sweep import sweep
    from triton.backends.compiler import GPUTarget

    from tests.conftest import make_case

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(driver)
    run = sweep.run
    launches = []

    def warm_up(*args: object, grid: tuple[int, ...], warmup: bool, **options: object) -> None:
        run(*args, grid=grid, warmup=True, **options)
        launches.append(grid)

    sweep.run = warm_up
    h200 = Device("H200", (9, 0), 132, 227 * 1024)
    launch.device_record = lambda index: h200

    def compiled() -> int:
        return len(sweep.device_caches[0][0])

    def cpu_seconds() -> float:
        """Ours and the assembler's, so that a busy machine does not fail the test."""
        return sum(os.times()[:4])

    def call(steps: int, batch: int, hidden: int, dtype: torch.dtype, lengths: bool = True) -> None:
        pre, weight = torch.zeros(steps, batch, 2, hidden, dtype=dtype), torch.zeros(2, hidden, hidden, dtype=dtype)
        o_lengths = torch.full((batch,), steps) if lengths else None
        rows, rule = Rows(o_lengths), Rule(1.0, "relu", 1)
        out, h_n = triton_kernels.forward(pre, weight, None, rows, rule)
        triton_kernels.backward(out, h_n, weight, out, rows, rule)

    found = {}
    for hidden, dtype in ((48, torch.float32), (100, torch.bfloat16), (1024, torch.bfloat16)):
        start = cpu_seconds()
        before = compiled()
        call(3, 2, hidden, dtype)
        elapsed = cpu_seconds() - start
        first = compiled() - before
        for steps, batch in ((1, 1), (2, 16), (16, 3), (17, 64), (70_000, 1), (5, 129)):
            call(steps, batch, hidden, dtype)
        later = compiled() - before - first
        found[f"{hidden} {dtype}"] = {"first": first, "later": later, "seconds": elapsed / first}
    # What an interpreted test runs has to pass Triton's type checks too: each kind of input, present and absent.
    for options in (
        {"activation": "none", "skip": 0.0, "resets": True, "hidden": 1},
        {"activation": "tanh", "layout": "packed", "resets": True, "h0": False},
        {"activation": "relu", "layout": "lengths", "dtype": torch.float16, "hidden": 600},
        {"activation": "tanh", "resets": True, "hidden": 1500},
    ):
        case = make_case(3, 2, options.pop("hidden", 16), 2, num_reversed=1, **options)
        out, h_n = triton_kernels.forward(*case.arguments)
        for grads in ((out, h_n), (None, h_n), (out, None)):
            triton_kernels.backward(*grads, case.weight, out, case.rows, case.rule)
    kinds = compiled()
    launches.clear()
    call(2, 16 * 9, 1024, torch.bfloat16, lengths=False)
    print(json.dumps({"kernels": found, "kinds": kinds, "waves": launches}))


if __name__ == "__main__":
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    main()
