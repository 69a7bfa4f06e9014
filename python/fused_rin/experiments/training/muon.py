"""Muon for recurrent matrices: steps of a bounded spectral norm.

What a step adds to V is multiplied through all time steps, so it is the spectral norm of a step that has to be small.
Adam bounds its entries: where they agree in sign, n units of rate r make a spectral norm of n r, and a rate that is
safe for such steps is far too small for all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Five steps of X <- a X + (b G + c G^2) X with G = X X^T bring singular values between 0.002 and 1 to between 0.68 and
# 1.21. The numbers are those of https://kellerjordan.github.io/posts/muon.
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5


class Muon(torch.optim.Optimizer):
    """W -= lr * O, where O is the momentum M with its singular values brought near 1 (Jordan et al. 2024).

    As torch.optim.Muon (torch >= 2.9) without weight decay, but in the weights' own precision instead of bfloat16,
    which has no arithmetic of its own on most CPUs (3 ms instead of 33 for 128 x 128 on one core with AVX2), and for
    learning rates in tensors, which are not read, so that a step can be captured in a CUDA graph. Leading dimensions
    are a batch of matrices.

    Args:
        params: matrices [..., rows, columns], or groups of them.
        lr: the spectral norm of a step, nearly; times sqrt(rows / columns) where there are more rows.
        momentum: M <- momentum * M + (1 - momentum) * gradient; the step looks ahead by one gradient (Nesterov).

    Raises ValueError for parameters that are no matrices, a negative lr and a momentum outside [0, 1).
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor = 1e-4, momentum: float = 0.95):
        if not isinstance(lr, Tensor) and lr < 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.dim() < 2:
                    raise ValueError(f"Muon is for matrices, got a parameter of shape {list(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]))
                rows, columns = weight.shape[-2:]
                weight.sub_(update * (group["lr"] * max(1.0, rows / columns) ** 0.5))
        return loss


def orthogonalize(matrix: Tensor) -> Tensor:
    """Matrices [..., rows, columns] with 0.68 to 1.21 in place of each singular value above 0.002 of their norm."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return x if wide else x.mT
