"""The pull towards identity: a Gaussian prior N(I, sigma^2) on the recurrent matrix V = U + I, as decay or as penalty.

Writing V = U + I changes no function; what it changes is where anything that keeps weights small pulls:
decay of U pulls to identity, to remembering, decay of V pulls to zero, to forgetting. With a loss that is a
mean over N samples, the maximum a posteriori estimate under V_ij ~ N(I_ij, sigma^2) minimises

    (1/N) sum_n loss_n + (strength / 2) ||V - I||^2,    strength = 1 / (sigma^2 N)

(the logarithm of the posterior, divided by -N): a *constant* strength is a prior that grows with the data,
and a fixed prior is a strength that vanishes against them.

    strength = prior_strength(sigma=0.1, samples=50_000)                # or any constant
    groups = param_groups(model, identity_decay=strength, weight_decay=1e-4)
    optimizer = decoupled(torch.optim.RMSprop(groups, lr=1e-3))         # AdamW needs no `decoupled`
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fused_rin.modules import RIN, RINCell

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


def prior_strength(sigma: float, samples: int) -> float:
    """1 / (sigma^2 N): the strength a prior of standard deviation `sigma` has against a mean loss over N samples.

    Raises ValueError unless both are positive.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
    if samples <= 0:
        raise ValueError(f"samples must be positive, got {samples}")
    return 1.0 / (sigma * sigma * samples)


def param_groups(model: nn.Module, *, identity_decay: float = 0.0, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: U with `identity_decay`, other weights with `weight_decay`.

    Every trainable parameter is in exactly one of the three groups: the recurrent matrices whose identity
    is fixed (`weight_hh` of a RIN or RINCell with skip != 0, and what a module lists in a method
    `identity_weights()`), all others of two dimensions or more, and the rest (biases, gains), which do not
    decay. Decay of U pulls V to skip * I. Recurrent matrices in the V form (torch.nn.RNN, skip = 0) are
    other weights: their decay pulls to zero.

    How an optimizer decays is its own affair. AdamW shrinks the weight, w *= 1 - lr * decay; SGD, Adam and
    RMSprop add decay * w to the gradient, which is the same for SGD without momentum only: Adam and RMSprop
    normalise the sum. See `decoupled`.

    Raises ValueError for a negative decay, and for an identity_decay on a model without such a matrix or
    with one that is computed from other parameters (torch.nn.utils.parametrize).
    """
    for name, value in (("identity_decay", identity_decay), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    identity: dict[int, Tensor] = {}
    for path, weight, skip in _weights(model):
        if skip and not isinstance(weight, nn.Parameter):
            if identity_decay:
                raise ValueError(f"identity_decay cannot act on {path}: it is parametrized; use identity_penalty")
        elif skip and weight.requires_grad:
            identity[id(weight)] = weight
    if identity_decay and not identity:
        raise ValueError("identity_decay needs a RIN with skip != 0 in the model, there is none")
    others: dict[int, Tensor] = {}
    rest: dict[int, Tensor] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in identity:
            (others if parameter.dim() >= 2 else rest)[id(parameter)] = parameter
    groups = ((identity, identity_decay), (others, weight_decay), (rest, 0.0))
    return [{"params": list(group.values()), "weight_decay": decay} for group, decay in groups if group]


def decoupled(optimizer: Optimizer) -> Optimizer:
    """Takes the weight decay of every group out of the optimizer's hands: before a step, weight *= 1 - lr * decay.

    So it acts the same in every optimizer (Loshchilov and Hutter, arXiv 1711.05101). Learning rate
    schedules are followed. Changes the optimizer in place and returns it; a second call changes nothing, but
    is needed where torch drops the hook: for a copy or an unpickled optimizer. State dicts keep the decay.
    """
    if _decay not in optimizer._optimizer_step_pre_hooks.values():
        optimizer.register_step_pre_hook(_decay)
    for group in optimizer.param_groups:
        group["decoupled_decay"] = group.get("decoupled_decay", 0.0) + group.get("weight_decay", 0.0)
        group["weight_decay"] = 0.0
    return optimizer


@torch.no_grad()
def _decay(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("decoupled_decay"):
            factor = 1.0 - group["lr"] * group["decoupled_decay"]  # a rate in a tensor is not read: it may be captured
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(factor)


def identity_penalty(model: nn.Module, strength: float = 1.0) -> Tensor:
    """strength / 2 * sum of ||V - I||^2 over the recurrent matrices of the model: a differentiable 0-dim term.

    Its gradient is strength * (V - I), which for a RIN is strength * U. Works on V forms as well, and pulls to
    I whatever the skip. A matrix that several modules share counts once. 16-bit weights are summed in float32.

    Raises ValueError when the model has no recurrent matrix with a ReLU or tanh.
    """
    squares = [(difference * difference).sum() for _, difference in _differences(model)]
    return 0.5 * strength * torch.stack(squares).sum()


@torch.no_grad()
def identity_distance(model: nn.Module) -> dict[str, float]:
    """||V - I|| (Frobenius) of every recurrent matrix of the model, by parameter name.

    V = U + skip * I for RIN and RINCell, `weight_hh` itself for torch.nn.RNN and torch.nn.RNNCell.

    Raises ValueError as `identity_penalty` does.
    """
    return {name: difference.norm().item() for name, difference in _differences(model)}


def recurrent_matrices(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(parameter name, V) of every plain recurrent matrix, V of shape [heads, D, D], differentiable, in
    float32 where the weight has 16 bits.

    Raises ValueError as `identity_penalty` does.
    """
    return [(name, heads + skip * _eye(heads) if skip else heads) for name, heads, skip in _heads(model)]


def _differences(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """V - I = U + (skip - 1) I; never by way of U + I, which would round U to what is left beside 1."""
    for name, heads, skip in _heads(model):
        yield name, heads if skip == 1 else heads + (skip - 1) * _eye(heads)


def _heads(model: nn.Module) -> list[tuple[str, Tensor, float]]:
    """(name, U or V as [heads, D, D], skip) of every recurrent matrix; shared ones once, by their first name."""
    found: dict[tuple[int, float], tuple[str, Tensor, float]] = {}
    for name, weight, skip in _weights(model):
        found.setdefault((id(weight), skip), (name, weight, skip))
    if not found:
        raise ValueError("the model has no recurrent matrix of a RIN, RINCell, torch.nn.RNN or torch.nn.RNNCell")
    heads = []
    for name, weight, skip in found.values():
        wide = weight.float() if weight.dtype.itemsize == 2 else weight
        heads.append((name, wide.reshape(-1, weight.shape[-1], weight.shape[-1]), skip))
    return heads


def _eye(heads: Tensor) -> Tensor:
    return torch.eye(heads.shape[-1], dtype=heads.dtype, device=heads.device)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, float]]:
    """(name in the model, weight_hh, skip) of every recurrent matrix of every module."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        identity_weights = getattr(module, "identity_weights", None)
        if callable(identity_weights):
            own = {id(weight): name for name, weight in module.named_parameters(recurse=False)}
            for weight in identity_weights():
                yield prefix + own[id(weight)], weight, 1.0
        elif isinstance(module, (RIN, RINCell, nn.RNN, nn.RNNCell)):
            skip = module.skip_factor if isinstance(module, (RIN, RINCell)) else 0.0
            names = module._flat_weights_names if isinstance(module, nn.RNNBase) else ["weight_hh"]
            for name in names:
                if name.startswith("weight_hh"):  # read as attribute: a parametrized weight is no parameter
                    yield prefix + name, getattr(module, name), skip
