"""Which tiles the Triton sweep uses: a short table and a rule, in plain Python, with neither Triton nor a GPU.

The table holds what ahead-of-time compilation showed (tests/triton_aot): every row compiles without spilled registers
for the architectures it names. Nothing here depends on the batch size or the number of steps, so neither
causes a compilation.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_rin.device import NoPlan

KILOBYTE = 1024


@dataclass(frozen=True)
class Plan:
    """How one sweep is cut into programs.

    kind: "block" (a program owns a batch tile and all of U) or "sliced" (it owns `tile_n` rows of U; `slices`
        programs share a batch tile and meet once a step).
    tile_n, tile_b: rows of U and sequences per program. A multiple of 16 and of 8.
    split_k, tile_k: in "sliced", warps share the sum over the hidden size: `split_k` parts of `tile_k`.
    matrix: where U is during the loop: "registers", "shared" (shared memory) or "streamed" (from L2 in each step).
    precision: of the products, "half" for 16-bit dtypes or Triton's `input_precision` for float32.
    wave: batch tiles in one launch. Programs that wait for each other must all be resident, so "sliced" launches
        no more than one program per SM at a time. 0: no limit.
    unroll: steps in one pass of the loop's code. The load of the next step's input has a scoreboard for each of them,
        so that a step does not wait for the load that it has just issued (NOTES.md).
    """

    kind: str
    tile_n: int
    tile_b: int
    split_k: int
    tile_k: int
    slices: int
    warps: int
    matrix: str
    precision: str
    shared_memory: int  # bytes, an upper bound
    wave: int = 0
    unroll: int = 1

    @property
    def input_precision(self) -> str:
        """What `tl.dot` is told. It looks at it for float32 alone."""
        return "ieee" if self.precision == "half" else self.precision

    def describe(self) -> str:
        products = f", {self.precision} products"
        where = {"registers": "registers", "shared": "shared memory", "streamed": "L2, streamed in every step"}
        if self.kind == "block":
            return (
                f"triton block plan: one program per {self.tile_b} sequences, {self.warps} warps, "
                f"U padded to {self.tile_n} x {self.tile_n} in {where[self.matrix]}{products}"
            )
        return (
            f"triton sliced plan: {self.slices} programs of {self.tile_n} rows of U per {self.tile_b} sequences, "
            f"{self.warps} warps, U in {where[self.matrix]}{products}, a grid barrier per step, "
            f"{self.wave} batch tiles at a time"
        )


# precision -> padded hidden size -> (warps, batch tile, where U is). One m16 tile of U per warp; 8 sequences, the
# smallest n of mma and wgmma, because at batch <= 64 most SMs are idle anyway and a step takes 95 instead of 135
# instructions a warp. A 256 x 256 U takes half of the register file; 128 x 128 as two TF32 halves spills there and is
# kept in shared memory.
_BLOCK = {
    "half": {
        16: (1, 8, "registers"),
        32: (2, 8, "registers"),
        64: (4, 8, "registers"),
        128: (8, 8, "registers"),
        256: (8, 8, "registers"),
    },
    "tf32": {
        16: (1, 8, "registers"),
        32: (2, 8, "registers"),
        64: (4, 8, "registers"),
        128: (8, 8, "registers"),
    },
    "tf32x3": {
        16: (1, 8, "registers"),
        32: (2, 8, "registers"),
        64: (4, 8, "registers"),
        128: (8, 8, "shared"),
    },
    "ieee": {16: (4, 8, "registers"), 32: (8, 8, "registers"), 64: (16, 8, "registers")},  # FMA: no tensor cores
}
# On sm_10x Triton takes the fifth-generation tensor core for M >= 64 with 4 or 8 warps, which carries the accumulator
# through tensor memory and back in every step (290 instead of 94 instructions at D = 128). With 16 warps it does not.
_BLOCK_SM100 = {
    "half": {64: (16, 16, "registers"), 128: (16, 16, "registers"), 256: (16, 8, "registers")},
    "tf32": {64: (16, 16, "registers"), 128: (16, 16, "registers")},
    "tf32x3": {64: (16, 8, "shared"), 128: (8, 8, "registers")},
    "ieee": {},
}

_SLICED_WARPS = 8
_SLICED_TILE_B = 16
# Of the rows of U a program owns, how many bytes (TF32 halves counted) stay in registers without spills.
_SLICED_RESIDENT_BYTES = 64 * KILOBYTE
# precision -> slice height -> columns of U per warp and chunk, when U is streamed.
_STREAMED = {
    "half": {32: 64, 64: 16},
    "tf32": {16: 32, 32: 16},
    "tf32x3": {16: 32, 32: 16},
    "ieee": {16: 16, 32: 16},
}


def plan(
    hidden_size: int, dtype: object, groups: int, batch: int, device: object, precision: str | None = None
) -> Plan:
    """The plan for `groups` recurrences of `hidden_size` in `dtype` (torch's, or its name) on `device`.

    `precision`, for float32: "tf32x3" (default: three TF32 products, as exact as float32), "tf32" or "ieee".
    `groups` and `batch` say how much there is to do, and so far no tile depends on them.
    Raises NoPlan with the reason and the alternative.
    """
    del groups, batch
    name = str(dtype).removeprefix("torch.")
    capability: tuple[int, int] = device.capability  # type: ignore[attr-defined]
    shared: int = device.shared_memory_per_block  # type: ignore[attr-defined]
    sms: int = device.sms  # type: ignore[attr-defined]
    nvidia = getattr(device, "vendor", "nvidia") == "nvidia"
    if name not in ("float32", "float16", "bfloat16"):
        raise NoPlan(f'triton has no kernel for {name}, only float32, float16 and bfloat16; use backend="reference"')
    if nvidia and capability < (8, 0):
        raise NoPlan(
            f"Triton compiles for compute capability 8.0 and newer, {device.name} has "  # type: ignore[attr-defined]
            f'{capability[0]}.{capability[1]}; use backend="reference"'
        )
    if precision not in (None, "tf32x3", "tf32", "ieee"):
        raise NoPlan(f'precision must be "tf32x3", "tf32" or "ieee", got {precision!r}')
    if name != "float32":
        precision = "half"
    elif not nvidia:
        precision = "ieee"
    precision = precision or "tf32x3"
    unit = {"half": 2, "tf32": 4, "tf32x3": 8, "ieee": 4}[precision]  # bytes; tf32x3 keeps two halves of each number
    padded = max(16, 1 << (hidden_size - 1).bit_length())

    table = _BLOCK[precision]
    if nvidia and capability[0] == 10:
        table = table | _BLOCK_SM100[precision]
    if padded in table:
        warps, tile_b, matrix = table[padded]
        need = unit * padded * (padded + tile_b) + KILOBYTE
        if need <= shared:
            # With 16 warps, on sm_10x, two steps at a time spill, and elsewhere nobody has looked.
            unroll = 2 if nvidia and precision == "half" and warps <= 8 else 1
            return Plan("block", padded, tile_b, 1, padded, 1, warps, matrix, precision, need, unroll=unroll)
    return _sliced(hidden_size, padded, precision, unit, sms, shared)


def _sliced(hidden: int, padded: int, precision: str, unit: int, sms: int, shared: int) -> Plan:
    """U on chip if its slices fit, as high as it takes for four batch tiles to run at once; else U streamed, by as
    many programs as there can be."""

    def build(tile_n: int, tile_k: int, matrix: str) -> Plan | None:
        slices = -(-hidden // tile_n)
        split_k = _SLICED_WARPS
        chunk = unit * split_k * tile_k * (tile_n + _SLICED_TILE_B)
        need = chunk + 4 * split_k * tile_n * _SLICED_TILE_B + KILOBYTE
        if slices > sms or need > shared:
            return None
        wave = sms // slices
        return Plan(
            "sliced", tile_n, _SLICED_TILE_B, split_k, tile_k, slices, _SLICED_WARPS, matrix, precision, need, wave
        )

    tile_k = max(16, padded // _SLICED_WARPS)
    heights = [
        n for n in (16, 32, 64) if precision != "ieee" and unit * n * tile_k * _SLICED_WARPS <= _SLICED_RESIDENT_BYTES
    ]
    resident = [p for n in heights if (p := build(n, tile_k, "registers"))]
    streamed = [p for n, k in _STREAMED[precision].items() if (p := build(n, k, "streamed"))]
    if not resident + streamed:
        highest = max(_STREAMED[precision])
        raise NoPlan(
            f"a hidden size of {hidden} in {precision} products does not fit this GPU: "
            f"{-(-hidden // highest)} programs of {highest} rows must run at once on {sms} SMs with {shared} bytes of "
            f'shared memory each; use backend="reference", or more heads'
        )
    return next((p for p in resident if 4 * p.slices <= sms), (resident[-1:] + streamed)[0])
