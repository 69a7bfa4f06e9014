"""A training step as one CUDA graph.

A step is about a hundred kernels, most of a few microseconds; launching them one by one takes the CPU longer than the
GPU takes for all of a short sequence. A graph of them is launched at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Update = Callable[[tuple[Tensor, ...], Tensor], None]
WARM_UP = 3  # calls: optimizer state, workspaces of libraries and compiled kernels are made in the first ones


class CapturedUpdate:
    """`update(inputs, target)`, captured in its fourth call, and from then on replayed.

    Calls compute what calls of `update` would. For that, `update` must do the same work in every call but for the
    values in tensors; what it reads of Python (a learning rate, a step) is what it was when it was captured. It must
    not wait for the GPU, and what it leaves for later calls has to be in tensors that it writes in place.

    Inputs and target must have the same shapes and types in every call; ValueError otherwise.
    """

    def __init__(self, update: Update):
        self._update = update
        self._inputs: tuple[Tensor, ...] = ()
        self._target = torch.empty(0)
        self._calls = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, inputs: tuple[Tensor, ...], target: Tensor) -> None:
        if self._calls == 0:  # the graph reads from where these lie
            self._inputs, self._target = tuple(map(torch.empty_like, inputs)), torch.empty_like(target)
        _copy((*inputs, target), (*self._inputs, self._target))
        if self._calls < WARM_UP:
            _run_aside(self._work)
        else:
            if self._replay is None:
                self._replay = _capture(self._work)
            self._replay()
        self._calls += 1

    def _work(self) -> None:
        self._update(self._inputs, self._target)


def _copy(given: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    kinds = [[(tuple(tensor.shape), tensor.dtype) for tensor in tensors] for tensors in (given, kept)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"a captured update has inputs and target of {kinds[1]}, got {kinds[0]}")
    for source, tensor in zip(given, kept, strict=True):
        tensor.copy_(source)


def _run_aside(work: Callable[[], None]) -> None:
    """On another stream than the default one, on which nothing can be captured: what is bound to a stream in the first
    calls is then bound to such a one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*constructed with capturable=True")  # it will be captured
        work()
    torch.cuda.current_stream().wait_stream(stream)


def _capture(work: Callable[[], None]) -> Callable[[], None]:
    """Records the kernels of `work` and computes nothing; calling what is returned computes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
