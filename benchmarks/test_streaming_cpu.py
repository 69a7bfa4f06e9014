"""Short calls at B = 1 against torch.nn.RNN(relu) and RNNCell on this CPU: what the overhead of a call decides.

    make bench-cpu                           with the points of test_cpu.py, into the same table and results
    pytest benchmarks/test_streaming_cpu.py --benchmark-enable -k "streaming and 128"

Streaming is inference of one step a call with the state handed back in, or from no state. Short calls have 1 to 16
steps, in inference and in training (forward and backward, gradients of the input and all weights, no optimizer). One
thread; the same function and weights on both sides, V = U + I, from torch.nn.RNN's initialisation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from fused_rin import RIN, RINCell

from benchmarks.test_cpu import SECONDS, alternate

# (what, module, steps, hidden, whether a state is given); input_size = hidden.
POINTS = [
    *(("streaming", kind, 1, hidden, state)
      for kind in ("RIN", "RINCell") for hidden in (64, 128, 256) for state in (True, False)),
    *((what, "RIN", steps, 128, False) for what in ("inference", "training") for steps in (1, 2, 3, 4, 16)),
    ("training", "RINCell", 1, 128, True),
]  # fmt: skip


def _pair(kind: str, hidden: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    if kind == "RIN":
        theirs: torch.nn.Module = torch.nn.RNN(hidden, hidden, nonlinearity="relu")
        return RIN.from_rnn(theirs), theirs
    theirs = torch.nn.RNNCell(hidden, hidden, nonlinearity="relu")
    return RINCell.from_rnn(theirs), theirs


def _inference(module: torch.nn.Module, x: torch.Tensor, hx: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        out = module(x, hx)
        return out if isinstance(out, torch.Tensor) else out[0]

    return run


def _training(module: torch.nn.Module, x: torch.Tensor, hx: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    x = x.clone().requires_grad_()
    forward = _inference(module, x, hx)
    grad = torch.ones_like(forward())

    def run() -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        x.grad = None
        out = forward()
        out.backward(grad)
        return out

    return run


@pytest.mark.parametrize("point", POINTS, ids=lambda p: "-".join(map(str, p)))
def test_call(benchmark, point):
    what, kind, steps, hidden, state = point
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, hx = torch.randn(steps, 1, hidden), torch.rand(1, 1, hidden) if state else None
    if kind == "RINCell":
        x, hx = x[0], None if hx is None else hx[0]
    make = _training if what == "training" else _inference
    ours, theirs = (make(module, x, hx) for module in _pair(kind, hidden))

    with torch.set_grad_enabled(what == "training"):
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5)
        if benchmark.disabled:
            benchmark(ours)
            return
        mine, peers = alternate(ours, theirs, SECONDS)
    times = iter(mine)
    # As in test_cpu.py: pytest-benchmark keeps the statistics of durations that the alternating run took.
    clock = [0.0]

    def replay() -> None:
        clock[0] += next(times)

    benchmark._timer = lambda: clock[0]
    benchmark.pedantic(replay, rounds=len(mine), iterations=1)
    mine_us, peer_us = (statistics.median(t) * 1e6 for t in (mine, peers))
    benchmark.extra_info.update(
        what=what, module=kind, B=1, T=steps, H=hidden, input_size=hidden, state=state, threads=1,
        us_per_call=mine_us, torch_us_per_call=peer_us, ratio=peer_us / mine_us,
    )  # fmt: skip
