"""Whole models from torch.nn.RNN and back, and their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch

from fused_rin.modules import RIN, RINCell
from fused_rin.skip import SkipModule
from fused_rin.weights import add_identity, from_rnn, is_recurrent_weight, to_rnn, weight_names, why_not

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
# What an instance of a recurrent module has of itself: torch's, and ours beside that.
_TORCHS = frozenset({
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "mode", "input_size",
    "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size", "nonlinearity",
    "_flat_weights_names", "_all_weights", "_flat_weights", "_flat_weight_refs", *_HOOKS,
})  # fmt: skip
_OURS = frozenset({"skip_factor", "num_heads", "backend", "_written_weights", "_checkpoint_steps", "return_sequences"})


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


def _added(old: torch.nn.Module) -> dict[str, Any]:
    """What somebody set on the instance."""
    own = _TORCHS | _OURS if isinstance(old, SkipModule) else _TORCHS
    return {name: value for name, value in old.__dict__.items() if name not in own}


def _why_not_carried(old: torch.nn.Module, cls: type) -> str | None:
    """Why what was added to an instance cannot go over to one of `cls`, or None."""
    names = [*_added(old), *(name for group in (old._parameters, old._buffers, old._modules) for name in group)]
    for name in names:
        if name in weight_names(old):
            continue
        if name in old.__dict__ and hasattr(type(old), name):
            return f"its {name} was replaced on the instance, by what may still need the old module"
        if hasattr(cls, name) or name in _OURS:
            return f"its {name} was added to the instance, and {cls.__name__} has its own"
    return None


def _carry_over(old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Hooks, and what was added to the instance: attributes, buffers, parameters, submodules."""
    for hooks in _HOOKS:
        if hooks not in old.__dict__:
            continue
        kept = new.__dict__[hooks] = old.__dict__[hooks]  # the same dict, in which handles look for their hook
        if isinstance(kept, dict):
            for key, hook in kept.items():
                if getattr(hook, "with_module", False):  # it is told of its module, by a weak reference
                    kept[key] = type(hook)(hook.hook, new)
    new.__dict__.update(_added(old))
    for group in ("_parameters", "_buffers", "_modules"):
        own = new.__dict__[group]
        own.update({name: value for name, value in old.__dict__[group].items() if name not in own})
    new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)


class _Exchange:
    """Modules to put in the place of others, all made before any is put there."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.report = Replaced(model)
        self._new: dict[int, torch.nn.Module] = {}
        self._pairs: list[tuple[torch.nn.Module, torch.nn.Module]] = []
        self._parents: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []

    def known(self, old: torch.nn.Module) -> bool:
        return id(old) in self._new

    def add(self, old: torch.nn.Module, new: torch.nn.Module) -> None:
        self._new[id(old)] = new
        self._pairs.append((old, new))

    def place(self, name: str, old: torch.nn.Module) -> None:
        if name:
            parent, _, child = name.rpartition(".")
            self._parents.append((self.report.model.get_submodule(parent), child, self._new[id(old)]))
        self.report.replaced.append(name)

    def carry_out(self) -> Replaced:
        for old, new in self._pairs:
            _carry_over(old, new)
        for parent, child, new in self._parents:
            parent._modules[child] = new
        self.report.model = self._new.get(id(self.report.model), self.report.model)
        return self.report


@overload
def replace_rnn(
    model: torch.nn.Module, *, skip: float = ..., backend: str = ..., report: Literal[False] = ...
) -> torch.nn.Module: ...
@overload
def replace_rnn(
    model: torch.nn.Module, *, skip: float = ..., backend: str = ..., report: Literal[True]
) -> Replaced: ...
def replace_rnn(
    model: torch.nn.Module, *, skip: float = 0.0, backend: str = "auto", report: bool = False
) -> torch.nn.Module | Replaced:
    """Replace every torch.nn.RNN and RNNCell of a model, in place, by a RIN or RINCell with equal outputs.

    With skip=0, the default, the new modules take over the very Parameter objects: an optimizer made before, tied
    weights and checkpoints of the old model stay valid, in both directions. With another skip the recurrent matrices
    become new parameters, U = V - skip * I, so make the optimizer afterwards; decay of weights then pulls towards
    identity.

    Hooks, training mode, `requires_grad`, and what was added to an instance (attributes, buffers, parameters,
    submodules) are kept. Gated modules, subclasses, parametrized modules and those with a replaced method are left
    alone. All or nothing: nothing is replaced where something raises.

    Returns the model (the new module, if the model itself is a torch.nn.RNN), or with report=True what was done, which
    prints: `Replaced` names the modules that were replaced, and those that were left alone, with the reason.
    """
    exchange = _Exchange(model)
    shared: dict[int, torch.nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SkipModule) or not isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
            continue
        cls = RIN if isinstance(module, torch.nn.RNNBase) else RINCell
        reason = why_not(module) or _why_not_carried(module, cls)
        if reason is not None:
            exchange.report.left_alone[name] = reason
            continue
        if not exchange.known(module):
            new = from_rnn(cls, module, skip=skip, backend=backend)
            for weight_name in weight_names(module):
                old = getattr(module, weight_name)
                if skip == 0 or not is_recurrent_weight(weight_name):
                    setattr(new, weight_name, old)
                else:  # a matrix that two modules share stays shared
                    setattr(new, weight_name, shared.setdefault(id(old), getattr(new, weight_name)))
            exchange.add(module, new)
        exchange.place(name, module)
    done = exchange.carry_out()
    return done if report else done.model


def restore_rnn(model: torch.nn.Module) -> torch.nn.Module:
    """The inverse of `replace_rnn`: every RIN and RINCell of a model becomes a torch.nn.RNN or RNNCell, in place.

    Outputs are equal up to rounding. Where skip is 0 and there are no heads the very Parameter objects are kept. For
    what knows torch's own modules alone: torch.jit.script, ExecuTorch, other exporters. Returns the model (the new
    module, if the model itself is a RIN). Raises TypeError, before anything is changed, for a subclass of ours, whose
    code would be lost.
    """
    exchange = _Exchange(model)
    shared: dict[int, torch.nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, (RIN, RINCell)):
            continue
        if type(module) not in (RIN, RINCell):
            raise TypeError(f"{name or 'the model'}: {type(module).__name__} is a subclass and may compute more")
        if not exchange.known(module):
            new = to_rnn(module)
            for weight_name in weight_names(module):
                old, plain = getattr(module, weight_name), isinstance(module, RINCell) or module.num_heads == 1
                if not is_recurrent_weight(weight_name) or (module.skip_factor == 0 and plain):
                    setattr(new, weight_name, old)
                else:
                    setattr(new, weight_name, shared.setdefault(id(old), getattr(new, weight_name)))
            exchange.add(module, new)
        exchange.place(name, module)
    return exchange.carry_out().model


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
        for weight_name in filter(is_recurrent_weight, weight_names(module)):
            if prefix + weight_name in converted:
                converted[prefix + weight_name] = add_identity(converted[prefix + weight_name], -module.skip_factor)
        converted[f"{prefix}skip"] = module.skip
    return model.load_state_dict(converted, strict=strict)
