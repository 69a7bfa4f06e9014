"""RIN and RINCell: torch.nn.RNN and torch.nn.RNNCell with a fixed skip of the state, on fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import init

from fused_rin import backends
from fused_rin.functional import recurrence

# Standard deviation of W and U at the start, as the paper has it ("N(0, 10^-3)"; read as a standard deviation: as a
# variance, I + U at 100 units would have spectral radius 1.31, whose 784th power no network survives).
INIT_STD = 1e-3


def _mode(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"RNN_{nonlinearity.upper()}"


def _check_heads(num_heads: int, hidden_size: int) -> None:
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads should be of type int, got: {type(num_heads).__name__}")
    if num_heads <= 0:
        raise ValueError(f"num_heads must be greater than zero, got {num_heads}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size must be divisible by num_heads, got {hidden_size} and {num_heads}")


def _check_skip(skip: float) -> float:
    if isinstance(skip, bool) or not isinstance(skip, (int, float)):
        raise TypeError(f"skip should be a number, got: {type(skip).__name__}")
    return float(skip)


def _reset_parameters(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.startswith("bias"):
            init.zeros_(parameter)
        else:
            init.normal_(parameter, 0.0, INIT_STD)


class RIN(torch.nn.RNNBase):
    """Recurrent Identity Network: h_t = act(W x_t + b_ih + U h_{t-1} + b_hh + skip * h_{t-1}).

    In place of `torch.nn.RNN`: same arguments, shapes, attribute names and errors. `weight_hh_l{k}` holds U, the
    recurrent matrix *without* the identity; with `skip=0` this is torch.nn.RNN itself.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.RNN.
        nonlinearity: "relu" (default, the paper's) or "tanh".
        skip: the fixed factor s of the state. 1 is the paper's network, 0 a plain RNN.
        num_heads: splits the state into heads that do not see each other: U is block-diagonal, `weight_hh_l{k}` has
            shape (hidden_size, hidden_size // num_heads), head after head.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; see `fused_rin.explain`.

    Initialised as in the paper: W and U from N(0, 0.001^2), biases 0. The paper feeds inputs of some size; on inputs
    in [0, 1] a larger W (0.1) starts faster.

    Shapes of input, hx, output and h_n are those of torch.nn.RNN: input (T, B, input_size), or (B, T, input_size)
    with batch_first, or (T, input_size); hx and h_n (num_layers * directions, B, hidden_size).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        skip: float = 1.0,
        num_heads: int = 1,
        backend: str = "auto",
    ) -> None:
        mode = _mode(nonlinearity)
        skip = _check_skip(skip)
        backends._check_name(backend)
        super().__init__(
            mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        _check_heads(num_heads, hidden_size)
        self.nonlinearity = nonlinearity
        self.num_heads = num_heads
        self.backend = backend
        self.skip_factor = skip
        if num_heads > 1:
            for names in self._all_weights:
                full = getattr(self, names[1])
                block = full.new_empty(hidden_size, hidden_size // num_heads)
                setattr(self, names[1], torch.nn.Parameter(block))
            self._init_flat_weights()
            self.reset_parameters()
        # A tensor, so that every checkpoint format keeps it: a state dict without it is a torch.nn.RNN's.
        self.register_buffer("skip", torch.tensor(skip, dtype=torch.float64, device=device))

    def reset_parameters(self) -> None:
        """Draw W and U from N(0, 0.001^2), set biases to 0."""
        _reset_parameters(self)

    def flatten_parameters(self) -> None:
        """Nothing to do: kernels take the weights where they lie."""

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.nonlinearity != "relu":
            text += f", nonlinearity={self.nonlinearity}"
        if self.skip_factor != 1.0:
            text += f", skip={self.skip_factor:g}"
        if self.num_heads != 1:
            text += f", num_heads={self.num_heads}"
        if self.backend != "auto":
            text += f", backend={self.backend}"
        return text

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
        key = prefix + "skip"
        if key in state_dict:
            theirs = float(state_dict[key])
            if abs(theirs - self.skip_factor) > 1e-2 * abs(self.skip_factor):
                error_msgs.append(
                    f"{key}: the checkpoint has skip={theirs:g}, this RIN was made with skip={self.skip_factor:g}."
                )
                return
        elif prefix + "weight_hh_l0" in state_dict:
            if self.skip_factor != 0:
                error_msgs.append(
                    f"{prefix}weight_hh_l0: this is the state of a torch.nn.RNN (it has no '{key}'), whose recurrent "
                    f"matrix is V = U + {self.skip_factor:g} I, while a RIN holds U. Convert the module with "
                    "RIN.from_rnn, or make the RIN with skip=0, which takes V as it is."
                )
                return
            state_dict = {**state_dict, key: self.skip}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run all steps of all layers.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, or (T, input_size).
            hx: (num_layers * directions, B, hidden_size), without B for unbatched input; zeros if None.
            lengths: (B,) integers: steps of each sequence; outputs past its end are 0 and h_n is its last state.
            resets: bool, (T, B), (B, T) with batch_first, or (T,): where an episode starts no state crosses over.

        Returns: output, the last layer's states (directions concatenated), and h_n in the shape of hx.
        """
        if input.dim() not in (2, 3):
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        batched = input.dim() == 3
        if not batched:
            if hx is not None:
                if hx.dim() != 2:
                    raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor")
                hx = hx.unsqueeze(1)
            input = input.unsqueeze(1)
            resets = None if resets is None else resets.unsqueeze(1)
        elif hx is not None and hx.dim() != 3:
            raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
        elif self.batch_first:
            input = input.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        self._check(input, hx)

        output, h_n = self._run_layers(input, hx, lengths, resets)

        if not batched:
            return output.squeeze(1), h_n.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output, h_n

    def _check(self, input: Tensor, hx: Tensor | None) -> None:
        """Arguments against this module, time-major; the texts are torch.nn.RNN's."""
        self.check_input(input, None)
        steps, batch = input.shape[:2]
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if hx is not None:
            directions = 2 if self.bidirectional else 1
            self.check_hidden_size(hx, (self.num_layers * directions, batch, self.hidden_size))
            if hx.dtype != input.dtype:
                raise ValueError(f"hx must have the dtype of input, {input.dtype}, got {hx.dtype}")
            if hx.device != input.device:
                raise RuntimeError(f"hx must be on the device of input, {input.device}, got {hx.device}")

    def _run_layers(
        self, x: Tensor, hx: Tensor | None, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        steps, batch = x.shape[:2]
        directions = 2 if self.bidirectional else 1
        heads, head_size = self.num_heads, self.hidden_size // self.num_heads
        groups = directions * heads
        reverse = False if directions == 1 else [False] * heads + [True] * heads
        states = []
        for layer in range(self.num_layers):
            w_ih, w_hh, bias = self._layer_weights(layer)
            h0 = None
            if hx is not None:
                h0 = hx[layer * directions : (layer + 1) * directions]
                h0 = h0.transpose(0, 1).reshape(batch, groups, head_size)
            pre = F.linear(x, w_ih, bias).view(steps, batch, groups, head_size)
            out, h_n = recurrence(
                pre, w_hh.view(groups, head_size, head_size), h0, skip=self.skip_factor, activation=self.nonlinearity,
                lengths=lengths, resets=resets, reverse=reverse, backend=self.backend,
            )  # fmt: skip
            x = out.view(steps, batch, directions * self.hidden_size)
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, True)
            states.append(h_n.view(batch, directions, self.hidden_size).transpose(0, 1))
        return x, states[0] if self.num_layers == 1 else torch.cat(states)

    def _layer_weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """W, U and b_ih + b_hh of a layer, its directions one after the other."""
        directions = 2 if self.bidirectional else 1
        weights = [
            [getattr(self, name) for name in names]
            for names in self._all_weights[layer * directions : (layer + 1) * directions]
        ]
        w_ih, w_hh, *biases = (
            weights[0] if directions == 1 else [torch.cat(pair) for pair in zip(*weights, strict=True)]
        )
        return w_ih, w_hh, biases[0] + biases[1] if biases else None


class RINCell(torch.nn.RNNCellBase):
    """One step of a RIN, in place of torch.nn.RNNCell: h' = act(W x + b_ih + U h + b_hh + skip * h).

    Args: input_size, hidden_size, bias, device, dtype as torch.nn.RNNCell; nonlinearity "relu" (default) or "tanh";
    skip as in `RIN`. `weight_hh` holds U. Input (B, input_size) or (input_size,), hx (B, hidden_size) or
    (hidden_size,), zeros if None; returns h' in the shape of hx.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        skip: float = 1.0,
        backend: str = "auto",
    ) -> None:
        _mode(nonlinearity)
        skip = _check_skip(skip)
        backends._check_name(backend)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, got {size}")
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        self.skip_factor = skip
        self.backend = backend

    def reset_parameters(self) -> None:
        """Draw W and U from N(0, 0.001^2), set biases to 0."""
        _reset_parameters(self)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        if not self.bias:
            text += f", bias={self.bias}"
        if self.nonlinearity != "relu":
            text += f", nonlinearity={self.nonlinearity}"
        if self.skip_factor != 1.0:
            text += f", skip={self.skip_factor:g}"
        return text

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; errors as torch.nn.RNNCell's."""
        if input.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else hx.unsqueeze(0)
        if input.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {self.input_size}")
        if hx is not None:
            if hx.shape[0] != input.shape[0]:
                raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden0 batch size {hx.shape[0]}")
            if hx.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden0 has inconsistent hidden_size: got {hx.shape[1]}, expected {self.hidden_size}"
                )
            hx = hx.unsqueeze(1)
        bias = self.bias_ih + self.bias_hh if self.bias else None
        pre = F.linear(input, self.weight_ih, bias)
        _, h_n = recurrence(
            pre[None, :, None], self.weight_hh[None], hx, skip=self.skip_factor, activation=self.nonlinearity,
            backend=self.backend,
        )  # fmt: skip
        return h_n[:, 0] if batched else h_n[0, 0]
