"""Compiles the sweep for GPUs that are not here and reads what it costs from the cubin. Run as a script, prints JSON.

    python -m tests.triton_aot.triton_aot_compile            what this Triton makes of every instance
    python -m tests.triton_aot.triton_aot_compile --write    the same, and puts it into resources.json

A process of its own, because the tests of the kernels make Triton interpret. Per instance: registers a thread, bytes of
stack (spilled registers and local arrays live there), bytes of shared memory, and what a step of the time loop
executes: instructions, loads from global and from shared memory, barriers; and on sm_80 and sm_90 its cycles by the
model of benchmarks/gpu/predict.py.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks.gpu import predict, sass

TABLE = pathlib.Path(__file__).with_name("resources.json")
FIGURES = ("registers", "stack", "shared_memory", "instructions", "global_loads", "shared_loads", "barriers", "cycles")
MODELLED = ("sm_80", "sm_90")
SAMPLE = (  # played anew by every run of the tests
    "sm_80 128 bfloat16 forward", "sm_90 128 bfloat16 forward", "sm_90 256 float16 backward everything",
    "sm_90 1024 bfloat16 backward everything",
)  # fmt: skip
ROUNDS = 7  # that are played; here no ring of several steps has to fill first

H200 = ("H200", (9, 0), 132, 227 * 1024)
DEVICES = {"sm_80": ("A100", (8, 0), 108, 163 * 1024), "sm_90": H200, "sm_100": ("B200", (10, 0), 148, 227 * 1024)}
# (hidden, dtype, backward, everything): "everything" is packed lengths, resets and tanh, which takes most registers.
# And a form of units with factors of their own.
INSTANCES: list[tuple] = [
    (128, "bfloat16", False, False),
    (128, "bfloat16", True, True),
    (256, "float16", True, True),
    (64, "float32", True, True),
    (128, "float32", True, True),
    (512, "float32", True, True),
    (1024, "bfloat16", True, True),
    (2048, "float32", True, True),
    (128, "bfloat16", False, False, "outside"),
    (128, "bfloat16", True, True, "outside"),
    (128, "float32", True, True, "current"),
    (1024, "bfloat16", True, True, "current"),
]
SCALARS = ("steps", "batch", "groups", "num_reversed", "first_tile", "D")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def name_of(arch: str, hidden: int, dtype: str, backward: bool, everything: bool, form: str | None = None) -> str:
    name = f"{arch} {hidden} {dtype} {'backward' if backward else 'forward'}" + " everything" * everything
    return name if form is None else f"{name} {form}"


def compile_instance(arch: str, hidden: int, dtype: str, backward: bool, everything: bool, form: str | None = None):
    """The compiled kernel of one instance and its plan."""
    import triton
    from fused_rin.triton_kernels import Device, plan
    from fused_rin.triton_kernels.launch import compile_options
    from fused_rin.triton_kernels.sweep import sweep
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chosen = plan(hidden, dtype, 1, 16, Device(*DEVICES[arch]))
    sliced = chosen.kind == "sliced"
    constants = {
        "TILE_N": chosen.tile_n, "TILE_B": chosen.tile_b, "SPLIT_K": chosen.split_k, "TILE_K": chosen.tile_k,
        "SLICED": sliced, "MATRIX": chosen.matrix, "BACKWARD": backward, "HAS_SKIP": form is None,
        "ACTIVATION": "tanh" if everything else "relu", "PRECISION": chosen.input_precision,
        "FORM": form, "UNROLL": chosen.unroll,
    }  # fmt: skip
    pointers = dict.fromkeys(("p_in", "p_state_in", "p_u", "p_out", "p_state_out"), SHORT[dtype])
    if backward:
        pointers["p_saved"] = SHORT[dtype]
    if everything:
        pointers |= {"p_lengths": "i64", "p_offsets": "i64", "p_resets": "u8"}
    if form is not None:
        pointers["p_skips"] = "fp32"
    if form == "outside":
        pointers |= {"p_gains": "fp32", "p_aside": SHORT[dtype]}
    if form == "current" and backward:
        pointers["p_initial"] = SHORT[dtype]
    if sliced:
        pointers |= {"p_exchange": SHORT[dtype], "p_arrived": "i64"}
    signature, aligned = {}, {}
    for k, name in enumerate(sweep.arg_names):
        if name in pointers:
            signature[name] = "*" + pointers[name]
        elif name in SCALARS:
            signature[name] = "i32"
        elif name == "skip":
            signature[name] = "fp32"
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        if name in pointers or name == "D":
            aligned[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=sweep, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=compile_options(chosen, "nvidia")), chosen


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def resources(kernel, chosen, played: str | None) -> dict[str, int | list[int]]:
    """`played`: the architecture whose cycles are counted, if they are."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        (code,) = sass.functions(_tool("nvdisasm", "-c", "-hex", file.name)).values()
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    loop = sass.longest_loop(code)
    operations = [line.opcode.split(".")[0] for line in loop]

    def a_step(what: Callable[[str], bool]) -> int:
        return round(sum(map(what, operations)) / chosen.unroll)

    found: dict[str, int | list[int]] = {
        "registers": registers,
        "stack": stack,
        "shared_memory": kernel.metadata.shared,
        "instructions": a_step(lambda _: True),
        "global_loads": a_step(lambda op: op == "LDG"),
        "shared_loads": a_step(lambda op: op in ("LDS", "LDSM")),
        "barriers": round(sum(line.is_barrier for line in loop) / chosen.unroll),
    }
    if played is not None:
        found["cycles"] = cycles(loop, chosen, int(played.removeprefix("sm_")))
    return found


def cycles(loop: list[sass.Instruction], chosen, arch: int) -> list[int]:
    """Of a step, by the step model, at each of LOAD_LATENCIES of a load from device memory, and of the atomics at which
    programs meet. What is polled for is there at once, and a loop within the loop passed once.
    """
    warps = max(1, chosen.warps // 4)  # of a scheduler
    return [
        round(predict.Scheduler([loop] * warps, load, arch, senders=0.0).play(ROUNDS) / chosen.unroll)
        for load in predict.LOAD_LATENCIES
    ]


def in_table(figures: dict) -> dict:
    """What of it the table has."""
    return {figure: figures[figure] for figure in FIGURES if figure in figures}


def written(table: dict[str, dict[str, dict]]) -> str:
    """As JSON, a line for every kernel."""
    parts = []
    for version, kernels in sorted(table.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in kernels.items())
        parts.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from fused_rin.triton_kernels.launch import compile_options

    found, ptx, writes = {}, {}, "--write" in sys.argv
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for arch in DEVICES:
            for instance in INSTANCES:
                name = name_of(arch, *instance)
                kernel, chosen = compile_instance(arch, *instance)
                most = compile_options(chosen, "nvidia")["maxnreg"]
                played = arch if arch in MODELLED and (writes or name in SAMPLE) else None
                found[name] = {
                    **resources(kernel, chosen, played),
                    "bound": chosen.shared_memory,
                    "most_registers": most,
                }
                if chosen.kind == "sliced":
                    ptx[name] = kernel.asm["ptx"]
    if writes:
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        table[triton.__version__] = {name: in_table(figures) for name, figures in found.items()}
        TABLE.write_text(written(table))
    print(json.dumps({"triton": triton.__version__, "found": found, "ptx": ptx}))


if __name__ == "__main__":
    main()
