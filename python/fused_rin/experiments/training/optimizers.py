"""Which optimizers a run's settings ask for, and their state from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_rin.identity_prior import decoupled, param_groups

from .muon import Muon
from .settings import Settings


def make_optimizers(
    settings: Settings, model: nn.Module, rates_on: torch.device | None = None
) -> list[torch.optim.Optimizer]:
    """The optimizer, and that of the recurrent matrices if they have one of their own.

    Decay is decoupled from the gradient, so that a strength is the same in all of them. A group's "share" multiplies
    its learning rate.

    With `rates_on` they can be captured: the learning rates are tensors on that device, one for each group.
    """
    captured, shares, apart = rates_on is not None, {}, set()
    for name, weight in model.named_parameters():
        if "weight_hh" in name:
            shares[id(weight)] = settings.recurrent_rate
            if settings.recurrent_optimizer == "muon":
                apart.add(id(weight))
        elif ".bias" in name and "head" not in name:
            shares[id(weight)] = settings.bias_rate
    weights: dict[tuple[bool, float, float], list[Tensor]] = {}  # few groups make a quick update
    for group in param_groups(model, identity_decay=settings.identity_decay, weight_decay=settings.weight_decay):
        for weight in group["params"]:
            kind = (id(weight) in apart, group["weight_decay"], shares.get(id(weight), 1.0))
            weights.setdefault(kind, []).append(weight)
    groups: dict[bool, list[dict[str, Any]]] = {}
    for (own, decay, share), members in weights.items():
        rate = torch.tensor(settings.learning_rate, device=rates_on) if captured else settings.learning_rate
        group = {"params": members, "weight_decay": decay, "share": share, "lr": rate}
        groups.setdefault(own, []).append(group)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adam":
        optimizer = torch.optim.Adam(groups[False], eps=settings.eps, fused=True, capturable=captured)
    elif settings.optimizer == "rmsprop":
        # Of its two implementations the one for lists takes a rate in a tensor without reading it.
        foreach = captured or None
        optimizer = torch.optim.RMSprop(groups[False], eps=settings.eps, capturable=captured, foreach=foreach)
    else:
        optimizer = torch.optim.SGD(groups[False], fused=True)
    return [decoupled(optimizer), *([decoupled(Muon(groups[True]))] if apart else [])]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The state alone: the options, such as how a rate is held, are this run's and not the one's that wrote it."""
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved.update({name: value for name, value in own.items() if name != "params"})
    optimizer.load_state_dict(state)
