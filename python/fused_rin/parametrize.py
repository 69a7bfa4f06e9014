"""Constraints on recurrent weights, as parametrizations of torch.

    from torch.nn.utils.parametrize import register_parametrization

    rin = RIN(10, 100)
    register_parametrization(rin, "weight_hh_l0", parametrize.Sparsity(mask))
    register_parametrization(rin, "weight_hh_l0", parametrize.DaleLaw(signs))

They are applied in the order in which they were registered, each to what the one before it made, and what is trained
is the tensor that the first one takes. Signs, zeros and a bound on the norm are kept by whichever of the classes here
follow; `LowRank` has two tensors and comes first.

The constrained weight is what `weight_hh_l0` is: of a RIN U, the weights between units. The skip, U + skip * I, is a
unit's own memory and none of these constraints reaches it. With `skip=0` U is all there is.

A weight of `heads` recurrences is [heads * size, size]; every class here treats each head as a matrix of its own, and
"presynaptic unit j" is column j of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["DaleLaw", "LowRank", "NoSelfConnection", "Sparsity", "SpectralNormBound"]


def _by_head(name: str, weight: Tensor) -> Tensor:
    """[heads, size, size]."""
    if weight.dim() != 2 or weight.shape[1] == 0 or weight.shape[0] % weight.shape[1]:
        raise ValueError(
            f"{name}: expected a recurrent weight of shape (heads * size, size), got shape {tuple(weight.shape)}"
        )
    return weight.view(-1, weight.shape[1], weight.shape[1])


class DaleLaw(nn.Module):
    """A unit excites all others or inhibits all others: |X| with the sign of the presynaptic unit.

    U[i, j] = |X[i, j]| * signs[j]. (Song, Yang and Wang 2016, doi:10.1371/journal.pcbi.1004792, rectify X; a weight
    that is rectified to 0 has no gradient any more, one that reaches 0 here turns back.)

    A weight that is registered keeps its magnitudes and takes over the signs.

    Args:
        signs: [heads * size], 1 for a unit that excites, -1 for one that inhibits.

    Raises:
        ValueError: `signs` is not one-dimensional or has other values; or the weight has another number of units.
    """

    signs: Tensor

    def __init__(self, signs: Tensor) -> None:
        super().__init__()
        signs = torch.as_tensor(signs)
        if signs.dim() != 1:
            raise ValueError(f"signs: expected one dimension, got shape {tuple(signs.shape)}")
        if not bool((signs.abs() == 1).all()):
            raise ValueError(f"signs: expected 1 or -1 for every unit, got {sorted(set(signs.tolist()))[:5]}")
        self.register_buffer("signs", signs.detach().to(torch.int8))

    def forward(self, weight: Tensor) -> Tensor:
        heads = _by_head("DaleLaw", weight)
        if self.signs.numel() != weight.shape[0]:
            raise ValueError(f"signs: expected {weight.shape[0]} of them, one for each unit, got {self.signs.numel()}")
        signs = self.signs.to(weight.dtype).view(heads.shape[0], 1, -1)
        return (heads.abs() * signs).view_as(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        self(weight)
        return weight


class Sparsity(nn.Module):
    """Connections that there are not: U = X * mask.

    Args:
        mask: of the weight's shape, [heads * size, size], True or 1 where there is a connection.

    Raises:
        ValueError: `mask` has values other than 0 and 1; or the weight has another shape.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        mask = torch.as_tensor(mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"mask: expected 0 and 1, got {sorted(set(mask.flatten().tolist()))[:5]}")
        self.register_buffer("mask", mask.detach().to(torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        if self.mask.shape != weight.shape:
            raise ValueError(f"mask: expected shape {tuple(weight.shape)}, got {tuple(self.mask.shape)}")
        return torch.where(self.mask, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self(weight)


class NoSelfConnection(nn.Module):
    """No unit is connected to itself: the diagonal of U is 0. (Its skip remains.)"""

    def forward(self, weight: Tensor) -> Tensor:
        heads = _by_head("NoSelfConnection", weight)
        diagonal = torch.eye(heads.shape[1], dtype=torch.bool, device=weight.device)
        return torch.where(diagonal, 0, heads).view_as(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self(weight)


class LowRank(nn.Module):
    """U = m n^T / size with m and n [heads * size, rank] (Mastrogiuseppe and Ostojic 2018,
    doi:10.1016/j.neuron.2018.07.003).

    What is trained are m and n, `parametrizations.weight_hh_l0.original0` and `original1`. A weight that is registered
    becomes the nearest one of this rank, by its singular values, each split evenly. At U = 0 m and n would be 0, where
    they have no gradient: register it with other weights.

    Args:
        rank: from 1 to the size.

    Raises:
        ValueError: `rank` is less than 1, or more than the size; or the weight is 0.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {rank}")
        self.rank = rank

    def forward(self, m: Tensor, n: Tensor) -> Tensor:
        heads = m.shape[0] // self._size(m, n)
        left, right = m.view(heads, -1, self.rank), n.view(heads, -1, self.rank)
        size = left.shape[1]
        return (left @ right.mT / size).reshape(m.shape[0], size)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        heads = _by_head("LowRank", weight)
        size = heads.shape[1]
        if self.rank > size:
            raise ValueError(f"rank: expected at most the {size} units of a head, got {self.rank}")
        if not bool(heads.flatten(1).any(1).all()):
            raise ValueError("LowRank: expected a weight other than 0, at which m and n would have no gradient")
        self.size = size
        left, values, right = torch.linalg.svd(heads.to(torch.promote_types(weight.dtype, torch.float32)))
        root = (values[:, None, : self.rank] * size).sqrt()
        m, n = left[:, :, : self.rank] * root, right.mT[:, :, : self.rank] * root
        return m.reshape(-1, self.rank).to(weight.dtype), n.reshape(-1, self.rank).to(weight.dtype)

    def _size(self, m: Tensor, n: Tensor) -> int:
        if m.shape != n.shape or m.dim() != 2 or m.shape[1] != self.rank:
            got = f"{tuple(m.shape)} and {tuple(n.shape)}"
            raise ValueError(f"LowRank: expected m and n of one shape (units, {self.rank}), got {got}")
        return self.size

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


class SpectralNormBound(nn.Module):
    """The largest singular value of U stays below a bound: U = X * min(1, bound / sigma(X)), head by head.

    sigma is estimated by power iteration (Miyato et al. 2018, arXiv:1802.05957), as torch's `spectral_norm` does, which
    sets the norm to 1 where this one leaves a smaller norm alone. Each evaluation in training mode goes on from the
    vectors of the one before; sigma is approached from below, so the bound is met up to what the iteration has not
    reached yet. Its gradient is that of sigma at these vectors.

    With skip s the norm of U + s I is at most bound + |s|.

    Args:
        bound: more than 0.
        n_power_iterations: in each evaluation in training mode; at registration there are 30 of them.

    Raises:
        ValueError: `bound` is not a positive number, or `n_power_iterations` is less than 1.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, bound: float, n_power_iterations: int = 1) -> None:
        super().__init__()
        if not (bound > 0 and math.isfinite(bound)):
            raise ValueError(f"bound: expected a positive number, got {bound}")
        if n_power_iterations < 1:
            raise ValueError(f"n_power_iterations: expected 1 or more, got {n_power_iterations}")
        self.bound, self.n_power_iterations = float(bound), n_power_iterations
        self.register_buffer("_u", torch.empty(0))
        self.register_buffer("_v", torch.empty(0))

    @torch.no_grad()
    def _iterate(self, heads: Tensor, times: int) -> None:
        for _ in range(times):
            self._v.copy_(nn.functional.normalize((heads.mT @ self._u[..., None])[..., 0], dim=-1))
            self._u.copy_(nn.functional.normalize((heads @ self._v[..., None])[..., 0], dim=-1))

    def forward(self, weight: Tensor) -> Tensor:
        heads = _by_head("SpectralNormBound", weight)
        if self._u.numel() == 0:  # after other parametrizations
            self._start(heads)
        elif self.training:
            self._iterate(heads, self.n_power_iterations)
        u, v = self._u.clone(), self._v.clone()  # a later evaluation changes them before this one's backward
        sigma = (u[:, None] @ heads @ v[..., None])[:, 0, 0]
        factor = (self.bound / sigma.clamp(min=torch.finfo(weight.dtype).tiny)).clamp(max=1)
        return (heads * factor[:, None, None]).view_as(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        self._start(_by_head("SpectralNormBound", weight))
        return weight

    @torch.no_grad()
    def _start(self, heads: Tensor) -> None:
        self._u = nn.functional.normalize(torch.randn_like(heads[..., 0]), dim=-1)
        self._v = torch.empty_like(self._u)
        self._iterate(heads, 30)

    def extra_repr(self) -> str:
        return f"bound={self.bound}, n_power_iterations={self.n_power_iterations}"
