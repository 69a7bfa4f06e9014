"""Which compiled CUDA kernel runs a problem: plain Python over a plain `Device` record, so it is tested without a GPU.

In the `block` plan one CTA holds one recurrence's whole matrix, in registers and, where they do not suffice, in shared
memory, and sweeps a tile of the batch. In the `cluster` plan (sm_90+) several CTAs share a tile, each with the matrix
of its outputs, and send each other their part of the state in every step. In the `grid` plan they lie anywhere on the
device and hand it over through its L2. The planner estimates the cycles of a step for every kernel that fits and takes
the fastest. Its constants come from public figures and from counting instructions
(benchmarks/NOTES-cuda.md); they order the kernels of one device, and are no promise of a speed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from fused_rin.device import Device, NoPlan

# (hidden, batch rows, warps, parts of the matrix in registers, steps in the ring forward and backward); a mirror of
# csrc/cuda/block_configs.h, checked by tests/cuda_on_cpu against the compiled table. A part is 32 bytes of k, for "fma"
# 16 elements.
_TABLES: dict[str, tuple[tuple[int, int, int, int, int, int], ...]] = {
    "mma": (
        (64, 8, 4, 4, 8, 8), (64, 16, 4, 4, 8, 6),
        (128, 8, 4, 8, 8, 8), (128, 16, 4, 8, 6, 6),
        (192, 8, 4, 9, 6, 6), (192, 16, 12, 12, 4, 4),
        (256, 8, 8, 16, 6, 6), (256, 16, 8, 15, 4, 4),
        (384, 8, 8, 14, 2, 2),
    ),
    "tf32": (
        (64, 8, 4, 8, 8, 8),
        (128, 8, 8, 16, 6, 6),
        (192, 8, 12, 18, 4, 4),
        (256, 8, 8, 19, 2, 2),
    ),
    "tf32x3": (
        (64, 16, 4, 8, 4, 4),
        (192, 8, 12, 13, 4, 4),
    ),
    "fma": (
        (64, 1, 4, 4, 8, 8), (64, 2, 4, 4, 8, 8), (64, 4, 4, 4, 8, 8),
        (128, 1, 4, 8, 8, 8), (128, 2, 4, 8, 8, 8), (128, 4, 4, 8, 8, 8),
        (192, 1, 12, 12, 8, 8), (192, 2, 12, 12, 8, 8),
        (256, 1, 8, 8, 8, 8), (256, 2, 8, 8, 6, 6),
    ),
}  # fmt: skip
# (hidden, batch rows) of those that are compiled for units with factors of their own too.
_UNIT_TABLES: dict[str, tuple[tuple[int, int], ...]] = {
    "mma": ((64, 8), (128, 8), (256, 8), (384, 8)),
    "fma": ((64, 1), (64, 2), (128, 1), (128, 2), (192, 1), (192, 2), (256, 1), (256, 2)),
}

# The same, then the CTAs of a cluster and the parts of k; a mirror of csrc/cuda/cluster_configs.h.
_CLUSTER_TABLES: dict[str, tuple[tuple[int, int, int, int, int, int, int, int], ...]] = {
    "mma": (
        (512, 8, 4, 32, 8, 8, 8, 1),
        (1024, 8, 8, 16, 8, 8, 16, 4),
    ),
    "fma": ((512, 1, 8, 16, 8, 8, 8, 2), (512, 2, 8, 16, 8, 8, 8, 2)),
}  # fmt: skip

# The same of grids; a mirror of csrc/cuda/grid_configs.h.
_GRID_TABLES: dict[str, tuple[tuple[int, int, int, int, int, int, int, int], ...]] = {
    "mma": (
        (512, 8, 8, 4, 8, 8, 32, 8),
        (1024, 8, 8, 8, 8, 8, 64, 8),
        (2048, 8, 8, 12, 8, 8, 64, 8), (2048, 8, 8, 16, 8, 8, 128, 8),
    ),
    "fma": (
        (512, 1, 8, 4, 8, 8, 32, 8), (512, 4, 8, 4, 8, 8, 32, 8),
        (1024, 1, 8, 8, 8, 8, 64, 8), (1024, 4, 8, 8, 8, 8, 64, 8),
        (2048, 1, 8, 16, 8, 8, 128, 8), (2048, 4, 8, 15, 8, 8, 128, 8),
    ),
}  # fmt: skip

# Cycles that one mma.sync (m16n8k16 of 16-bit types, m16n8k8 of tf32) occupies one of an SM's four tensor cores, by
# compute capability. sm_80: 1,024 FMA per clock and SM. sm_90: measured on an H100, two thirds of 2,048.
# GeForce parts (8.6, 8.9, 12.0) run float32 accumulation at 256 FMA per clock and SM.
_MMA_CYCLES = {(8, 0): 8.0, (8, 6): 32.0, (8, 7): 16.0, (8, 9): 32.0, (9, 0): 6.2, (10, 0): 8.0, (12, 0): 32.0}
_STEP_LATENCY = 190.0  # cycles: barrier, first load of the state, the mma chain's tail, epilogue, store, all traffic
# Of clusters, measured on an H100 (results/nvidia-h100-80gb-hbm3/exchange-laboratory.txt): cycles until stores to the
# peers have arrived and are seen, and the bytes that arrive at an SM in a cycle. 8 CTAs with 128 and 1,024 bytes each:
# 500 and 874 cycles, 486 and 878 by these; 16: 569 and 1,444, 550 and 1,390.
_HOP, _ARRIVING_BYTES = 430.0, 16.0
# Through L2: where 1,024 threads polled, 128 blocks with 256 bytes each took 2,202 cycles, 2,190 by these; 8 blocks
# with 32 to 512 bytes 627 to 848 (256 threads).
_L2_HOP, _POLLED_BYTES = 700.0, 22.0
# By which the estimates of blocks that share a tile are weighed against those of blocks on their own: they stand on the
# constants above, and no such kernel has run on a GPU yet.
_WEIGHT_OF_SHARING = 1.25

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
MATH = {"mma": 0, "tf32": 1, "tf32x3": 2, "fma": 3}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel (both directions)."""

    math: str  # "mma" for 16-bit types; "fma", "tf32x3", "tf32" for float32
    hidden: int  # D is padded to it
    rows: int  # batch rows of a tile
    warps: int
    register_parts: int
    forward_slots: int
    backward_slots: int
    ctas: int = 1  # that share a tile: a cluster, or a grid
    parts: int = 1  # of k, each with warps of its own
    units: bool = False  # with factors of their own
    grid: bool = False

    @property
    def element_bytes(self) -> int:
        return 2 if self.math == "mma" else 4

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def outputs(self) -> int:
        """Of a CTA."""
        return self.hidden // self.ctas

    @property
    def matrix_shared_bytes(self) -> int:
        """What of a CTA's matrix is not in registers."""
        k = self.hidden // self.parts
        steps = k // 16 if self.math == "fma" else k * self.element_bytes // 32
        per_thread = self.outputs * self.parts // ((8 if self.math == "fma" else 16) * self.warps)
        return (steps - self.register_parts) * per_thread * 16 * self.threads

    def _rows_bytes(self, width: int) -> int:
        """Of the rows of a tile as they lie in shared memory."""
        return self.rows * (width * self.element_bytes + 64) + self.rows // 2 * 32

    def shared_bytes(self, *, backward: bool) -> int:
        """Of a block: the state twice, what of the matrix is there, the ring, what is staged, the units' factors, sums
        of the parts of k, mbarriers.
        """
        state, tile = self._rows_bytes(self.hidden), self._rows_bytes(self.outputs)
        slots = self.backward_slots if backward else self.forward_slots
        schedule = 4 * slots * 8 + -(-2 * slots * self.rows * 4 // 16) * 16  # schedule.cuh
        tiles, factors = 1 + (backward or self.units), 8 * self.hidden * self.units
        lanes = 256 * self.warps // self.parts if self.math == "fma" else 0
        given = (self.parts - 1) * max(self.outputs * self.rows * 4, lanes)
        ring, exchange = slots * tiles * tile, 16 * (self.ctas > 1 and not self.grid)
        return self.matrix_shared_bytes + 2 * state + ring + schedule + factors + given + exchange

    @property
    def most_shared_bytes(self) -> int:
        """Of either direction: a plan is for both."""
        return max(self.shared_bytes(backward=False), self.shared_bytes(backward=True))

    @property
    def workspace_bytes(self) -> int:
        """Of a tile in device memory: two buffers of the packets of all blocks' warps that own outputs, twice each."""
        if not self.grid:
            return 0
        sources = self.ctas * (self.warps // self.parts)
        words = self.rows * self.hidden * self.element_bytes // sources // 4
        return 2 * 2 * sources * -(-words // 3) * 16

    def work_cycles(self, capability: tuple[int, int]) -> float:
        """Cycles of one step's product that no overlap hides: tensor cores or FMA pipe, or shared memory if slower."""
        if self.math == "fma":
            lanes = 64 if capability == (8, 0) else 128
            arithmetic = self.hidden * self.outputs * self.rows / lanes
            readers = self.rows  # four lanes share an output, so one 64-byte line a row and chunk
            state = float(self.warps * (self.hidden // 16) * readers) / self.parts
        else:
            cycles = _MMA_CYCLES.get(capability) or _MMA_CYCLES.get((capability[0], 0), 32.0)
            passes = 3 if self.math == "tf32x3" else 1
            k_steps = self.hidden * self.element_bytes // 32
            products = self.outputs // 16 * k_steps * self.rows / 8 * passes
            arithmetic = products * cycles / 4
            if self.math == "tf32x3":  # splitting the operands takes longer: 4.2 to 4.8 cycles a product on an H100
                arithmetic = max(arithmetic, products * 4.5)
            state = self.warps * self.rows * self.hidden * self.element_bytes / 128 / self.parts
        return max(arithmetic, state + self.matrix_shared_bytes / 128)

    def arriving_cycles(self, rows: int) -> float:
        """Of a step of so many batch rows, in which an SM takes in what the peers send."""
        rate = _POLLED_BYTES if self.grid else _ARRIVING_BYTES
        return rows * (self.hidden - self.outputs) * self.element_bytes / rate

    def exchange_cycles(self, rows: int) -> float:
        """Until all of that is there."""
        hop = _L2_HOP if self.grid else _HOP
        return 0.0 if self.ctas == 1 else hop + self.arriving_cycles(rows)

    def places(self, sms: int) -> int:
        """How many tiles run at a time, one to an SM: of an H100's 132 SMs 30 clusters of 4, 15 of 8, 7 of 16
        (measured), since a cluster lies within a GPC.
        """
        return sms // self.ctas if self.ctas == 1 or self.grid else max(1, 10 * sms // (11 * self.ctas))

    def runs_on(self, device: Device) -> bool:
        """Whether the device has its blocks side by side."""
        return self.ctas <= (device.sms if self.grid else device.max_cluster_size)


KERNELS = tuple(Kernel(math, *columns) for math, table in _TABLES.items() for columns in table)
CLUSTER_KERNELS = tuple(Kernel(math, *columns) for math, table in _CLUSTER_TABLES.items() for columns in table)
GRID_KERNELS = tuple(Kernel(math, *columns, grid=True) for math, table in _GRID_TABLES.items() for columns in table)
UNIT_KERNELS = tuple(replace(k, units=True) for k in KERNELS if (k.hidden, k.rows) in _UNIT_TABLES.get(k.math, ()))


@dataclass(frozen=True)
class SweepPlan:
    """A kernel and how a problem is spread over the device with it."""

    kernel: Kernel
    device: str
    blocks: int
    sms: int
    resident: int  # CTAs that one SM holds at a time
    estimated_cycles: float  # of a step, all waves together
    tile_rows: int = 0  # batch rows of a tile that several CTAs share, where they are fewer than fit; 0: of a block
    workspace_bytes: int = 0  # that a grid needs, for as many tiles as run at a time

    def describe(self) -> str:
        k = self.kernel
        arithmetic = {
            "mma": "tensor cores, float32 sums",
            "tf32": "tensor cores in TF32 (as torch's setting allows)",
            "tf32x3": "tensor cores, three TF32 products for float32 accuracy",
            "fma": "float32 FMA",
        }[k.math]
        where, of_units = "registers", ", units with factors of their own" if k.units else ""
        if k.grid:
            tiles, at_a_time = self.blocks // k.ctas, self.workspace_bytes // k.workspace_bytes
            where = "registers and shared memory" if k.matrix_shared_bytes else "registers"
            return (
                f"grid plan on {self.device}: {tiles} tile(s) of {self.tile_rows} batch row(s), {at_a_time} at a time "
                f"on {k.ctas} of {self.sms} SMs each, {k.threads} threads a CTA, matrix padded to {k.hidden} x "
                f"{k.hidden} spread over their {where}, {arithmetic}, the state handed over through L2 in every step; "
                f"about {self.estimated_cycles:.0f} cycles a step by the model (not a measurement)"
            )
        if k.ctas > 1:
            return (
                f"cluster plan on {self.device}: {self.blocks // k.ctas} cluster(s) of {k.ctas} CTAs of {k.threads} "
                f"threads for {self.sms} SMs, {self.tile_rows} batch row(s) each, matrix padded to {k.hidden} x "
                f"{k.hidden} spread over their registers, {arithmetic}, the state sent to {k.ctas - 1} peers a step; "
                f"about {self.estimated_cycles:.0f} cycles a step by the model (not a measurement)"
            )
        if k.matrix_shared_bytes:
            total = k.hidden**2 * k.element_bytes
            where = f"registers ({100 * (1 - k.matrix_shared_bytes / total):.0f}%) and shared memory"
        return (
            f"block plan on {self.device}: {self.blocks} CTA(s) of {k.threads} threads for {self.sms} SMs, "
            f"{k.rows} batch row(s) each, matrix padded to {k.hidden} x {k.hidden} in {where}, {arithmetic}, "
            f"one barrier a step{of_units}; about {self.estimated_cycles:.0f} cycles a step by the model (not a "
            "measurement)"
        )


def _shared_bytes_of_code(architecture: int) -> int:
    """Shared memory of a block beyond which a kernel compiled for it is empty (kMaxSharedBytes in device.cuh)."""
    return 1024 * (99 if architecture in (86, 89) or architecture >= 120 else 163 if architecture < 90 else 227)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def runnable(device: Device, architectures: list[str], ptx: int, driver: int, runtime: int) -> Device:
    """The device, its blocks with no more shared memory than the code that runs there was compiled for.

    `architectures`: what there is machine code for, such as "80" or "90a": it runs on its major version from its minor
    one on, and with a letter on that device alone. `ptx`: compiled by the driver for any later device, if the driver is
    as new as the compiler. `driver`, `runtime`: CUDA versions, 12040 for 12.4; machine code needs the major one alone.
    Raises NoPlan with the reason where neither runs.
    """
    if device.capability < (8, 0):
        return device  # for which there is no plan
    if driver // 1000 < runtime // 1000:
        has = f"supports CUDA up to {_version(driver)}" if driver else "is missing"
        raise NoPlan(
            f"the CUDA module was built with CUDA {_version(runtime)} and the driver {has}; update the driver, or "
            "install with an older nvcc; backend='triton' needs neither"
        )
    major, minor = device.capability
    chosen = []
    for name in architectures:
        number = int(name.rstrip("af"))
        exact = not name.isdigit()
        if number == 10 * major + minor or (not exact and number // 10 == major and number % 10 <= minor):
            chosen.append(number)
    if not chosen and driver >= runtime and ptx <= 10 * major + minor:
        chosen.append(ptx)
    if not chosen:
        too_old = f", and the driver (CUDA {_version(driver)}) is older than its PTX (CUDA {_version(runtime)})"
        raise NoPlan(
            f"the CUDA module has code for compute capability {', '.join(architectures)}, {device.name} has "
            f"{major}.{minor}{too_old if ptx <= 10 * major + minor else ''}; install with "
            f"FUSED_RIN_CUDA_ARCHS=\"{10 * major + minor}\", or use backend='triton'"
        )
    code = max(chosen)
    return replace(
        device,
        shared_memory_per_block=min(device.shared_memory_per_block, _shared_bytes_of_code(code)),
        max_cluster_size=device.max_cluster_size if code >= 90 else 1,
    )


def _resident(kernel: Kernel, device: Device) -> int:
    by_registers = device.registers_per_sm // (kernel.threads * 256)  # compiled with up to 255 a thread
    by_shared = device.shared_memory_per_block // kernel.most_shared_bytes
    return max(1, min(by_registers, by_shared))


def spread(kernel: Kernel, batch: int, groups: int, device: Device) -> SweepPlan:
    """A problem over the device by one kernel, which must fit there."""
    places, rows = kernel.places(device.sms), kernel.rows
    if kernel.ctas > 1:  # few rows a tile, too
        rows = min(rows, max(1, math.ceil(batch / max(1, places // max(1, groups)))))
    tiles = groups * math.ceil(batch / rows)
    in_turn = max(1, math.ceil(tiles / places))  # tiles of a place
    resident = min(_resident(kernel, device), in_turn)
    work = kernel.work_cycles(device.capability)
    latency = _STEP_LATENCY + kernel.exchange_cycles(rows)
    cycles = math.ceil(in_turn / resident) * max(latency + work, resident * (work + kernel.arriving_cycles(rows)))
    tile_rows = rows if kernel.ctas > 1 else 0
    workspace = min(tiles, places) * kernel.workspace_bytes
    return SweepPlan(kernel, device.name, tiles * kernel.ctas, device.sms, resident, cycles, tile_rows, workspace)


@functools.lru_cache(maxsize=1024)
def plan(
    batch: int,
    groups: int,
    hidden: int,
    dtype: torch.dtype,
    device: Device,
    *,
    allow_tf32: bool = False,
    units: bool = False,
) -> SweepPlan:
    """The fastest kernel, by the model, for `groups` recurrences of `hidden` units over `batch` rows.

    `allow_tf32`: torch's setting for float32 matrix products; without it float32 means float32 accuracy. `units`: with
    factors of their own.
    Raises NoPlan, with the reason and an alternative, where no kernel fits.
    """
    if dtype not in DTYPES:
        raise NoPlan(
            f"the CUDA kernels take {', '.join(str(d) for d in DTYPES)}, got {dtype}; backend='reference' takes any"
        )
    if device.capability < (8, 0):
        major, minor = device.capability
        raise NoPlan(
            f"the CUDA kernels need compute capability 8.0 or later, {device.name} has {major}.{minor}; "
            "use backend='triton' or backend='reference'"
        )
    if dtype != torch.float32:
        maths: tuple[str, ...] = ("mma",)
    else:
        maths = ("fma", "tf32") if allow_tf32 else ("fma", "tf32x3")
    compiled = [
        k
        for k in (UNIT_KERNELS if units else (*KERNELS, *CLUSTER_KERNELS, *GRID_KERNELS))
        if k.math in maths and k.runs_on(device)
    ]
    wide_enough = [k for k in compiled if k.hidden >= hidden]
    if not wide_enough:
        largest = max(k.hidden for k in compiled)
        of = " with factors of its own for each unit" if units else ""
        raise NoPlan(
            f"the CUDA kernels keep U on chip and are compiled for hidden sizes up to {largest} in {dtype}{of} on "
            f"{device.name}, got {hidden}; use backend='triton', or split the layer into heads of at most {largest} "
            "units"
        )
    fitting = [
        k
        for k in wide_enough
        if k.most_shared_bytes <= device.shared_memory_per_block and k.threads * 168 <= device.registers_per_sm
    ]
    if not fitting:
        least = min(k.most_shared_bytes for k in wide_enough)
        raise NoPlan(
            f"hidden size {hidden} in {dtype} takes at least {least / 1024:.0f} KB of shared memory a block, "
            f"{device.name} offers {device.shared_memory_per_block / 1024:.0f} KB; use backend='triton'"
        )
    plans = [spread(kernel, batch, groups, device) for kernel in fitting]

    def cost(plan: SweepPlan) -> tuple[float, int, int]:
        weight = _WEIGHT_OF_SHARING if plan.kernel.ctas > 1 else 1.0
        return weight * plan.estimated_cycles, plan.kernel.hidden, plan.kernel.rows

    return min(plans, key=cost)
