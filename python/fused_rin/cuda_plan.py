"""Which compiled CUDA kernel runs a problem: plain Python over a plain `Device` record, so it is tested without a GPU.

Only the `block` plan is here: one CTA holds one recurrence's whole matrix, in registers and, where they do not suffice,
in shared memory, and sweeps a tile of the batch. The planner estimates the cycles of a step for every kernel that fits
and takes the fastest. Its constants come from public figures and from counting instructions (benchmarks/NOTES-cuda.md);
they order the kernels of one device, and are no promise of a speed.
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

# Cycles that one mma.sync (m16n8k16 of 16-bit types, m16n8k8 of tf32) occupies one of an SM's four tensor cores, by
# compute capability. sm_80: 1,024 FMA per clock and SM. sm_90: measured on an H100, two thirds of 2,048.
# GeForce parts (8.6, 8.9, 12.0) run float32 accumulation at 256 FMA per clock and SM.
_MMA_CYCLES = {(8, 0): 8.0, (8, 6): 32.0, (8, 7): 16.0, (8, 9): 32.0, (9, 0): 6.2, (10, 0): 8.0, (12, 0): 32.0}
_STEP_LATENCY = 190.0  # cycles: barrier, first load of the state, the mma chain's tail, epilogue, store, all traffic

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
MATH = {"mma": 0, "tf32": 1, "tf32x3": 2, "fma": 3}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel (both directions)."""

    math: str  # "mma" for 16-bit types; "fma", "tf32x3", "tf32" for float32
    hidden: int  # D is padded to it
    rows: int  # batch rows of a CTA
    warps: int
    register_parts: int
    forward_slots: int
    backward_slots: int
    units: bool = False  # with factors of their own

    @property
    def element_bytes(self) -> int:
        return 2 if self.math == "mma" else 4

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def matrix_shared_bytes(self) -> int:
        """What of the matrix is not in registers."""
        parts = self.hidden // 16 if self.math == "fma" else self.hidden * self.element_bytes // 32
        per_thread = self.hidden // (8 * self.warps) if self.math == "fma" else self.hidden // (16 * self.warps)
        return (parts - self.register_parts) * per_thread * 16 * self.threads

    def shared_bytes(self, *, backward: bool) -> int:
        """Of a block: the state twice, what of the matrix is there, the ring, what is staged, the units' factors."""
        state = self.rows * (self.hidden * self.element_bytes + 64) + self.rows // 2 * 32
        slots = self.backward_slots if backward else self.forward_slots
        schedule = 4 * slots * 8 + -(-slots * self.rows * 4 // 16) * 16
        tiles, factors = 1 + (backward or self.units), 8 * self.hidden * self.units
        return self.matrix_shared_bytes + (2 + slots * tiles) * state + schedule + factors

    @property
    def most_shared_bytes(self) -> int:
        """Of either direction: a plan is for both."""
        return max(self.shared_bytes(backward=False), self.shared_bytes(backward=True))

    def work_cycles(self, capability: tuple[int, int]) -> float:
        """Cycles of one step's product that no overlap hides: tensor cores or FMA pipe, or shared memory if slower."""
        if self.math == "fma":
            lanes = 64 if capability == (8, 0) else 128
            arithmetic = self.hidden**2 * self.rows / lanes
            readers = self.rows  # four lanes share an output, so one 64-byte line a row and chunk
            state = float(self.warps * (self.hidden // 16) * readers)
        else:
            cycles = _MMA_CYCLES.get(capability) or _MMA_CYCLES.get((capability[0], 0), 32.0)
            passes = 3 if self.math == "tf32x3" else 1
            k_steps = self.hidden * self.element_bytes // 32
            products = self.hidden // 16 * k_steps * self.rows / 8 * passes
            arithmetic = products * cycles / 4
            if self.math == "tf32x3":  # splitting the operands takes longer: 4.2 to 4.8 cycles a product on an H100
                arithmetic = max(arithmetic, products * 4.5)
            state = self.warps * self.rows * self.hidden * self.element_bytes / 128
        return max(arithmetic, state + self.matrix_shared_bytes / 128)


KERNELS = tuple(Kernel(math, *columns) for math, table in _TABLES.items() for columns in table)
UNIT_KERNELS = tuple(replace(k, units=True) for k in KERNELS if (k.hidden, k.rows) in _UNIT_TABLES.get(k.math, ()))


@dataclass(frozen=True)
class BlockPlan:
    """A kernel and how a problem is spread over the device with it."""

    kernel: Kernel
    device: str
    blocks: int
    sms: int
    resident: int  # CTAs that one SM holds at a time
    estimated_cycles: float  # of a step, all waves together

    def describe(self) -> str:
        k = self.kernel
        arithmetic = {
            "mma": "tensor cores, float32 sums",
            "tf32": "tensor cores in TF32 (as torch's setting allows)",
            "tf32x3": "tensor cores, three TF32 products for float32 accuracy",
            "fma": "float32 FMA",
        }[k.math]
        where, of_units = "registers", ", units with factors of their own" if k.units else ""
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
    return replace(
        device, shared_memory_per_block=min(device.shared_memory_per_block, _shared_bytes_of_code(max(chosen)))
    )


def _resident(kernel: Kernel, device: Device) -> int:
    by_registers = device.registers_per_sm // (kernel.threads * 256)  # compiled with up to 255 a thread
    by_shared = device.shared_memory_per_block // kernel.most_shared_bytes
    return max(1, min(by_registers, by_shared))


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
) -> BlockPlan:
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
    compiled = [k for k in (UNIT_KERNELS if units else KERNELS) if k.math in maths]
    wide_enough = [k for k in compiled if k.hidden >= hidden]
    if not wide_enough:
        largest = max(k.hidden for k in compiled)
        raise NoPlan(
            f"the block plan keeps U in one SM and is compiled for hidden sizes up to {largest} in {dtype}, got "
            f"{hidden}; use backend='triton', or split the layer into heads of at most {largest} units"
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
    plans = []
    for kernel in fitting:
        blocks = groups * math.ceil(batch / kernel.rows)
        per_sm = max(1, math.ceil(blocks / device.sms))
        resident = min(_resident(kernel, device), per_sm)
        work = kernel.work_cycles(device.capability)
        cycles = math.ceil(per_sm / resident) * max(_STEP_LATENCY + work, resident * work)
        plans.append(BlockPlan(kernel, device.name, blocks, device.sms, resident, cycles))
    return min(plans, key=lambda p: (p.estimated_cycles, p.kernel.hidden, p.kernel.rows))
