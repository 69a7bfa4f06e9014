"""U from V and back, and modules with the weights of others.

torch.nn.RNN holds V, a RIN holds U = V - skip * I. The difference is formed in float32 at least: in bfloat16 an entry
of V near 1 has a step of 2^-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize


def is_recurrent_weight(name: str) -> bool:
    """Whether a parameter of this name is a recurrent matrix."""
    return name.startswith("weight_hh")


def add_identity(weight: Tensor, factor: float, num_heads: int = 1) -> Tensor:
    """weight + factor * I, head by head, summed in float32 or better and returned in the dtype of weight."""
    if factor == 0:
        return weight.detach().clone()
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    size = wide.shape[1]
    wide.view(num_heads, size, size).diagonal(dim1=1, dim2=2).add_(factor)
    return wide.to(weight.dtype)


def weight_names(module: torch.nn.Module) -> list[str]:
    """Names of the weights of a recurrent module of torch or of ours."""
    if isinstance(module, torch.nn.RNNBase):
        return list(module._flat_weights_names)
    return ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if module.bias else [])


def why_not(module: torch.nn.Module) -> str | None:
    """Why a recurrent module of torch cannot be converted, or None if it can."""
    kind = type(module)
    if isinstance(module, (torch.nn.LSTM, torch.nn.GRU, torch.nn.LSTMCell, torch.nn.GRUCell)):
        return f"torch.nn.{kind.__name__} has gates; only torch.nn.RNN and RNNCell compute what a RIN computes"
    if not isinstance(module, (torch.nn.RNN, torch.nn.RNNCell)):
        return f"{kind.__name__} is not a torch.nn.RNN or RNNCell"
    if parametrize.is_parametrized(module):
        return "it has parametrizations; remove them first (torch.nn.utils.parametrize.remove_parametrizations)"
    if kind not in (torch.nn.RNN, torch.nn.RNNCell):
        return f"{kind.__name__} is a subclass of torch.nn.{kind.__mro__[1].__name__} and may compute something else"
    missing = [name for name in weight_names(module) if not isinstance(module._parameters.get(name), Tensor)]
    if missing:
        return f"{missing[0]} is not a parameter of it (torch.nn.utils.weight_norm or pruning?)"
    if module.input_size < 1:
        return f"input_size must be greater than zero, got {module.input_size}"
    return None


def arguments_of(module: Any) -> dict[str, Any]:
    """What a recurrent module was made with, by the names torch and we share."""
    names: tuple[str, ...] = ("input_size", "hidden_size", "bias", "nonlinearity")
    if isinstance(module, torch.nn.RNNBase):
        names += ("num_layers", "batch_first", "dropout", "bidirectional")
    return {name: getattr(module, name) for name in names}


def _with_weights(new: Any, weights: Mapping[str, torch.nn.Parameter], training: bool) -> Any:
    for name, weight in weights.items():
        setattr(new, name, weight)
    return new.train(training)


def from_rnn(cls: type, rnn: torch.nn.Module, *, skip: float, backend: str) -> Any:
    """See RIN.from_rnn, RINCell.from_rnn."""
    expected = torch.nn.RNN if issubclass(cls, torch.nn.RNNBase) else torch.nn.RNNCell
    reason = why_not(rnn)
    if reason is None and not isinstance(rnn, expected):
        reason = f"that is torch.nn.{type(rnn).__name__}"
    if reason is not None:
        raise TypeError(f"{cls.__name__}.from_rnn takes a torch.nn.{expected.__name__}, got {type(rnn)}: {reason}")
    new = cls(**arguments_of(rnn), device="meta", skip=skip, backend=backend)
    weights = {}
    for name in weight_names(rnn):
        old = getattr(rnn, name)
        value = add_identity(old, -new.skip_factor if is_recurrent_weight(name) else 0)
        weights[name] = torch.nn.Parameter(value, requires_grad=old.requires_grad)
    return _with_weights(new, weights, rnn.training)


def to_rnn(module: Any) -> Any:
    """See RIN.to_rnn, RINCell.to_rnn."""
    layers = isinstance(module, torch.nn.RNNBase)
    new = (torch.nn.RNN if layers else torch.nn.RNNCell)(**arguments_of(module), device="meta")
    heads = getattr(module, "num_heads", 1)
    weights = {}
    for name in weight_names(module):
        old = getattr(module, name)
        value = old.detach().clone()
        if is_recurrent_weight(name):
            value = add_identity(old, module.skip_factor, heads)
            if heads > 1:
                value = torch.block_diag(*value.chunk(heads))
        weights[name] = torch.nn.Parameter(value, requires_grad=old.requires_grad)
    return _with_weights(new, weights, module.training)
