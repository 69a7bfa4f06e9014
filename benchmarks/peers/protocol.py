"""What a peer is: an engine that runs the same network on the same weights, checked before it is timed."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from fused_rin import RIN
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.peers.cases import inputs, lengths

# Largest ||a - b|| / ||b|| against nn.RNN in float64 on the same (rounded) weights and inputs: of the output, and of
# each gradient. A unit that stops at 1e-8 in one rounding and not in the other moves ReLU gradients by about 1e-3.
# 16 bits: engines round at different places (the state every step, gradients every step or once).
TOLERANCES = {
    "float64": (1e-12, 1e-9),
    "float32": (1e-4, 5e-3),
    "float16": (2e-3, 3e-2),
    "bfloat16": (1e-2, 1e-1),
}


# Training is also checked on SHORT steps, where an error in one step is not lost among hundreds and few units stop in
# one rounding only. A wrong term that oneDNN 3.2 can add in the first step: 7e-3 of a gradient over 512, here 0.15.
SHORT, SHORT_GRADIENT = 16, 1e-3


class NotEqual(Exception):
    """A peer does not compute what it is to be compared with; the text says which tensor and how far off."""


@dataclass
class Job:
    """A case with its tensors. `rnn` is the function, `rin` the same with V = U + skip * I; weights are of the dtype.

    x: [T, B, I], [B, T, I] if the layout is batch_first; zeros behind the end of a shorter sequence of a packed case,
    whose `lengths` [B] are then given. hx: [layers * directions, B, D] or None. grad: of the output, as the output.
    """

    case: Case
    rin: RIN
    rnn: torch.nn.RNN
    x: Tensor
    hx: Tensor | None
    grad: Tensor
    lengths: Tensor | None

    @property
    def training(self) -> bool:
        return self.case.mode == "training"

    def parts(self) -> list[tuple[str, int, int]]:
        """(suffix of the weights' names, layer, direction) of each, layers outside."""
        directions = range(self.case.directions)
        return [(f"l{layer}{'_reverse' * way}", layer, way) for layer in range(self.case.layers) for way in directions]

    def weights(self, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """(W [D, in], V [D, D], both biases' sum [D])."""
        w, v, b, c = (self.rnn.get_parameter(f"{name}_{suffix}").detach() for name in NAMES)
        return w, v, b + c

    def blocks(self, square: Tensor) -> Tensor:
        """The part of [D, D] that heads leave: [D, D / heads], one below the other."""
        size = self.case.hidden // self.case.heads
        return torch.cat([square[i : i + size, i : i + size] for i in range(0, self.case.hidden, size)])


NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
Tensors = dict[str, Tensor]


class Run(NamedTuple):
    """`call` is what is timed; `tensors` takes what it returned and is not.

    Names: "output"; in training also "x" and, of each of `Job.parts`, "weight_ih_*", "weight_hh_*" (blocks, if there
    are heads) and "bias_*", one bias's gradient.
    """

    call: Callable[[], Any]
    tensors: Callable[[Any], Tensors]


class Peer(ABC):
    """An engine on a number of threads, in a process of its own if that is to hold. Nothing is imported before that."""

    name: str
    modules: tuple[str, ...] = ()  # that have to be importable
    packages: tuple[str, ...] = ()  # whose versions are noted
    setting: str  # what pins its threads, in words

    @staticmethod
    def environment(threads: int) -> dict[str, str]:
        """Variables that have to be set before the engine is loaded."""
        del threads
        return {}

    def missing(self) -> str:
        """Why it cannot be had here, or ""."""
        absent = [name for name in self.modules if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else ""

    def versions(self) -> dict[str, str]:
        return {name: installed(name) for name in self.packages}

    @abstractmethod
    def refuses(self, case: Case) -> str:
        """Why it does not run the case, or ""."""

    @abstractmethod
    def start(self, job: Job) -> Run:
        """Everything up to the first call: weights in the engine's own form, compilation."""


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def dtype(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype)


def make_job(case: Case, seed: int = 0) -> Job:
    """W and biases as torch.nn.RNN's; V = U + I, U from N(0, 0.001^2), or with `start` "rnn" torch.nn.RNN's as well."""
    torch.manual_seed(seed)
    rin = RIN(
        inputs(case), case.hidden, case.layers, case.activation, batch_first=case.layout == "batch_first",
        bidirectional=case.directions == 2, skip=1.0 if case.start == "rin" else 0.0, num_heads=case.heads,
    )  # fmt: skip
    bound = case.hidden**-0.5
    with torch.no_grad():
        for name, parameter in rin.named_parameters():
            if case.start == "rnn" or not name.startswith("weight_hh"):
                parameter.uniform_(-bound, bound)
    rin.to(dtype(case))
    x = torch.randn(case.steps, case.batch, inputs(case)).to(dtype(case))
    grad = torch.randn(case.steps, case.batch, case.directions * case.hidden).to(dtype(case))
    hx = torch.rand(case.layers * case.directions, case.batch, case.hidden).to(dtype(case)) if case.state else None
    sizes = None
    if case.layout == "packed":
        sizes = torch.tensor(lengths(case))
        behind = torch.arange(case.steps)[:, None] >= sizes
        x[behind], grad[behind] = 0, 0
    elif case.layout == "batch_first":
        x, grad = (t.transpose(0, 1).contiguous() for t in (x, grad))
    return Job(case, rin, rin.to_rnn(), x, hx, grad, sizes)


def distances(got: Tensors, want: Tensors) -> dict[str, float]:
    """Relative, of each tensor; infinite where a value is not finite."""
    if got.keys() != want.keys():
        raise NotEqual(f"tensors {sorted(got)}, expected {sorted(want)}")
    found = {}
    for name, right in want.items():
        left = got[name].to(torch.float64)
        if left.shape != right.shape:
            raise NotEqual(f"{name}: shape {tuple(left.shape)}, expected {tuple(right.shape)}")
        distance = float((left - right).norm() / right.norm().clamp_min(1e-300))
        found[name] = distance if left.isfinite().all() else float("inf")
    return found


def check(case: Case, got: Tensors, want: Tensors) -> float:
    """The largest distance. Raises NotEqual if one is beyond its tolerance."""
    found = distances(got, want)
    for name, distance in found.items():
        limit = TOLERANCES[case.dtype][name != "output"]
        if case.dtype == "float32" and case.steps <= SHORT:
            limit = SHORT_GRADIENT
        if not distance <= limit:
            raise NotEqual(f"{name}: {distance:.1e} from the float64 computation, at most {limit:.0e} is equal")
    return max(found.values())
