"""JAX: lax.scan over time, compiled by XLA; training is its vjp, compiled with it.

The input product of all steps is taken ahead of the scan, as one matrix product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.peers.protocol import Job, Peer, Run, Tensors


class JaxScan(Peer):
    name = "JAX lax.scan"
    modules = ("jax", "jaxlib")
    packages = ("jax", "jaxlib")
    setting = "NPROC, the size of XLA's pool; with one thread also --xla_cpu_multi_thread_eigen=false"

    @staticmethod
    def environment(threads: int) -> dict[str, str]:
        flags = "--xla_cpu_multi_thread_eigen=false" if threads == 1 else ""
        return {"NPROC": str(threads), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}

    def __init__(self, threads: int) -> None:
        del threads  # `environment` has them
        torch.set_num_threads(1)

    def refuses(self, case: Case) -> str:
        del case
        return ""

    def start(self, job: Job) -> Run:
        import jax

        jax.config.update("jax_enable_x64", job.case.dtype == "float64")
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # else a call begins by waking another thread
        apply = _network(job)
        weights = [tuple(map(to_jax, self._weights(job, suffix))) for suffix, _, _ in job.parts()]
        x, grad = to_jax(job.x), to_jax(job.grad)
        zeros = torch.zeros(job.case.layers * job.case.directions, job.case.batch, job.case.hidden, dtype=job.x.dtype)
        hx = to_jax(zeros if job.hx is None else job.hx)

        def train(weights: Any, x: Any, hx: Any, grad: Any) -> Any:
            out, pull = jax.vjp(lambda weights, x: apply(weights, x, hx), weights, x)
            return out, *pull(grad)

        if job.training:
            compiled = jax.jit(train).lower(weights, x, hx, grad).compile()
            return Run(lambda: jax.block_until_ready(compiled(weights, x, hx, grad)), lambda got: _grads(job, got))
        compiled = jax.jit(apply).lower(weights, x, hx).compile()
        return Run(lambda: jax.block_until_ready(compiled(weights, x, hx)), lambda got: {"output": to_torch(got)})

    @staticmethod
    def _weights(job: Job, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """V as [heads, D / heads, D / heads]."""
        w, v, b = job.weights(suffix)
        size = job.case.hidden // job.case.heads
        return w, job.blocks(v).view(job.case.heads, size, size), b


def _network(job: Job) -> Any:
    """(weights, x, hx) -> output, for `jit`."""
    import jax
    import jax.numpy as jnp

    case = job.case
    act = jnp.tanh if case.activation == "tanh" else jax.nn.relu
    inside = None
    if job.lengths is not None:
        inside = jnp.asarray((torch.arange(case.steps)[:, None] < job.lengths).numpy())[:, :, None]

    def layer(weights: Any, x: Any, h0: Any, reverse: bool) -> Any:
        w, v, b = weights
        pre = x @ w.T + b

        def product(h: Any) -> Any:
            if case.heads == 1:
                return h @ v[0].T
            parts = h.reshape(case.batch, case.heads, -1)
            return jnp.einsum("bhj,hij->bhi", parts, v).reshape(case.batch, case.hidden)

        def step(h: Any, now: Any) -> Any:
            pre, valid = now
            new = act(pre + product(h))
            if valid is None:
                return new, new
            return jnp.where(valid, new, h), jnp.where(valid, new, jnp.zeros_like(new))

        return jax.lax.scan(step, h0, (pre, inside), reverse=reverse)[1]

    def apply(weights: Any, x: Any, hx: Any) -> Any:
        if case.layout == "batch_first":
            x = x.swapaxes(0, 1)
        for number in range(case.layers):
            ways = range(number * case.directions, (number + 1) * case.directions)
            x = jnp.concatenate([layer(weights[i], x, hx[i], bool(i % case.directions)) for i in ways], axis=-1)
        return x.swapaxes(0, 1) if case.layout == "batch_first" else x

    return apply


def _grads(job: Job, got: Any) -> Tensors:
    out, weights, x = got
    found = {"output": to_torch(out), "x": to_torch(x)}
    for (suffix, _, _), (w, v, b) in zip(job.parts(), weights, strict=True):
        square = to_torch(v).reshape(job.case.hidden, -1)
        found |= {f"weight_ih_{suffix}": to_torch(w), f"weight_hh_{suffix}": square, f"bias_{suffix}": to_torch(b)}
    return found


def to_jax(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has none; JAX's own is a NumPy type with the same bits
        return jnp.asarray(tensor.view(torch.int16).numpy().view(jnp.bfloat16))
    return jnp.asarray(tensor.numpy())


def to_torch(array: Any) -> Tensor:
    values = np.array(array)  # a copy that may be written to
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
