"""The cases of the CPU comparison with torch.nn.RNN and RNNCell, and a call of each; float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from fused_rin import RIN, RINCell

from benchmarks.harness import PEER, Case

OURS = "cpu"
IMPLEMENTATIONS = (OURS, PEER)
Call = Callable[[], torch.Tensor]

# (B, T, H), input_size = hidden_size unless given as a fourth number.
FORWARD = [
    (1, 512, 64), (1, 512, 128), (1, 512, 256), (1, 256, 512), (1, 128, 1024), (16, 256, 128), (16, 256, 256),
    (64, 128, 128), (64, 128, 256), (64, 64, 512),
]  # fmt: skip
TRAINING = [
    (1, 512, 64), (1, 512, 128), (1, 512, 256), (1, 256, 512), (16, 256, 128), (16, 256, 256), (64, 128, 128),
    (64, 128, 256), (64, 64, 512), (128, 784, 100), (128, 784, 100, 1),
]  # fmt: skip


def layers() -> list[Case]:
    """Long sequences, on one thread and two."""
    points = [("forward", *point) for point in FORWARD] + [("training", *point) for point in TRAINING]
    return [
        Case("float32", batch, hidden, mode, steps, *rest, start=start, threads=threads)
        for (mode, batch, steps, hidden, *rest), threads, start in itertools.product(points, (1, 2), ("rnn", "rin"))
    ]


def calls() -> list[Case]:
    """Short calls at B = 1, which the overhead of a call decides. One step forward is streaming: the state handed back
    in, or none.
    """
    streams = itertools.product(("RIN", "RINCell"), (64, 128, 256), (True, False))
    points = [("forward", kind, 1, hidden, state) for kind, hidden, state in streams]
    points += [(mode, "RIN", steps, 128, False) for mode in ("forward", "training") for steps in (1, 2, 3, 4, 16)]
    points.append(("training", "RINCell", 1, 128, True))
    return [
        Case("float32", 1, hidden, mode, steps, module=kind, state=state, start="rnn", threads=1)
        for mode, kind, steps, hidden, state in dict.fromkeys(points)
    ]


def is_call(case: Case) -> bool:
    return case.steps <= 16


def pair(case: Case) -> dict[str, torch.nn.Module]:
    """torch's module and the RIN that is the same function, V = U + I, by the name of the implementation.

    `start` is "rnn" for nn.RNN's own initialisation, V uniform in +-1/sqrt(H) (about half of the states are 0), or
    "rin" for the RIN's, U from N(0, 0.001^2), with input weights as nn.RNN has them (few states are 0).
    """
    sizes = (case.input_size or case.hidden, case.hidden)
    kind = torch.nn.RNN if case.module == "RIN" else torch.nn.RNNCell
    theirs = kind(*sizes, nonlinearity="relu")
    if case.start == "rin":
        with torch.no_grad():
            u = RIN(*sizes).get_parameter("weight_hh_l0")
            theirs.get_parameter("weight_hh_l0").copy_(u + torch.eye(case.hidden))
    ours = RIN.from_rnn(theirs) if isinstance(theirs, torch.nn.RNN) else RINCell.from_rnn(theirs)
    return {OURS: ours, PEER: theirs}


def both(case: Case) -> dict[str, Call]:
    """A call of the case by each implementation; it returns the output, in training the gradient of the input."""
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    x = torch.randn(case.steps, case.batch, case.input_size or case.hidden)
    hx = torch.rand(1, case.batch, case.hidden) if case.state else None
    grad = torch.randn(case.steps, case.batch, case.hidden)
    if case.module == "RINCell":
        x, hx, grad = x[0], None if hx is None else hx[0], grad[0]
    make = _training if case.mode == "training" else _forward
    return {name: make(module, x, hx, grad) for name, module in pair(case).items()}


def _forward(module: torch.nn.Module, x: torch.Tensor, hx: torch.Tensor | None, grad: torch.Tensor) -> Call:
    def run() -> torch.Tensor:
        with torch.no_grad():
            out = module(x, hx)
        return out if isinstance(out, torch.Tensor) else out[0]

    return run


def _training(module: torch.nn.Module, x: torch.Tensor, hx: torch.Tensor | None, grad: torch.Tensor) -> Call:
    """Forward and backward, gradients of the input and all weights; no optimizer."""
    x = x.clone().requires_grad_()

    def run() -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        x.grad = None
        out = module(x, hx)
        (out if isinstance(out, torch.Tensor) else out[0]).backward(grad)
        assert x.grad is not None
        return x.grad

    return run
