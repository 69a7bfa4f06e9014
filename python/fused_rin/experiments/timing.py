"""Times our RIN against torch.nn.RNN(nonlinearity="relu") on the same work: same weights, same input, same results.

The two take turns and the medians are compared, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fused_rin import RIN


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, and the shape that was timed."""

    steps: int
    batch: int
    hidden: int
    kind: str  # "forward" or "training step"
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


def peer_of(rin: RIN) -> nn.RNN:
    """The torch.nn.RNN that computes the same function: its recurrent matrix is V = U + I."""
    peer = nn.RNN(rin.input_size, rin.hidden_size, nonlinearity="relu")
    peer.load_state_dict({name: value for name, value in rin.state_dict().items() if name != "skip"})
    with torch.no_grad():
        peer.get_parameter("weight_hh_l0").add_(torch.eye(rin.hidden_size))
    return peer


def compare(steps: int, batch: int, input_size: int, hidden: int, seconds: float = 1.5) -> list[Timing]:
    """Forward pass without gradients, and training step (forward, backward), each timed for about `seconds`."""
    generator = torch.Generator().manual_seed(0)
    ours = RIN(input_size, hidden)
    theirs = peer_of(ours)
    x = torch.randn(steps, batch, input_size, generator=generator)

    def forward(module: nn.Module) -> None:
        with torch.no_grad():
            module(x)

    def training_step(module: nn.Module) -> None:
        module.zero_grad()
        module(x)[1].sum().backward()

    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-3, atol=1e-4)
    timings = []
    for kind, call in (("forward", forward), ("training step", training_step)):
        medians = _alternate(partial(call, ours), partial(call, theirs), seconds)
        timings.append(Timing(steps, batch, hidden, kind, *medians))
    return timings


def _alternate(first: Callable[[], None], second: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Median seconds of each, in turns, after one unmeasured call; at least 7 turns."""
    times: tuple[list[float], list[float]] = ([], [])
    first()
    second()
    end = time.perf_counter() + seconds
    while len(times[0]) < 7 or time.perf_counter() < end:
        for call, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
