"""Policies for SB3-contrib's RecurrentPPO with a RIN in the place of its LSTM.

SB3-contrib's policy goes through a sequence step by step, in Python, as soon as an episode starts anywhere in a batch,
and in an update that is always. Here the starts are a RIN's `resets`, and a sequence is one call.

    from sb3_contrib import RecurrentPPO
    from fused_rin.rl.sb3 import MlpRINPolicy

    model = RecurrentPPO(MlpRINPolicy, "CartPole-v1", policy_kwargs={"lstm_hidden_size": 64})
"""

from __future__ import annotations

from typing import Any

from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from torch import Tensor

from fused_rin.modules import RIN
from fused_rin.recurrent import Recurrent


class _RINPolicy(RecurrentActorCriticPolicy):
    """Arguments as of the policy of SB3-contrib, whose names are kept; and

    rnn_class: RIN (default), or another module of this package that takes (features, lstm_hidden_size, n_lstm_layers).
    lstm_kwargs: of its constructor. By default {"nonlinearity": "tanh", "skip": 0.0} for a RIN, which is torch.nn.RNN's
        network: a policy sees episodes of any length, and ReLU with the identity grows with them.

    A state is the pair that SB3-contrib keeps for an LSTM, of which the second one stays as it is.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        lr_schedule: Any,
        *args: Any,
        rnn_class: type[Recurrent] = RIN,
        lstm_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(rnn_class, type) and issubclass(rnn_class, Recurrent)):
            raise TypeError(f"rnn_class must be a recurrent module of fused_rin, got {rnn_class!r}")
        if lstm_kwargs is None:
            lstm_kwargs = {"nonlinearity": "tanh", "skip": 0.0} if rnn_class is RIN else {}
        for name in ("batch_first", "bidirectional", "return_sequences"):
            if name in lstm_kwargs:
                raise ValueError(f"lstm_kwargs must not have {name}, which the policy decides")
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self.rnn_class, self.lstm_kwargs = rnn_class, lstm_kwargs
        layers, _, hidden = self.lstm_hidden_state_shape
        make: Any = rnn_class
        for name in ("lstm_actor", "lstm_critic"):
            if getattr(self, name) is not None:
                setattr(self, name, make(self.features_dim, hidden, layers, **lstm_kwargs))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        layers, _, hidden = self.lstm_hidden_state_shape
        return {
            **super()._get_constructor_parameters(),
            "rnn_class": self.rnn_class,
            "lstm_kwargs": self.lstm_kwargs,
            "lstm_hidden_size": hidden,
            "n_lstm_layers": layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
        }

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """features (sequences * T, features), sequence after sequence, as episode_starts; returns in the same order."""
        state, unused = lstm_states
        sequences = state.shape[1]
        x = features.reshape(sequences, -1, lstm.input_size).transpose(0, 1)
        starts = episode_starts.reshape(sequences, -1).transpose(0, 1) != 0
        if x.shape[0] == 1:  # where experience is gathered: a kernel for few steps, which takes no resets
            out, state = lstm(x, state.masked_fill(starts[..., None], 0))
        else:
            out, state = lstm(x, state, resets=starts)
        return out.transpose(0, 1).reshape(-1, out.shape[-1]), (state, unused)


class MlpRINPolicy(_RINPolicy):
    __doc__ = "For observations that are vectors.\n\n    " + str(_RINPolicy.__doc__)


class CnnRINPolicy(_RINPolicy, RecurrentActorCriticCnnPolicy):
    __doc__ = "For images.\n\n    " + str(_RINPolicy.__doc__)


class MultiInputRINPolicy(_RINPolicy, RecurrentMultiInputActorCriticPolicy):
    __doc__ = "For dictionaries of observations.\n\n    " + str(_RINPolicy.__doc__)
