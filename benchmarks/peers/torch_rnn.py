"""torch.nn.RNN, and the RIN, which is called in the same way."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.harness import PEER, Case
from benchmarks.peers.protocol import Job, Peer, Run, Tensors, dtype

Output = Tensor | PackedSequence


def run_module(module: torch.nn.Module, job: Job) -> Run:
    """Of an nn.RNN or a RIN. Training: forward and backward, the gradients of the input and all weights."""
    x = job.x.clone().requires_grad_(job.training)
    hx, grad = job.hx, job.grad
    given: Output = x
    if job.lengths is not None:  # what is packed is the leaf: packing is not timed
        packed = pack_padded_sequence(job.x, job.lengths)
        x = packed.data.clone().requires_grad_(job.training)
        given = PackedSequence(x, packed.batch_sizes)
        grad = pack_padded_sequence(job.grad, job.lengths).data

    def data(out: Output) -> Tensor:
        return out.data if isinstance(out, PackedSequence) else out

    def forward() -> Output:
        with torch.no_grad():
            return module(given, hx)[0]

    def training() -> Output:
        module.zero_grad(set_to_none=True)
        x.grad = None
        out = module(given, hx)[0]
        data(out).backward(grad)
        return out

    def padded(values: Tensor, like: Output) -> Tensor:
        if not isinstance(like, PackedSequence):
            return values
        full = PackedSequence(values, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
        return pad_packed_sequence(full, total_length=job.case.steps)[0]

    def tensors(out: Output) -> Tensors:
        found = {"output": padded(data(out).detach(), out)}
        if job.training:
            assert x.grad is not None
            found["x"] = padded(x.grad, out)
            for suffix, _, _ in job.parts():
                grads: list[Tensor] = []
                for name in ("weight_ih", "weight_hh", "bias_ih"):
                    value = module.get_parameter(f"{name}_{suffix}").grad
                    assert value is not None
                    grads.append(value)
                if job.case.heads > 1 and grads[1].shape[1] == job.case.hidden:
                    grads[1] = job.blocks(grads[1])
                found |= dict(zip((f"weight_ih_{suffix}", f"weight_hh_{suffix}", f"bias_{suffix}"), grads, strict=True))
        return found

    return Run(training if job.training else forward, tensors)


def reference(job: Job) -> Tensors:
    """nn.RNN in float64 on one thread, which leaves no threads behind that go on waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        double = copy.copy(job)
        double.rnn = copy.deepcopy(job.rnn).double()
        double.x, double.grad = job.x.double(), job.grad.double()
        double.hx = None if job.hx is None else job.hx.double()
        run = run_module(double.rnn, double)
        return run.tensors(run.call())
    finally:
        torch.set_num_threads(before)


class _Torch(Peer):
    setting = "torch.set_num_threads"
    packages = ("torch",)

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def refuses(self, case: Case) -> str:
        del case
        return ""


class FusedRIN(_Torch):
    name = "fused-rin"

    def start(self, job: Job) -> Run:
        return run_module(job.rin, job)

    def versions(self) -> dict[str, str]:
        import fused_rin

        return {"fused-rin": fused_rin.__version__}


class TorchRNN(_Torch):
    """Heads as one matrix with zeros between its blocks, which is what nn.RNN has for them."""

    name = PEER

    def start(self, job: Job) -> Run:
        return run_module(job.rnn, job)


class TorchCompile(_Torch):
    """The loop over time, CHUNK steps unrolled in one compiled function and called again and again.

    Unrolled as a whole, 512 steps compile for minutes; `scan` of torch 2.13 does not compile for CPUs. Even so a shape
    takes 5 to 30 seconds, so few are compiled.
    """

    name = "torch.compile"
    shapes = ((1, 128), (16, 128), (64, 256))
    chunk = 16

    def refuses(self, case: Case) -> str:
        if case.layers * case.directions * case.heads != 1 or case.layout:
            return "one layer, one direction, no lengths in the loop that is compiled"
        if case.dtype != "float32" or case.activation != "relu" or case.state:
            return "float32 and ReLU from a zero state only: a compilation takes up to 30 s"
        if case.steps > 16 and (case.batch, case.hidden) not in self.shapes:
            return f"only (B, D) = {', '.join(map(str, self.shapes))}: a compilation takes up to 30 s"
        return ""

    def start(self, job: Job) -> Run:
        torch.compiler.reset()
        steps = torch.compile(_steps, dynamic=False)
        w, v, b = (t.clone().requires_grad_(job.training) for t in job.weights("l0"))
        x = job.x.clone().requires_grad_(job.training)
        h0 = torch.zeros(job.case.batch, job.case.hidden, dtype=dtype(job.case))
        leaves = (x, w, v, b)

        def forward() -> Tensor:
            with torch.no_grad():
                return loop()

        def loop() -> Tensor:
            pre, h, parts = torch.nn.functional.linear(x, w, b), h0, []
            for part in pre.split(self.chunk):
                states = steps(h, part, v)
                h = states[-1]
                parts.append(states)
            return torch.cat(parts)

        def training() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            out = loop()
            out.backward(job.grad)
            return out

        def tensors(out: Tensor) -> Tensors:
            found = {"output": out.detach()}
            if job.training:
                names = ("x", "weight_ih_l0", "weight_hh_l0", "bias_l0")
                found |= {name: leaf.grad for name, leaf in zip(names, leaves, strict=True) if leaf.grad is not None}
            return found

        return Run(training if job.training else forward, tensors)


def _steps(h: Tensor, pre: Tensor, v: Tensor) -> Tensor:
    states = []
    for now in pre.unbind(0):
        h = torch.relu(now + torch.nn.functional.linear(h, v))
        states.append(h)
    return torch.stack(states)
