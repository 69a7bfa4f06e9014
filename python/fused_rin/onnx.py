"""Export to ONNX: every layer of a RIN becomes one standard RNN operator with R = U + skip * I, formed in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fused_rin.modules import RIN
from fused_rin.weights import add_identity

_library = torch.library.Library("fused_rin", "FRAGMENT")
_library.define(
    "onnx_rnn(Tensor x, Tensor w, Tensor r, Tensor b, Tensor? lengths, Tensor? h0, str activation) -> (Tensor, Tensor)"
)


@torch.library.register_fake("fused_rin::onnx_rnn")
def _(x, w, r, b, lengths, h0, activation):  # type: ignore[no-untyped-def]
    steps, batch, _ = x.shape
    directions, hidden, _ = w.shape
    return x.new_empty(steps, directions, batch, hidden), x.new_empty(directions, batch, hidden)


class _Layers(torch.nn.Module):
    """What stands in for a RIN while the exporter looks on; it can be traced, not run."""

    def __init__(self, rin: RIN) -> None:
        super().__init__()
        self.batch_first, self.num_layers, self.hidden_size = rin.batch_first, rin.num_layers, rin.hidden_size
        self.directions = 2 if rin.bidirectional else 1
        self.activation = rin.nonlinearity.capitalize()
        for layer in range(rin.num_layers):
            parts: list[list[Tensor]] = [[], [], []]
            for names in rin._all_weights[layer * self.directions : (layer + 1) * self.directions]:
                w, u, *biases = (getattr(rin, name).detach() for name in names)
                if w.dtype != torch.float32:
                    raise ValueError(f"ONNX's RNN is exported in float32, got {w.dtype} in {names[0]}; call .float()")
                u = add_identity(u, rin.skip_factor, rin.num_heads)
                r = torch.block_diag(*u.chunk(rin.num_heads)) if rin.num_heads > 1 else u
                b = torch.cat(biases) if biases else w.new_zeros(2 * self.hidden_size)
                for part, value in zip(parts, (w, r, b), strict=True):
                    part.append(value)
            for name, part in zip("wrb", parts, strict=True):
                self.register_buffer(f"{name}{layer}", torch.stack(part))

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if resets is not None:
            raise ValueError("resets have no counterpart in ONNX's RNN operator")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if self.batch_first and batched:
            x = x.transpose(0, 1)
        if hx is not None and not batched:
            hx = hx.unsqueeze(1)
        if lengths is not None:
            lengths = lengths.to(torch.int32)
        states = []
        for layer in range(self.num_layers):
            h0 = None if hx is None else hx[layer * self.directions : (layer + 1) * self.directions]
            w, r, b = (getattr(self, f"{name}{layer}") for name in "wrb")
            y, h_n = torch.ops.fused_rin.onnx_rnn(x, w, r, b, lengths, h0, self.activation)
            x = y.transpose(1, 2).flatten(2)
            if lengths is not None and h0 is not None:  # the operator gives 0 for a sequence that has no step
                h_n = torch.where((lengths > 0)[:, None], h_n, h0)
            states.append(h_n)
        state = torch.cat(states)
        if not batched:
            return x.squeeze(1), state.squeeze(1)
        return x.transpose(0, 1) if self.batch_first else x, state


def _translate(x: Any, w: Any, r: Any, b: Any, lengths: Any = None, h0: Any = None, activation: str = "Relu") -> Any:
    from onnxscript import opset18 as op

    directions, hidden = w.shape[0], w.shape[1]
    return op.RNN(
        x, w, r, b, lengths, h0, activations=[activation] * directions, hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
    )  # fmt: skip


def export_onnx(model: torch.nn.Module, args: tuple[Any, ...], f: Any = None, **kwargs: Any) -> Any:
    """`torch.onnx.export(model, args, f, dynamo=True, ...)` for a model that holds RINs; the model stays as it is.

    Each layer becomes one RNN operator, which ONNX Runtime runs, on float32 weights, with `lengths` as its sequence
    lengths. A RINCell needs no help: it exports as matrix products. Arguments and result are torch.onnx.export's.

    Raises ValueError for weights of another dtype and for `resets`, and ImportError without the package onnxscript.
    """
    model = copy.deepcopy(model).eval()
    if isinstance(model, RIN):
        model = _Layers(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, RIN):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _Layers(module).eval())
    table = {torch.ops.fused_rin.onnx_rnn.default: _translate, **kwargs.pop("custom_translation_table", {})}
    return torch.onnx.export(model.eval(), args, f, dynamo=True, custom_translation_table=table, **kwargs)
