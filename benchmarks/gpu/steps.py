"""Times a step of every CUDA kernel alone: (t(2048) - t(512)) / 1536, so that what a launch costs drops out.

    python -m benchmarks.gpu.steps OUT.json [--only SUBSTRING] [--launches N]

Each kernel runs its own tile (hidden x rows, no padding) in one block: with ReLU, with tanh, and with lengths, which
takes the general loop; units with factors of their own have one loop for all. Then with ReLU in a block on every SM.
Cycles are the time times the clock that the card held, which a kernel that counts cycles measures before and after.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from fused_rin import cuda_plan
from fused_rin.problem import ACTIVATIONS, FORMS

from benchmarks.gpu.measure import elapsed_us

SHORT, LONG = 512, 2048
DTYPES = {number: dtype for dtype, number in cuda_plan.DTYPES.items()}
MATH = {number: math for math, number in cuda_plan.MATH.items()}
SPIN = 4_000_000  # cycles, about 2 ms


def clock() -> float:
    """The SM clock in Hz, now. On an H100 it came out up to 5% above the card's highest."""
    return SPIN / statistics.median(elapsed_us(lambda: torch.cuda._sleep(SPIN)) for _ in range(3)) * 1e6


def warm_up(seconds: float = 0.5) -> None:
    end = time.monotonic() + seconds
    square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    while time.monotonic() < end:
        square @ square
        torch.cuda.synchronize()


class Step:
    """One kernel on `blocks` tiles of its own size; `run(steps)` launches it once."""

    def __init__(self, instance: tuple[int, ...], blocks: int, activation: str = "relu", lengths: bool = False) -> None:
        dtype, math, self.backward, self.units, self.hidden, self.rows, ctas, _, _, workspace_bytes = instance
        options = {"device": "cuda", "dtype": DTYPES[dtype]}
        self.workspace = torch.empty(blocks * workspace_bytes, dtype=torch.uint8, device="cuda")
        workspace = self.workspace.data_ptr(), self.workspace.numel()
        self.kernel, self.dtype, self.batch = (math, self.hidden, self.rows, ctas, 0, 0, *workspace), dtype, self.rows
        self.batch *= blocks
        torch.manual_seed(0)
        size = (LONG, self.batch, self.hidden)
        self.weight = torch.randn(self.hidden, self.hidden, **options) * 0.01 / self.hidden**0.5
        self.into, self.out = torch.randn(size, **options), torch.empty(size, **options)
        self.saved = torch.rand(size, **options) - 0.5 if self.backward else None
        self.last = torch.empty(self.batch, self.hidden, **options)
        self.activation = ACTIVATIONS[activation]
        self.lengths = {n: torch.full((self.batch,), n, device="cuda") for n in (SHORT, LONG)} if lengths else {}
        self.factors = torch.full((2, self.hidden), 0.5, device="cuda")
        self.values = torch.empty(size, **options) if self.units else None

    def run(self, steps: int) -> None:
        from fused_rin import _cuda

        saved = self.saved.data_ptr() if self.saved is not None else 0
        problem = (
            (steps, self.batch, 1, self.hidden),
            (self.dtype, self.activation, bool(self.backward), 1.0, 0),
            (self.lengths[steps].data_ptr() if self.lengths else 0, 0, 0),
            (self.weight.data_ptr(), self.into.data_ptr(), saved, 0, self.out.data_ptr(), self.last.data_ptr()),
        )  # fmt: skip
        where = self.kernel, torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
        if self.values is None:
            _cuda.sweep_block(*problem, *where)
        else:  # a leaky rate network
            skip, gain = self.factors
            units = FORMS["outside"], skip.data_ptr(), gain.data_ptr(), 0, 0, self.values.data_ptr()
            _cuda.sweep_block_of_units(*problem, units, *where)

    def seconds(self, launches: int) -> float:
        self.run(LONG)
        torch.cuda.synchronize()
        pairs = [(elapsed_us(lambda: self.run(LONG)), elapsed_us(lambda: self.run(SHORT))) for _ in range(launches)]
        return statistics.median(long - short for long, short in pairs) / (LONG - SHORT) * 1e-6


def name_of(instance: tuple[int, ...]) -> str:
    dtype, math, backward, units, hidden, rows, ctas, _, _, workspace_bytes = instance
    kind = str(DTYPES[dtype]).removeprefix("torch.")
    of = "units-" if units else "grid-" if workspace_bytes else "cluster-" if ctas > 1 else ""
    size = f"{hidden}x{rows}" + (f"/{ctas}" if workspace_bytes else "")
    return f"{kind} {of}{MATH[math]} {size} {'backward' if backward else 'forward'}"


def places(ctas: int, sms: int) -> int:
    """How many tiles run at a time, one to an SM."""
    every = (*cuda_plan.KERNELS, *cuda_plan.CLUSTER_KERNELS, *cuda_plan.GRID_KERNELS)
    return next(kernel for kernel in every if kernel.ctas == ctas).places(sms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--launches", type=int, default=7)
    arguments = parser.parse_args()
    from fused_rin import _cuda

    warm_up()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rows = []
    for instance in _cuda.instances():
        name = name_of(instance)
        if arguments.only not in name:
            continue
        row: dict[str, object] = {"kernel": name, "rows": instance[5], "ctas": instance[6], "threads": instance[7]}
        for label, blocks, activation, lengths in (
            ("alone", 1, "relu", False),
            ("tanh", 1, "tanh", False),
            ("general", 1, "relu", True),
            ("full", places(instance[6], sms), "relu", False),
        ):
            if instance[3] and label in ("tanh", "general"):  # units have one loop
                continue
            step = Step(instance, blocks, activation, lengths)
            before = clock()
            seconds = step.seconds(arguments.launches)
            hz = (before + clock()) / 2
            row[label] = {"ns": seconds * 1e9, "cycles": seconds * hz, "ghz": hz / 1e9}
            del step
        rows.append(row)
        kinds = " ".join(f"{kind} {value['ns']:6.1f}" for kind, value in row.items() if isinstance(value, dict))
        print(f"{name:38} ns: {kinds}", flush=True)
        arguments.out.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
