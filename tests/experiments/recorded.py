"""CUDA graphs, played on the CPU: what `fused_rin.experiments.training.capture` takes of torch.cuda, with its rules.

While recording, nothing is computed for good: every tensor that was there before is as it was afterwards. Playing does
the recorded operations again, on the same tensors, with the numbers in Python that they were called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They hand a value from the GPU to Python, for which a capture cannot wait.
WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: set[int] = set()  # storages that came up while recording
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # of the others, those written to: (storage, its content)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation}")
        given = tensors((args, kwargs))
        if operation._schema.is_mutable:
            for tensor in given:
                self._keep(tensor)
        result = operation(*args, **kwargs)
        here = {place(tensor) for tensor in given}
        new = [tensor for tensor in tensors(result) if place(tensor) not in here]
        self.made |= {place(tensor) for tensor in new}
        self.operations.append((operation, args, kwargs, new))
        return result

    def _keep(self, tensor: Tensor) -> None:
        if place(tensor) not in self.made and place(tensor) not in self.before:
            whole = whole_storage(tensor)
            self.before[place(tensor)] = (whole, whole.clone())

    def put_back(self) -> None:
        for whole, content in self.before.values():
            whole.copy_(content)

    @torch.no_grad()
    def play(self) -> None:
        for operation, args, kwargs, new in self.operations:
            result = operation(*args, **kwargs)
            here = {place(tensor) for tensor in tensors((args, kwargs))}
            again = [tensor for tensor in tensors(result) if place(tensor) not in here]
            for kept, tensor in zip(new, again, strict=True):
                kept.copy_(tensor)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def whole_storage(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def capture(work: Callable[[], None]) -> Callable[[], None]:
    recorder = Recorder()
    with recorder:
        work()
    recorder.put_back()
    return recorder.play


def run_aside(work: Callable[[], None]) -> None:
    work()
