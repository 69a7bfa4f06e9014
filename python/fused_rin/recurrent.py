"""What recurrent modules in place of torch.nn.RNN share: its constructor, its list of weights, the checks of a call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fused_rin import checkpoint, layer, ops, watchers
from fused_rin.problem import ALL_ROWS, Rows, Rule, Units, Weights, check_lengths, check_resets, unpack_batch_sizes


def check_heads(num_heads: int, hidden_size: int) -> None:
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads should be of type int, got: {type(num_heads).__name__}")
    if num_heads <= 0:
        raise ValueError(f"num_heads must be greater than zero, got {num_heads}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size must be divisible by num_heads, got {hidden_size} and {num_heads}")


class Recurrent(torch.nn.RNNBase):
    """Layers of recurrences, `num_heads` of them side by side, in both directions if `bidirectional`.

    A subclass has `_run_layer`, which runs one of them.
    """

    backend: str
    weight_ih_l0: Tensor
    # On the class: what was pickled by a release without them is as their defaults.
    _checkpoint_steps: int | str | None = None
    return_sequences: bool = True

    def _make(
        self,
        nonlinearity: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        num_heads: int,
        checkpoint_steps: int | str | None,
        return_sequences: bool,
    ) -> None:
        """The constructor of the base class, which initialises the weights, with U a block for each head."""
        checkpoint.check_steps(checkpoint_steps)  # before a weight is drawn
        if not isinstance(return_sequences, bool):
            raise TypeError(f"return_sequences must be a bool, got {return_sequences!r}")
        torch.nn.RNNBase.__init__(
            self, f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        check_heads(num_heads, hidden_size)
        self.num_heads = num_heads
        if checkpoint_steps is not None:
            self.checkpoint_steps = checkpoint_steps
        if not return_sequences:
            self.return_sequences = return_sequences
        if num_heads > 1:
            for names in self._all_weights:
                full = getattr(self, names[1])
                block = full.new_empty(hidden_size, hidden_size // num_heads)
                setattr(self, names[1], torch.nn.Parameter(block))
            self._init_flat_weights()
            self.reset_parameters()

    @property
    def checkpoint_steps(self) -> int | str | None:
        """As the constructor's; to be set at any time."""
        return self._checkpoint_steps

    @checkpoint_steps.setter
    def checkpoint_steps(self, steps: int | str | None) -> None:
        self._checkpoint_steps = checkpoint.check_steps(steps)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self._checkpoint_steps is not None:
            text += f", checkpoint_steps={self._checkpoint_steps}"
        if not self.return_sequences:
            text += ", return_sequences=False"
        return text

    def flatten_parameters(self) -> None:
        """Nothing to do: kernels take the weights where they lie."""

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

    def _forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None, lengths: Any, resets: Tensor | None
    ) -> tuple[Tensor | PackedSequence | None, Tensor]:
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
        if not self.return_sequences or output is None:
            return None, h_n if batched else h_n.squeeze(1)
        return (output, h_n) if batched else (output.squeeze(1), h_n.squeeze(1))

    def _forward_packed(
        self, input: PackedSequence, hx: Tensor | None, lengths: Any, resets: Tensor | None
    ) -> tuple[PackedSequence | None, Tensor]:
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
        h_n = self.permute_hidden(h_n, unsorted_indices)
        if not self.return_sequences or output is None:
            return None, h_n
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n

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
    ) -> tuple[Tensor | None, Tensor]:
        """All layers on checked arguments: x (T, B, features), or (rows, features) of a packed batch."""
        directions, last = 2 if self.bidirectional else 1, self.num_layers - 1
        states: list[Tensor] = []
        for number in range(self.num_layers):
            h0 = None if hx is None else hx[number * directions : (number + 1) * directions]
            out, h_n = self._run_layer(number, x, h0, batch, rows, batch_first and number == last)
            states.append(h_n)
            if number == last or out is None:
                break
            x = F.dropout(out, self.dropout, True) if self.dropout and self.training else out
        return out, torch.cat(states) if last else states[0]

    def _run_layer(
        self, number: int, x: Tensor, h0: Tensor | None, batch: int, rows: Rows, batch_first: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Output and last states of a layer, as `layer.forward`; h0 (directions, B, hidden_size)."""
        raise NotImplementedError

    def _run_recurrences(
        self,
        number: int,
        x: Tensor,
        weights: Weights,
        h0: Tensor | None,
        batch: int,
        rows: Rows,
        rule: Rule,
        batch_first: bool,
        units: Units | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """`layer.forward`, or, where states are not all kept, `checkpoint.forward`."""
        directions = 2 if self.bidirectional else 1
        groups, u_name = directions * self.num_heads, self._all_weights[number * directions][1]
        initial, backend = self._by_recurrence(h0, batch), self.backend
        wants_output = self.return_sequences or number + 1 < self.num_layers
        if self._checkpoint_steps is not None or not wants_output:
            least = self._span_steps(rows.sizes(x)[0], math.prod(x.shape[:-1]), x.dtype, wants_output)
            if least is not None:
                run = checkpoint.forward_past_compilers if torch.compiler.is_compiling() else checkpoint.forward
                return run(
                    x, weights, initial, rows, rule, groups, backend, batch_first, u_name, units, added, least,
                    wants_output,
                )  # fmt: skip
        return layer.forward(
            x, weights, initial, rows, rule, groups, backend, batch_first, u_name, units, added
        )  # fmt: skip

    def _span_steps(self, steps: int, rows: int, dtype: torch.dtype, wants_output: bool) -> int | None:
        """Steps between two states that a layer keeps for backward, in a call made now; None: all are kept, or none."""
        if watchers.keeps_graphs_whole() or ops._is_exporting():
            return None
        asked = self._checkpoint_steps
        if not torch.is_grad_enabled():  # nothing is kept; but an output that nobody wants need not be there as a whole
            asked = None if wants_output or torch.compiler.is_compiling() else "auto"
        width = self.hidden_size * (2 if self.bidirectional else 1)
        return checkpoint.span_steps(asked, steps, rows * width, dtype)

    def _by_recurrence(self, h0: Tensor | None, batch: int) -> Tensor | None:
        """h0 (directions, B, hidden_size) as [B, G, D]."""
        if h0 is None:
            return None
        groups = self.num_heads * (2 if self.bidirectional else 1)
        return h0.transpose(0, 1).reshape(batch, groups, self.hidden_size // self.num_heads)

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
    """`Recurrent._flat_weights`: what is written to an entry is written to the module."""

    def __init__(self, module: Recurrent, weights: list[Tensor | None]) -> None:
        super().__init__(weights)
        self._module = module

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        self._module._flat_weights = list(self)
