"""RIN and RINCell: torch.nn.RNN and torch.nn.RNNCell with a fixed skip of the state, on fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fused_rin import backends, layer, onnx_rnn, ops, step, watchers, weights
from fused_rin.problem import ALL_ROWS, Rows, Rule, Weights, check_lengths, check_resets, unpack_batch_sizes
from fused_rin.skip import SkipModule, check_backend, check_nonlinearity, check_skip


def _check_heads(num_heads: int, hidden_size: int) -> None:
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads should be of type int, got: {type(num_heads).__name__}")
    if num_heads <= 0:
        raise ValueError(f"num_heads must be greater than zero, got {num_heads}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size must be divisible by num_heads, got {hidden_size} and {num_heads}")


class RIN(SkipModule, torch.nn.RNNBase):
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
    ) -> None:
        check_nonlinearity(nonlinearity)
        check_backend(backend)
        # Before the base class, whose constructor initialises the weights.
        self.nonlinearity, self.skip_factor, self.backend = nonlinearity, check_skip(skip), backend
        super().__init__(
            f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        _check_heads(num_heads, hidden_size)
        self.num_heads = num_heads
        if num_heads > 1:
            for names in self._all_weights:
                full = getattr(self, names[1])
                block = full.new_empty(hidden_size, hidden_size // num_heads)
                setattr(self, names[1], torch.nn.Parameter(block))
            self._init_flat_weights()
            self.reset_parameters()

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

    # torch.nn.RNN computes with a list of its weights, which code for it writes to (dropout of weights). RNNBase's own
    # list outlives the parameters it was made from when a wrapper (sharding, parametrizations) puts others in their
    # place, so here the attributes count, and beside them only what was written to the list.
    _written_weights: dict[str, Tensor] | None = None

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        written = self._written_weights or {}
        return _FlatWeights(self, [written.get(name, getattr(self, name, None)) for name in self._flat_weights_names])

    @_flat_weights.setter
    def _flat_weights(self, given: list[Tensor | None]) -> None:
        pairs = zip(self._flat_weights_names, given, strict=False)
        written = {name: w for name, w in pairs if w is not None and w is not getattr(self, name, None)}
        self._written_weights = written or None

    def __setattr__(self, name: str, value: Any) -> None:
        if self._written_weights and name in self._written_weights:
            self._written_weights = {key: w for key, w in self._written_weights.items() if key != name} or None
        torch.nn.Module.__setattr__(self, name, value)  # past RNNBase's, which keeps its list up to date

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run all steps of all layers.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size), or a PackedSequence.
            hx: (num_layers * directions, B, hidden_size), without B for unbatched input; zeros if None. With a
                PackedSequence in the order of the sequences as they were before packing sorted them.
            lengths: (B,) integers: steps of each sequence; outputs past its end are 0 and h_n is its last state.
            resets: bool, (T, B), (B, T) with batch_first, (T,) for unbatched input, or (rows,) in the order of the
                data of a PackedSequence: where an episode starts no state crosses over.

        Returns: output, the last layer's states (directions concatenated), and h_n in the shape of hx.
        """
        if not torch.compiler.is_compiling():
            if lengths is None and resets is None:
                direct = step.rin(self, input, hx)
                if direct is not None:
                    return direct
            if watchers.function_modes() and self._may_pass_modes_by(input, hx, lengths, resets):
                with watchers.without_function_modes():
                    return RIN._forward(self, input, hx, lengths, resets)
            leaf = None if isinstance(input, (Tensor, PackedSequence)) else watchers.fx_leaf(self, input, hx)
            if leaf is not None:
                return leaf
        return RIN._forward(self, input, hx, lengths, resets)

    def _forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None, lengths: Any, resets: Tensor | None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """The checks of a call that is none of a few steps, and all its layers."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, resets)
        if input.dim() not in (2, 3):
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        batched = input.dim() == 3
        if not batched:
            if hx is not None:
                if hx.dim() != 2:
                    raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor")
                hx = hx.unsqueeze(1)
            if lengths is not None:
                raise ValueError("lengths is for batched 3-D input, got unbatched 2-D input; cut it to its length")
            input = input.unsqueeze(1)
        elif hx is not None and hx.dim() != 3:
            raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
        batch_first = self.batch_first and batched
        self._check(input, hx, input.shape[0 if batch_first else 1])
        if resets is not None:
            check_resets(resets, tuple(input.shape[: 2 if batched else 1]), input.device, "input")
            resets = resets.transpose(0, 1) if batch_first else resets.reshape(input.shape[:2])
        if batch_first:
            input = input.transpose(0, 1)
        steps, batch = input.shape[:2]
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            lengths = check_lengths(lengths, steps, batch, input.device)

        rows = ALL_ROWS if lengths is None and resets is None else Rows(lengths, None, resets)
        output, h_n = self._run_layers(input, hx, batch, rows, batch_first)
        return (output, h_n) if batched else (output.squeeze(1), h_n.squeeze(1))

    def _forward_packed(
        self, input: PackedSequence, hx: Tensor | None, lengths: Any, resets: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        if lengths is not None:
            raise ValueError("lengths cannot be given with a PackedSequence, whose batch_sizes say the same")
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        lengths, offsets = unpack_batch_sizes(batch_sizes, data)
        batch = lengths.shape[0]
        self._check(data, hx, batch)
        if hx is not None:
            watchers.check_memory(hx)
            hx = self.permute_hidden(hx, sorted_indices)
        if resets is not None:
            check_resets(resets, tuple(data.shape[:1]), data.device, "input")
        output, h_n = self._run_layers(data, hx, batch, Rows(lengths, offsets, resets), False)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(h_n, unsorted_indices)

    def _check(self, input: Tensor, hx: Tensor | None, batch: int) -> None:
        """Arguments against this module; the texts are torch.nn.RNN's where it has one."""
        weight = self.weight_ih_l0
        autocast = torch._C._is_any_autocast_enabled()
        if input.dtype != weight.dtype and not autocast:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        if input.device != weight.device:
            raise RuntimeError(f"input must be on the device of the weights, {weight.device}, got {input.device}")
        if hx is not None:
            directions = 2 if self.bidirectional else 1
            # Not by check_hidden_size(), which torch.export of torch 2.6 does not see through.
            expected = (self.num_layers * directions, batch, self.hidden_size)
            if hx.size() != expected:
                raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.size())}")
            if hx.dtype != input.dtype and not autocast:
                raise RuntimeError(f"hx must have the dtype of input, {input.dtype}, got {hx.dtype}")
            if hx.device != input.device:
                raise RuntimeError(f"hx must be on the device of input, {input.device}, got {hx.device}")

    def _may_pass_modes_by(self, input: Any, hx: Any, lengths: Any, resets: Any) -> bool:
        """Whether the function modes that are on need not see this call: a default device, and plain tensors alone."""
        data = input.data if isinstance(input, PackedSequence) else input
        own = self._parameters
        if not all(map(own.__contains__, self._flat_weights_names)):  # parametrized ones are not there
            return False
        given = () if self._written_weights is None else self._written_weights.values()
        return watchers.may_be_passed_by(data, hx, lengths, resets, *own.values(), *given)

    def _run_layers(
        self, x: Tensor, hx: Tensor | None, batch: int, rows: Rows, batch_first: bool
    ) -> tuple[Tensor, Tensor]:
        """All layers on checked arguments: x (T, B, features), or (rows, features) of a packed batch."""
        directions = 2 if self.bidirectional else 1
        groups, last = directions * self.num_heads, self.num_layers - 1
        rule = Rule(self.skip_factor, self.nonlinearity, self.num_heads if self.bidirectional else 0)
        states = []
        if x.shape[0] == 1 and step.layers_suit_products(
            1, rows, groups, self.hidden_size, x.dtype, x.device, self.backend
        ):
            x = x[0]
            for number in range(self.num_layers):
                own = self._layer_weights(number)
                layer.check_weights(own, x.shape[-1], 1, x.device, self._all_weights[number][1])
                x = step.products(x, None if hx is None else hx[number], own, rule)
                states.append(x)
                if self.dropout and self.training and number < last:
                    x = F.dropout(x, self.dropout, True)
            return torch.stack([x], 1 if batch_first else 0), torch.stack(states)
        to_onnx = watchers.exporting_to_onnx() and onnx_rnn.suits(rows, x.dtype)
        for number in range(self.num_layers):
            h0 = None if hx is None else hx[number * directions : (number + 1) * directions]
            own = self._layer_weights(number)
            if to_onnx:
                x, h_n = onnx_rnn.layer(x, own, h0, rows, rule, self.num_heads, directions)
                x = x.transpose(0, 1) if batch_first and number == last else x
            else:
                if h0 is not None:
                    h0 = h0.transpose(0, 1).reshape(batch, groups, self.hidden_size // self.num_heads)
                x, h_n = layer.forward(
                    x, own, h0, rows, rule, groups, self.backend, batch_first and number == last,
                    self._all_weights[number * directions][1],
                )  # fmt: skip
            if self.dropout and self.training and number < last:
                x = F.dropout(x, self.dropout, True)
            states.append(h_n)
        return x, torch.cat(states) if last else states[0]

    def _layer_weights(self, number: int) -> Weights:
        """Of a layer; those of its two directions one after the other."""
        directions = 2 if self.bidirectional else 1
        # Asked first: an attribute of a module is found last of all, after 0.8 us.
        own: dict[str, Any] = self._parameters
        if self._written_weights:
            own = {**own, **self._written_weights}
        sets = [
            [own[name] if name in own else getattr(self, name) for name in names]
            for names in self._all_weights[number * directions : (number + 1) * directions]
        ]
        if directions == 1:
            return Weights(*sets[0])
        watchers.check_memory(*sets[0], *sets[1])
        for name, a, b in zip(self._all_weights[number * 2], *sets, strict=True):
            if a is None or b is None:
                raise TypeError(f"{name} must be a Tensor in both directions, got None")
            if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
                raise RuntimeError(
                    f"{name} must be alike in both directions, got {tuple(a.shape)}, {a.dtype}, {a.device} and "
                    f"{tuple(b.shape)}, {b.dtype}, {b.device}"
                )
        return Weights(*(torch.cat(pair) for pair in zip(*sets, strict=True)))


class _FlatWeights(list[Tensor | None]):
    """`RIN._flat_weights`: what is written to an entry is written to the module."""

    def __init__(self, module: RIN, weights: list[Tensor | None]) -> None:
        super().__init__(weights)
        self._module = module

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        self._module._flat_weights = list(self)


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
