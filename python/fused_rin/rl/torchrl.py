"""A RIN as TorchRL's LSTMModule and GRUModule are: single steps in a rollout, sequences with `is_init` in an update.

Theirs cut a batch of sequences where episodes start, pad the pieces and put them together again, or go through time
step by step. Here `is_init` are a RIN's `resets`, and a batch is one call.

    from fused_rin.rl.torchrl import RINModule

    rin = RINModule(3, 64, in_key="observation", out_key="features", nonlinearity="tanh", skip=0.0)
    env.append_transform(InitTracker()); env.append_transform(rin.make_tensordict_primer())
    with set_recurrent_mode(True):
        rin(batch)
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key_list
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import recurrent_mode

from fused_rin.modules import RIN
from fused_rin.recurrent import Recurrent


class RINModule(TensorDictModuleBase):
    """A RIN, or another recurrent module of this package, on tensordicts.

    Args:
        input_size, hidden_size, num_layers, and any others of `rnn_class`, a RIN by default; or in their place
        rnn: a module that is there, with batch_first=False and one direction.
        in_key: of the input; the state is read at "recurrent_state". Or in_keys: [input, state].
        out_key: of the output; the state is written to ("next", "recurrent_state"). Or out_keys: [output, state].
        default_recurrent_mode: the mode where torchrl.modules.set_recurrent_mode says nothing.

    Single steps: input (*, features), state (*, num_layers, hidden_size) or missing, which is zero, "is_init" (*, 1).
    In recurrent mode the last dimension of the tensordict is time, and of the states given the first one counts; of
    those that are returned, with several layers, all but the last are zero. Where "is_init" is true the state is zero.

    Raises ValueError for both or none of in_key and in_keys (out_key and out_keys), and for an `rnn` that does not fit.
    """

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        num_layers: int = 1,
        *,
        rnn: Recurrent | None = None,
        rnn_class: type[Recurrent] = RIN,
        in_key: Any = None,
        in_keys: Any = None,
        out_key: Any = None,
        out_keys: Any = None,
        default_recurrent_mode: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if rnn is None:
            if input_size is None or hidden_size is None:
                raise ValueError("input_size and hidden_size must be given, or rnn")
            make: Any = rnn_class
            rnn = make(input_size, hidden_size, num_layers, **options)
        elif input_size is not None or hidden_size is not None or options:
            raise ValueError("rnn cannot be given with the arguments of a new one")
        if rnn.batch_first or rnn.bidirectional or not rnn.return_sequences:
            raise ValueError(
                "rnn must have batch_first=False, bidirectional=False and return_sequences=True, got "
                f"{rnn.batch_first}, {rnn.bidirectional} and {rnn.return_sequences}"
            )
        self.rnn: Recurrent = rnn
        self.in_keys = [*_keys("in", in_key, in_keys, "recurrent_state"), "is_init"]
        self.out_keys = _keys("out", out_key, out_keys, ("next", "recurrent_state"))
        self.default_recurrent_mode = default_recurrent_mode

    @property
    def recurrent_mode(self) -> bool:
        """Whether sequences are expected now."""
        mode = recurrent_mode()
        return self.default_recurrent_mode if mode is None else bool(mode)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform of an environment that carries the state from step to step, from zero."""
        state, after = (key if isinstance(key, tuple) else (key,) for key in (self.in_keys[1], self.out_keys[1]))
        if after != ("next", *state):
            raise ValueError(f"the state must be written to {('next', *state)}, to be read again, got {after}")
        shape = (self.rnn.num_layers, self.rnn.hidden_size)
        return TensorDictPrimer({state: Unbounded(shape=shape)}, expand_specs=True)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes output and state into the tensordict, and returns it."""
        rnn, shape = self.rnn, tensordict.shape
        if self.recurrent_mode and not shape:
            raise ValueError("in recurrent mode the tensordict must have a dimension, time, got none")
        steps = shape[-1] if self.recurrent_mode else 1
        x: Tensor = tensordict.get(self.in_keys[0])
        state, is_init = (tensordict.get(key, None) for key in self.in_keys[1:])
        x = x.reshape(-1, steps, rnn.input_size).transpose(0, 1)
        batch = x.shape[1]
        starts = None if is_init is None else is_init.reshape(batch, steps).transpose(0, 1).bool()
        if state is not None:
            state = state.reshape(batch, steps, rnn.num_layers, rnn.hidden_size)[:, 0].transpose(0, 1)
        if steps == 1:  # a kernel for few steps, which takes no resets
            if state is not None and starts is not None:
                state = state.masked_fill(starts[..., None], 0)
            out, last = rnn(x, state)
        else:
            out, last = rnn(x, state, resets=starts)
        if rnn.num_layers == 1:
            states = out.transpose(0, 1)[:, :, None]
        else:
            states = torch.cat([last.new_zeros(batch, steps - 1, *last.shape[::2]), last.transpose(0, 1)[:, None]], 1)
        tensordict.set(self.out_keys[0], out.transpose(0, 1).reshape(*shape, rnn.hidden_size))
        tensordict.set(self.out_keys[1], states.reshape(*shape, rnn.num_layers, rnn.hidden_size))
        return tensordict


def _keys(which: str, key: Any, keys: Any, state: Any) -> list[Any]:
    if (key is None) == (keys is None):
        raise ValueError(f"either {which}_key or {which}_keys must be given, got {key!r} and {keys!r}")
    found = unravel_key_list([key, state] if keys is None else list(keys))
    if len(found) != 2:
        raise ValueError(f"{which}_keys must be two, of {which}put and state, got {keys!r}")
    return list(found)
