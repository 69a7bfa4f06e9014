"""From torch.nn.RNN and back: single modules, whole models, and checkpoints.

torch.nn.RNN holds V, a RIN holds U = V - skip * I. The difference is formed in float32 at least: in bfloat16 an entry
of V near 1 has a step of 2^-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fused_rin.skip import SkipModule

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def _is_recurrent_weight(name: str) -> bool:
    return name.startswith("weight_hh")


def add_identity(weight: Tensor, factor: float, num_heads: int = 1) -> Tensor:
    """weight + factor * I, head by head, summed in float32 or better and returned in the dtype of weight."""
    if factor == 0:
        return weight.detach().clone()
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    size = wide.shape[1]
    wide.view(num_heads, size, size).diagonal(dim1=1, dim2=2).add_(factor)
    return wide.to(weight.dtype)


def _why_not(module: torch.nn.Module) -> str | None:
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
    missing = [name for name in _names(module) if not isinstance(module._parameters.get(name), Tensor)]
    if missing:
        return f"{missing[0]} is not a parameter of it (torch.nn.utils.weight_norm or pruning?)"
    return None


def _names(module: torch.nn.Module) -> list[str]:
    if isinstance(module, torch.nn.RNNBase):
        return list(module._flat_weights_names)
    return ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if module.bias else [])


def _arguments(module: Any) -> dict[str, Any]:
    names: tuple[str, ...] = ("input_size", "hidden_size", "bias", "nonlinearity")
    if isinstance(module, torch.nn.RNNBase):
        names += ("num_layers", "batch_first", "dropout", "bidirectional")
    return {name: getattr(module, name) for name in names}


def _adopt(new: Any, old: torch.nn.Module, weights: Mapping[str, torch.nn.Parameter]) -> Any:
    for name, weight in weights.items():
        setattr(new, name, weight)
    if isinstance(new, SkipModule):
        new.skip = new.skip.to(weights[_names(old)[0]].device)
    return new.train(old.training)


def from_rnn(cls: type, rnn: torch.nn.Module, *, skip: float, backend: str) -> Any:
    """See RIN.from_rnn, RINCell.from_rnn."""
    expected = torch.nn.RNN if issubclass(cls, torch.nn.RNNBase) else torch.nn.RNNCell
    reason = _why_not(rnn)
    if reason is None and not isinstance(rnn, expected):
        reason = f"that is torch.nn.{type(rnn).__name__}"
    if reason is not None:
        raise TypeError(f"{cls.__name__}.from_rnn takes a torch.nn.{expected.__name__}, got {type(rnn)}: {reason}")
    new = cls(**_arguments(rnn), device="meta", skip=skip, backend=backend)
    weights = {}
    for name in _names(rnn):
        old = getattr(rnn, name)
        value = add_identity(old, -new.skip_factor if _is_recurrent_weight(name) else 0)
        weights[name] = torch.nn.Parameter(value, requires_grad=old.requires_grad)
    new._buffers["skip"] = torch.tensor(new.skip_factor)
    return _adopt(new, rnn, weights)


def to_rnn(module: Any) -> Any:
    """See RIN.to_rnn, RINCell.to_rnn."""
    layers = isinstance(module, torch.nn.RNNBase)
    new = (torch.nn.RNN if layers else torch.nn.RNNCell)(**_arguments(module), device="meta")
    heads = getattr(module, "num_heads", 1)
    weights = {}
    for name in _names(module):
        old = getattr(module, name)
        value = old.detach().clone()
        if _is_recurrent_weight(name):
            value = add_identity(old, module.skip_factor, heads)
            if heads > 1:
                value = torch.block_diag(*value.chunk(heads))
        weights[name] = torch.nn.Parameter(value, requires_grad=old.requires_grad)
    return _adopt(new, module, weights)


@dataclass
class Replaced:
    """What `replace_rnn` did: the model, the names of modules it replaced, and those it left alone with the reason."""

    model: torch.nn.Module
    replaced: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}: {', '.join(map(repr, self.replaced)) or 'none'}"]
        lines += [f"left alone {name!r}: {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)


def replace_rnn(model: torch.nn.Module, *, skip: float = 0.0, backend: str = "auto") -> Replaced:
    """Replace every torch.nn.RNN and RNNCell of a model, in place, by a RIN or RINCell with equal outputs.

    With skip=0, the default, the new modules take over the very Parameter objects: an optimizer made before, tied
    weights and checkpoints of the old model stay valid. With another skip the recurrent matrices become new
    parameters, U = V - skip * I, so make the optimizer afterwards; decay of weights then pulls towards identity.

    Hooks, training mode and `requires_grad` are kept. Gated modules, subclasses and parametrized modules are left
    alone; the result says which and why, and prints. If the model itself is a torch.nn.RNN, take `.model`.
    """
    from fused_rin.modules import RIN, RINCell  # modules.py knows this file, for its from_rnn

    report = Replaced(model)
    done: dict[int, torch.nn.Module] = {}
    weights: dict[int, torch.nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SkipModule) or not isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
            continue
        reason = _why_not(module)
        if reason is not None:
            report.left_alone[name] = reason
            continue
        if id(module) not in done:
            cls = RIN if isinstance(module, torch.nn.RNN) else RINCell
            new = from_rnn(cls, module, skip=skip, backend=backend)
            for weight_name in _names(module):
                old = getattr(module, weight_name)
                if skip == 0 or not _is_recurrent_weight(weight_name):
                    setattr(new, weight_name, old)
                else:  # a matrix that two modules share stays shared
                    setattr(new, weight_name, weights.setdefault(id(old), getattr(new, weight_name)))
            for hooks in _HOOKS:
                if hooks in module.__dict__:
                    new.__dict__[hooks] = module.__dict__[hooks]
            done[id(module)] = new
        if name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, done[id(module)])
        else:
            report.model = done[id(module)]
        report.replaced.append(name)
    return report


def load_rnn_state_dict(model: torch.nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """`model.load_state_dict` for a checkpoint saved when the model's RINs were torch.nn.RNNs: V becomes U.

    Entries of RINs that the checkpoint holds as such (it has their `skip`) are loaded as they are. The given
    dictionary is not changed. Returns and raises what `load_state_dict` does, and ValueError for a RIN with heads.
    """
    converted = dict(state_dict)
    for name, module in model.named_modules():
        if not isinstance(module, SkipModule):
            continue
        prefix = f"{name}." if name else ""
        if f"{prefix}skip" in converted or f"{prefix}{module._first_recurrent_weight}" not in converted:
            continue
        if getattr(module, "num_heads", 1) > 1:
            raise ValueError(
                f"{prefix}{module._first_recurrent_weight}: expected a RIN without heads, got num_heads="
                f"{module.num_heads}; a torch.nn.RNN's matrix has no blocks"
            )
        for weight_name in filter(_is_recurrent_weight, _names(module)):
            if prefix + weight_name in converted:
                converted[prefix + weight_name] = add_identity(converted[prefix + weight_name], -module.skip_factor)
        converted[f"{prefix}skip"] = torch.tensor(module.skip_factor)
    return model.load_state_dict(converted, strict=strict)
