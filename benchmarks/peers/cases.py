"""What is timed with every peer: shapes, modes and short calls, forward and training, on one thread and two."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

from benchmarks.harness import MODES, Case

THREADS = (1, 2)

# (B, T, D, I). A grid over B and D for the picture, then few but wide: one sequence of 1,024 units, the paper's
# sequential MNIST, short sentences of word vectors in 1,000 units, many sequences.
SHAPES = [
    (1, 512, 64, 64), (1, 512, 128, 128), (1, 512, 256, 256), (1, 256, 512, 512),
    (4, 256, 64, 64), (4, 256, 128, 128), (4, 256, 256, 256), (4, 128, 512, 512),
    (16, 256, 64, 64), (16, 256, 128, 128), (16, 256, 256, 256), (16, 64, 512, 512),
    (64, 128, 64, 64), (64, 128, 128, 128), (64, 128, 256, 256), (64, 64, 512, 512),
    (1, 128, 1024, 1024), (128, 784, 100, 1), (32, 30, 1000, 300), (256, 64, 128, 128),
]  # fmt: skip

GROUPS = ("shapes", "modes", "calls")
BLOCKS = (("shapes",), ("modes", "calls"))  # those of one process


def group(name: str) -> list[Case]:
    """The cases of one of GROUPS, on `threads` 0: the caller says on how many."""
    return [dataclasses.replace(case, mode=mode) for case in _points(name) for mode in MODES]


def _points(name: str) -> list[Case]:
    if name == "shapes":
        return [Case("float32", b, d, "forward", t, input_size=i) for b, t, d, i in SHAPES]
    if name == "calls":  # one step is streaming: the state is handed back in
        return [
            Case("float32", 1, 128, "forward", steps, input_size=128, state=True, activation=activation)
            for steps, activation in itertools.product((1, 3), ("relu", "tanh"))
        ]
    # 16 bits round the state in every step; with V near the identity that error adds up until outputs cannot be
    # compared, so these start as torch.nn.RNN does.
    return [
        Case("float32", 16, 128, "forward", 128, input_size=128, directions=2),
        Case("float32", 16, 128, "forward", 128, input_size=128, layers=3),
        Case("float32", 16, 128, "forward", 128, input_size=128, layout="packed"),
        Case("float32", 16, 128, "forward", 128, input_size=128, layout="batch_first"),
        Case("float32", 16, 128, "forward", 128, input_size=128, activation="tanh"),
        Case("float32", 16, 256, "forward", 128, input_size=128, heads=4),
        Case("float64", 16, 128, "forward", 128, input_size=128),
        Case("bfloat16", 1, 256, "forward", 256, input_size=256, start="rnn"),
        Case("bfloat16", 64, 128, "forward", 128, input_size=128, start="rnn"),
        Case("bfloat16", 64, 512, "forward", 64, input_size=512, start="rnn"),
        Case("float16", 64, 128, "forward", 128, input_size=128, start="rnn"),
    ]


# What `--quick` is of: one case for each thing that can go wrong, a minute for all peers.
def quick(name: str) -> list[Case]:
    cases = group(name)
    if name == "shapes":
        few = {(1, 64), (1, 256), (16, 128), (64, 256)}
        return [case for case in cases if (case.batch, case.hidden) in few]
    if name == "modes":
        return [case for case in cases if case.dtype == "float32" or (case.batch, case.hidden) == (64, 128)]
    return cases


def label(case: Case) -> str:
    """Without the threads, e.g. `training-B16-T128-D128-I128-float32-tanh`; unique, what `--only` is matched with."""
    parts = [case.mode, f"B{case.batch}-T{case.steps}-D{case.hidden}-I{inputs(case)}", case.dtype]
    parts += [case.activation] if case.activation != "relu" else []
    parts += ["bidirectional"] if case.directions == 2 else []
    parts += [f"{case.layers}layers"] if case.layers != 1 else []
    parts += [f"{case.heads}heads"] if case.heads != 1 else []
    parts += [case.layout] if case.layout else []
    parts += ["state"] if case.state else []
    parts += [f"from-{case.start}"] if case.start != "rin" else []
    return "-".join(parts)


def inputs(case: Case) -> int:
    return case.input_size or case.hidden


def lengths(case: Case) -> list[int]:
    """Of the sequences of a packed case: the longest first, evenly down to a quarter."""
    last = max(1, case.steps // 4)
    spread = max(1, case.batch - 1)
    return [case.steps - (case.steps - last) * row // spread for row in range(case.batch)]


def on_threads(cases: Iterable[Case], threads: int) -> list[Case]:
    return [dataclasses.replace(case, threads=threads) for case in cases]
