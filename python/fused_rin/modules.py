"""RIN and RINCell: torch.nn.RNN and torch.nn.RNNCell with a fixed skip of the state, on fused kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fused_rin import backends, layer, onnx_rnn, ops, step, watchers, wavefront, weights
from fused_rin.problem import ALL_ROWS, Rows, Rule, Weights
from fused_rin.recurrent import Recurrent
from fused_rin.skip import SkipModule, check_backend, check_nonlinearity, check_skip


class RIN(SkipModule, Recurrent):
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
        checkpoint_steps: k, for training on long sequences: every k-th state is kept for backward, which computes the
            others once more, k steps at a time. "auto": the square root of the steps, where the states of a layer take
            more than 32 MB. None (default): all are kept. See docs/long-sequences.md.
        return_sequences: False returns None in place of the output, whose memory is then not needed.

    Initialised as in the paper: W and U from N(0, 0.001^2), biases 0; with skip=0 as torch.nn.RNN. The paper feeds
    inputs of some size; on inputs in [0, 1] a larger W (0.1) starts faster.

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
        checkpoint_steps: int | str | None = None,
        return_sequences: bool = True,
    ) -> None:
        check_nonlinearity(nonlinearity)
        check_backend(backend)
        # Before the base class, whose constructor initialises the weights.
        self.nonlinearity, self.skip_factor, self.backend = nonlinearity, check_skip(skip), backend
        self._make(
            nonlinearity, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            num_heads, checkpoint_steps, return_sequences,
        )  # fmt: skip

    _first_recurrent_weight = "weight_hh_l0"

    @classmethod
    def from_rnn(cls, rnn: torch.nn.RNN, *, skip: float = 1.0, backend: str = "auto") -> RIN:
        """A RIN with the weights of a torch.nn.RNN, U = V - skip * I, and equal outputs up to rounding.

        Weights are copied; the given module stays as it is. Raises TypeError for anything but a plain torch.nn.RNN.
        """
        return weights.from_rnn(cls, rnn, skip=skip, backend=backend)

    def to_rnn(self) -> torch.nn.RNN:
        """A torch.nn.RNN with V = U + skip * I (block-diagonal if there are heads) and equal outputs up to rounding."""
        return weights.to_rnn(self)

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

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence | None, Tensor]:
        """Run all steps of all layers.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size), or a PackedSequence.
            hx: (num_layers * directions, B, hidden_size), without B for unbatched input; zeros if None. With a
                PackedSequence in the order of the sequences as they were before packing sorted them.
            lengths: (B,) integers: steps of each sequence; outputs past its end are 0 and h_n is its last state.
            resets: bool, (T, B), (B, T) with batch_first, (T,) for unbatched input, or (rows,) in the order of the
                data of a PackedSequence: where an episode starts no state crosses over.

        Returns: output, the last layer's states (directions concatenated), or None with return_sequences=False, and
        h_n in the shape of hx.
        """
        if not torch.compiler.is_compiling():
            if lengths is None and resets is None:
                direct = step.rin(self, input, hx)
                if direct is not None:
                    return direct if self.return_sequences else (None, direct[1])
            if watchers.function_modes() and self._may_pass_modes_by(input, hx, lengths, resets):
                with watchers.without_function_modes():
                    return RIN._forward(self, input, hx, lengths, resets)
            leaf = None if isinstance(input, (Tensor, PackedSequence)) else watchers.fx_leaf(self, input, hx)
            if leaf is not None:
                return leaf
        return RIN._forward(self, input, hx, lengths, resets)

    def _run_layers(
        self, x: Tensor, hx: Tensor | None, batch: int, rows: Rows, batch_first: bool
    ) -> tuple[Tensor | None, Tensor]:
        if self.num_layers > 1 and x.is_cuda:
            side_by_side = wavefront.run(self, Rule(self.skip_factor, self.nonlinearity), x, hx, rows, batch_first)
            if side_by_side is not None:
                return side_by_side
        groups = self.num_heads * (2 if self.bidirectional else 1)
        if x.shape[0] != 1 or not step.layers_suit_products(
            1, rows, groups, self.hidden_size, x.dtype, x.device, self.backend
        ):
            return super()._run_layers(x, hx, batch, rows, batch_first)
        x, states, rule = x[0], [], Rule(self.skip_factor, self.nonlinearity)
        for number in range(self.num_layers):
            own = self._layer_weights(number)
            layer.check_weights(own, x.shape[-1], 1, x.device, self._all_weights[number][1])
            x = step.products(x, None if hx is None else hx[number], own, rule)
            states.append(x)
            if self.dropout and self.training and number + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, True)
        return torch.stack([x], 1 if batch_first else 0), torch.stack(states)

    def _run_layer(
        self, number: int, x: Tensor, h0: Tensor | None, batch: int, rows: Rows, batch_first: bool
    ) -> tuple[Tensor | None, Tensor]:
        directions = 2 if self.bidirectional else 1
        own = self._layer_weights(number)
        rule = Rule(self.skip_factor, self.nonlinearity, self.num_heads if self.bidirectional else 0)
        if watchers.exporting_to_onnx() and onnx_rnn.suits(rows, x.dtype):
            x, h_n = onnx_rnn.layer(x, own, h0, rows, rule, self.num_heads, directions)
            return (x.transpose(0, 1) if batch_first else x), h_n
        return self._run_recurrences(number, x, own, h0, batch, rows, rule, batch_first)


class RINCell(SkipModule, torch.nn.RNNCellBase):
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
        check_nonlinearity(nonlinearity)
        check_backend(backend)
        # Before the base class, whose constructor initialises the weights.
        self.nonlinearity, self.skip_factor, self.backend = nonlinearity, check_skip(skip), backend
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, got {size}")
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)

    _first_recurrent_weight = "weight_hh"

    @classmethod
    def from_rnn(cls, cell: torch.nn.RNNCell, *, skip: float = 1.0, backend: str = "auto") -> RINCell:
        """A RINCell with the weights of a torch.nn.RNNCell; as `RIN.from_rnn`."""
        return weights.from_rnn(cls, cell, skip=skip, backend=backend)

    def to_rnn(self) -> torch.nn.RNNCell:
        """A torch.nn.RNNCell with V = U + skip * I."""
        return weights.to_rnn(self)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        if not self.bias:
            text += f", bias={self.bias}"
        if self.nonlinearity != "relu":
            text += f", nonlinearity={self.nonlinearity}"
        if self.skip_factor != 1.0:
            text += f", skip={self.skip_factor:g}"
        if self.backend != "auto":
            text += f", backend={self.backend}"
        return text

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; errors as torch.nn.RNNCell's."""
        if not torch.compiler.is_compiling():
            direct = step.cell(self, input, hx)
            if direct is not None:
                return direct
            names = weights.weight_names(self) if watchers.function_modes() else ()
            if names and watchers.may_be_passed_by(input, hx, *(self._parameters.get(name, ...) for name in names)):
                with watchers.without_function_modes():
                    return RINCell.forward(self, input, hx)
            leaf = None if isinstance(input, Tensor) else watchers.fx_leaf(self, input, hx)
            if leaf is not None:
                return leaf
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
        h = self._step(input, hx)
        return h if batched else h[0]

    def _step(self, input: Tensor, hx: Tensor | None) -> Tensor:
        """One step of a batch of rows on checked sizes."""
        weight, backend = self.weight_hh, backends.requested(self.backend)
        autocast = torch._C._is_any_autocast_enabled()
        if weight.dtype != input.dtype and not autocast:
            raise RuntimeError(f"weight_hh must have dtype {input.dtype}, got {weight.dtype}")
        if hx is not None and hx.dtype != input.dtype and not autocast:
            raise RuntimeError(f"hx must have the dtype of input, {input.dtype}, got {hx.dtype}")
        if hx is not None and hx.device != input.device:
            raise RuntimeError(f"hx must be on the device of input, {input.device}, got {hx.device}")
        own = Weights(self.weight_ih, weight, self.bias_ih, self.bias_hh)
        rule = Rule(self.skip_factor, self.nonlinearity)
        layer.check_weights(own, input.shape[1], 1, input.device)
        if step.suits_products(input.dtype, input.device, backend):
            return step.products(input, hx, own, rule)
        watchers.check_memory(input, *own)
        pre = F.linear(input, own.w_ih, layer.bias(own.b_ih, own.b_hh))
        h0 = None if hx is None else hx.to(pre.dtype)[:, None]
        _, h_n = ops.recurrence(pre[None], weight.to(pre.dtype)[None], h0, ALL_ROWS, rule, backend)
        return h_n[:, 0].clone()  # no view, which would refuse detach_()
