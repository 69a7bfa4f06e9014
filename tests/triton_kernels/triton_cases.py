"""Random problems, the sweeps as plain PyTorch loops, and the tolerance rule."""

from __future__ import annotations

import dataclasses

import torch
from fused_rin import triton_kernels
from fused_rin.reference import recurrence
from torch import Tensor


@dataclasses.dataclass
class Case:
    """One problem with all its inputs; `build` makes a random one."""

    pre: Tensor
    weight: Tensor
    h0: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None
    resets: Tensor | None
    skip: float
    activation: str
    num_reversed: int

    @staticmethod
    def build(
        steps: int, batch: int, groups: int, hidden: int, dtype: torch.dtype, *, skip: float = 1.0,
        activation: str = "relu", num_reversed: int = 0, lengths: bool = False, packed: bool = False,
        resets: bool = False, h0: bool = True, seed: int = 0, device: str = "cpu",
    ) -> Case:  # fmt: skip
        rng = torch.Generator().manual_seed(1000 * seed + 100 * steps + 10 * batch + hidden)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng)

        # U of spectral radius near 0.5 and a mean below zero keep the state of ReLU with skip = 1 of order one.
        weight = 0.5 * normal(groups, hidden, hidden) / hidden**0.5 - 0.5 * torch.eye(hidden)
        rows: tuple[int, ...] = (steps, batch)
        o_lengths = o_offsets = None
        if lengths or packed:
            o_lengths = torch.randint(1 if packed else 0, steps + 1, (batch,), generator=rng)
            o_lengths[0] = steps
        if packed:
            o_lengths = o_lengths.sort(descending=True).values
            batch_sizes = (torch.arange(steps)[:, None] < o_lengths).sum(1)
            o_offsets = batch_sizes.cumsum(0) - batch_sizes
            rows = (int(batch_sizes.sum()),)
        case = Case(
            pre=normal(*rows, groups, hidden).to(dtype),
            weight=weight.to(dtype),
            h0=normal(batch, groups, hidden).to(dtype) if h0 else None,
            lengths=o_lengths,
            offsets=o_offsets,
            resets=torch.rand(rows, generator=rng) < 0.3 if resets else None,
            skip=skip,
            activation=activation,
            num_reversed=num_reversed,
        )
        return case.to(device)

    def to(self, where: object) -> Case:
        """On another device, or with floating-point tensors in another dtype."""
        moved = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and (value.is_floating_point() or not isinstance(where, torch.dtype)):
                value = value.to(where)
            moved[field.name] = value
        return Case(**moved)

    @property
    def batch(self) -> int:
        return self.pre.shape[1] if self.lengths is None else self.lengths.numel()

    def options(self) -> dict:
        return {"skip": self.skip, "activation": self.activation, "num_reversed": self.num_reversed}

    def kernel_forward(self, plan: object = None) -> tuple[Tensor, Tensor]:
        return triton_kernels.forward(
            self.pre, self.weight, self.h0, self.lengths, self.offsets, self.resets, **self.options(), plan=plan
        )

    def kernel_backward(
        self, out: Tensor, grad_out: Tensor | None, grad_h_n: Tensor | None, plan: object = None
    ) -> tuple[Tensor, Tensor]:
        return triton_kernels.backward(
            grad_out, grad_h_n, self.weight, out, self.lengths, self.offsets, self.resets, **self.options(), plan=plan
        )

    def reference_forward(self) -> tuple[Tensor, Tensor]:
        return recurrence(self.pre, self.weight, self.h0, self.lengths, self.offsets, self.resets, **self.options())

    def reference_backward(
        self, out: Tensor, grad_out: Tensor | None, grad_h_n: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The backward sweep step by step, from the saved `out`: no derivative is near a kink of its own."""
        steps = out.shape[0] if self.offsets is None else self.offsets.numel()
        rows = out.reshape(-1, *out.shape[-2:])
        grads = torch.zeros_like(rows) if grad_out is None else grad_out.reshape(rows.shape)
        resets = None if self.resets is None else self.resets.reshape(-1)
        grad_pre = torch.zeros_like(rows)
        c = out.new_zeros(self.batch, *out.shape[-2:]) if grad_h_n is None else grad_h_n.clone()
        for g in range(self.weight.shape[0]):
            reverse = g >= self.weight.shape[0] - self.num_reversed
            for t in range(steps) if reverse else range(steps - 1, -1, -1):
                for b in range(self.batch):
                    length = steps if self.lengths is None else int(self.lengths[b])
                    if t >= length:
                        continue
                    row = self._row(t, b)
                    a, h = grads[row, g] + c[b, g], rows[row, g]
                    if self.activation == "relu":
                        a = torch.where(h <= 0, 0, a)
                    elif self.activation == "tanh":
                        a = a * (1 - h * h)
                    grad_pre[row, g] = a
                    c[b, g] = a @ self.weight[g] + self.skip * a if self.skip else a @ self.weight[g]
                    boundary = t + 1 if reverse else t
                    if resets is not None and boundary < length and resets[self._row(boundary, b)]:
                        c[b, g] = 0
        return grad_pre.reshape(out.shape), c

    def _row(self, t: int, b: int) -> int:
        return t * self.batch + b if self.offsets is None else int(self.offsets[t]) + b


def assert_as_exact_as_torch(got: Tensor, exact: Tensor, plain: Tensor, factor: float, what: str) -> None:
    """The error against float64 is at most `factor` times plain PyTorch's in the same dtype, plus one rounding of 1."""
    assert (got.dtype, got.shape) == (plain.dtype, exact.shape), what
    assert not (got.isnan() ^ exact.isnan()).any(), f"{what}: NaN in other places than in the reference"
    if got.numel() == 0:
        return
    atol = torch.finfo(got.dtype).eps * max(1.0, exact.nan_to_num().abs().max().item())
    error = (got.double() - exact).abs().nan_to_num().max().item()
    bound = factor * (plain.double() - exact).abs().nan_to_num().max().item() + atol
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"


def check_forward(case: Case, plan: object = None) -> None:
    got, exact, plain = case.kernel_forward(plan), case.to(torch.float64).reference_forward(), case.reference_forward()
    for k, what in enumerate(("out", "h_n")):
        assert_as_exact_as_torch(got[k], exact[k], plain[k], 2, what)


def check_backward(case: Case, plan: object = None, *, with_out: bool = True, with_state: bool = True) -> None:
    rng = torch.Generator().manual_seed(7)
    out = case.reference_forward()[0]

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng).to(like)

    state = out.new_empty(case.batch, *out.shape[-2:])
    grad_out, grad_h_n = normal(out) if with_out else None, normal(state) if with_state else None
    got = case.kernel_backward(out, grad_out, grad_h_n, plan)
    wide = [None if x is None else x.double() for x in (out, grad_out, grad_h_n)]
    exact = case.to(torch.float64).reference_backward(*wide)
    plain = case.reference_backward(out, grad_out, grad_h_n)
    for k, what in enumerate(("grad_pre", "grad_h0")):
        assert_as_exact_as_torch(got[k], exact[k], plain[k], 3, what)
