"""What RIN and RINCell share: the fixed skip of the state, its mark in every state dict, and the initialisation."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import init

from fused_rin import backends

# Standard deviation of W and U at the start, as the paper has it ("N(0, 10^-3)"; read as a standard deviation: as a
# variance, I + U at 100 units would have spectral radius 1.31, whose 784th power no network survives).
INIT_STD = 1e-3


class SkipModule(torch.nn.Module):
    """A module with U in place of V = U + skip * I. Where skip is not 0, its state dict says so, by a mark.

    The mark is a 0-dim entry `skip`, a tensor so that every checkpoint format keeps it: a state dict without it is that
    of a torch.nn.RNN or RNNCell. It is no buffer of the module, which DistributedDataParallel would broadcast before
    every call and other tools refuse; with skip=0 there is none, and the state dict is torch.nn.RNN's in both
    directions.
    """

    nonlinearity: str
    skip_factor: float
    backend: str
    _first_recurrent_weight: str

    @property
    def skip(self) -> Tensor:
        """The mark: `skip_factor` as a tensor, on the CPU."""
        # float32: float64 does not exist on every device, and a factor needs no more.
        return torch.tensor(self.skip_factor, dtype=torch.float32, device="cpu")

    def reset_parameters(self) -> None:
        """Draw W and U from N(0, 0.001^2) and set biases to 0, as the paper; with skip=0 draw all as torch.nn.RNN."""
        if self.skip_factor == 0:
            super().reset_parameters()  # type: ignore[misc]  # of the class beside this one
            return
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, 0.0, INIT_STD)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Modules pickled when the mark was a buffer have it among their buffers, in the property's way.
        buffers = state.get("_buffers")
        if buffers and "skip" in buffers:
            state = {**state, "_buffers": {name: value for name, value in buffers.items() if name != "skip"}}
        super().__setstate__(state)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__}, whose kernels are called from Python: record "
            "the model with torch.jit.trace or torch.export, or script fused_rin.restore_rnn(model), which holds "
            "torch's own modules with equal outputs"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.skip_factor != 0:
            destination[prefix + "skip"] = self.skip

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
            # A state dict cast to 16 bits has its mark cast too, hence the tolerance.
            theirs = state_dict[key]
            if not theirs.is_meta and not math.isclose(float(theirs), self.skip_factor, rel_tol=1e-2):
                error_msgs.append(
                    f"{key}: the checkpoint has skip={float(theirs):g}, this {type(self).__name__} was made with "
                    f"skip={self.skip_factor:g}."
                )
                return
        elif first in state_dict and self.skip_factor != 0:
            error_msgs.append(
                f"{first}: this is the state of a torch.nn.RNN or RNNCell (it has no '{key}'), whose recurrent "
                f"matrix is V = U + {self.skip_factor:g} I, while a {type(self).__name__} holds U. Load it with "
                "fused_rin.load_rnn_state_dict, convert the module with from_rnn of RIN or RINCell, or make the module "
                "with skip=0, which takes V as it is."
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in unexpected_keys:
            unexpected_keys.remove(key)


def check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")


def check_skip(skip: float) -> float:
    if isinstance(skip, bool) or not isinstance(skip, (int, float)):
        raise TypeError(f"skip should be a number, got: {type(skip).__name__}")
    # As the mark of a state dict holds it; what that cannot hold, the module could not load its own state with.
    try:
        (mark,) = struct.unpack("f", struct.pack("f", skip))
    except OverflowError:
        mark = math.inf
    if not (math.isfinite(mark) and math.isclose(mark, skip, rel_tol=1e-2)):
        raise ValueError(f"skip must be a finite number of float32's range, got {skip}")
    return float(skip)


def check_backend(backend: str) -> None:
    backends.check_name(backend)
