"""What RIN and RINCell share: the fixed skip of the state, its mark in every state dict, and the initialisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import init

from fused_rin import backends

# Standard deviation of W and U at the start, as the paper has it ("N(0, 10^-3)"; read as a standard deviation: as a
# variance, I + U at 100 units would have spectral radius 1.31, whose 784th power no network survives).
INIT_STD = 1e-3


class SkipModule(torch.nn.Module):
    """A module with U in place of V = U + skip * I. Its state dict says so, in a 0-dim buffer named `skip`.

    A tensor, so that every checkpoint format keeps it: a state dict without it is that of a torch.nn.RNN or
    RNNCell. `skip_factor` is the same number for Python: reading the buffer would wait for a GPU.
    """

    nonlinearity: str
    skip_factor: float
    backend: str
    skip: torch.Tensor
    _first_recurrent_weight: str

    def _set_skip(self, nonlinearity: str, skip: float, backend: str, device: torch.device | str | None) -> None:
        self.nonlinearity = nonlinearity
        self.skip_factor = skip
        self.backend = backend
        # float32: float64 does not exist on every device, and a factor needs no more.
        self.register_buffer("skip", torch.tensor(skip, dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """Draw W and U from N(0, 0.001^2), set biases to 0."""
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, 0.0, INIT_STD)
        if "skip" in self._buffers:  # after to_empty() it holds whatever memory held
            self.skip.fill_(self.skip_factor)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, first = prefix + "skip", prefix + self._first_recurrent_weight
        if key in state_dict:
            # A module cast to 16 bits has its buffer cast too, hence the tolerance.
            theirs = state_dict[key]
            if not theirs.is_meta and not math.isclose(float(theirs), self.skip_factor, rel_tol=1e-2):
                error_msgs.append(
                    f"{key}: the checkpoint has skip={float(theirs):g}, this {type(self).__name__} was made with "
                    f"skip={self.skip_factor:g}."
                )
                return
        elif first in state_dict:
            if self.skip_factor != 0:
                error_msgs.append(
                    f"{first}: this is the state of a torch.nn.RNN or RNNCell (it has no '{key}'), whose recurrent "
                    f"matrix is V = U + {self.skip_factor:g} I, while a {type(self).__name__} holds U. Load it with "
                    f"fused_rin.load_rnn_state_dict, convert the module with {type(self).__name__}.from_rnn, or make "
                    "the module with skip=0, which takes V as it is."
                )
                return
            state_dict = {**state_dict, key: self.skip}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")


def check_skip(skip: float) -> float:
    if isinstance(skip, bool) or not isinstance(skip, (int, float)):
        raise TypeError(f"skip should be a number, got: {type(skip).__name__}")
    return float(skip)


def check_backend(backend: str) -> None:
    backends._check_name(backend)
