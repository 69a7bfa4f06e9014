"""A layer as the RNN operator of ONNX, for torch.onnx.export.

ONNX's operator has nn.RNN's formula, so R = U + skip * I, block-diagonal where there are heads; the sum stands in the
graph, for the runtime to fold. The exporter that torch.export stands behind takes the operator as a symbol of ONNX
(torch >= 2.8, and by a table from 2.6 on, see onnx.py), the older one, by tracing, as an operator of ours which it
translates.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fused_rin import library, reference
from fused_rin.problem import Rows, Rule, Weights

library.fragment.define(
    "onnx_rnn(Tensor x, Tensor w, Tensor r, Tensor b, Tensor? lengths, Tensor? h0, str activation) -> (Tensor, Tensor)"
)


def _run(x, w, r, b, lengths, h0, activation):  # type: ignore[no-untyped-def]
    """As ONNX defines it; the tracing exporter runs what it traces."""
    directions, hidden = w.shape[:2]
    pre = torch.einsum("tbi,ghi->tbgh", x, w) + (b[:, :hidden] + b[:, hidden:])
    state = None if h0 is None else h0.transpose(0, 1)
    rule = Rule(0.0, activation.lower(), directions - 1)
    y, h_n = reference.forward(pre, r, state, Rows(None if lengths is None else lengths.to(torch.int64)), rule)
    return y.transpose(1, 2).contiguous(), h_n.transpose(0, 1).contiguous()


library.fragment.impl("onnx_rnn", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_rin::onnx_rnn")
def _(x, w, r, b, lengths, h0, activation):  # type: ignore[no-untyped-def]
    steps, batch, _ = x.shape
    directions, hidden, _ = w.shape
    return x.new_empty(steps, directions, batch, hidden), x.new_empty(directions, batch, hidden)


def attributes(activation: str, directions: int, hidden: int) -> dict[str, Any]:
    """Of the operator, by ONNX's names."""
    return {
        "activations": [activation] * directions,
        "direction": "bidirectional" if directions == 2 else "forward",
        "hidden_size": hidden,
    }


@functools.cache
def _teach_the_tracing_exporter() -> None:
    from torch.onnx.symbolic_helper import parse_args

    suffixes = {"activations": "_s", "direction": "_s", "hidden_size": "_i"}  # of their types

    @parse_args("v", "v", "v", "v", "v", "v", "s")
    def translate(g: Any, x: Any, w: Any, r: Any, b: Any, lengths: Any, h0: Any, activation: str) -> Any:
        directions, hidden, _ = r.type().sizes()
        named = {key + suffixes[key]: value for key, value in attributes(activation, directions, hidden).items()}
        return g.op("RNN", x, w, r, b, lengths, h0, outputs=2, **named)

    torch.onnx.register_custom_op_symbolic("fused_rin::onnx_rnn", translate, 9)


def _operator(x: Tensor, w: Tensor, r: Tensor, b: Tensor, lengths: Any, h0: Any, activation: str) -> Any:
    directions, hidden, _ = w.shape
    if torch.compiler.is_compiling() and hasattr(torch.onnx, "ops"):
        steps, batch, _ = x.shape
        return torch.onnx.ops.symbolic_multi_out(
            "RNN", (x, w, r, b, lengths, h0), attributes(activation, directions, hidden), dtypes=(x.dtype, x.dtype),
            shapes=((steps, directions, batch, hidden), (directions, batch, hidden)), version=14,
        )  # fmt: skip
    if not torch.compiler.is_compiling():
        _teach_the_tracing_exporter()
    return torch.ops.fused_rin.onnx_rnn(x, w, r, b, lengths, h0, activation)


def _wide(tensor: Any) -> Any:
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.float()


def layer(
    x: Tensor, weights: Weights, h0: Tensor | None, rows: Rows, rule: Rule, num_heads: int, directions: int
) -> tuple[Tensor, Tensor]:
    """A layer on checked arguments: x [T, B, I], h0 [directions, B, D] -> out [T, B, directions * D] and h_n.

    In 16 bits too the state is carried in float32, which is also the only type that ONNX Runtime's operator takes.
    """
    dtype = x.dtype
    x, h0, w_ih, w_hh, b_ih, b_hh = (_wide(t) for t in (x, h0, *weights))
    hidden = w_ih.shape[0] // directions
    r = w_hh.reshape(directions * num_heads, hidden // num_heads, hidden // num_heads)
    if rule.skip:
        r = r + rule.skip * torch.eye(r.shape[1], device=r.device)
    if num_heads > 1:
        size = hidden // num_heads
        others = ~torch.eye(num_heads, dtype=torch.bool, device=r.device)[:, None, :, None]  # [to, unit, from, unit]
        blocks = r.view(directions, num_heads, size, 1, size).expand(-1, -1, -1, num_heads, -1)
        r = blocks.masked_fill(others, 0).reshape(directions, hidden, hidden)
    w, bias = w_ih.reshape(directions, hidden, -1), w_ih.new_zeros(directions, 2 * hidden)
    if b_ih is not None and b_hh is not None:
        bias = torch.cat([b_ih.view(directions, hidden), b_hh.view(directions, hidden)], 1)
    lengths = None if rows.lengths is None else rows.lengths.to(torch.int32)
    y, h_n = _operator(x, w, r, bias, lengths, h0, rule.activation.capitalize())
    if lengths is not None and h0 is not None:  # the operator gives 0 for a sequence that has no step
        h_n = torch.where((lengths > 0)[:, None], h_n, h0)
    y = y.transpose(1, 2).flatten(2)
    return (y, h_n) if dtype == torch.float32 else (y.to(dtype), h_n.to(dtype))


def suits(rows: Rows, dtype: torch.dtype) -> bool:
    """Whether the operator can say which rows run, and runtimes have it. Else the steps are unrolled, see ops.py."""
    return rows.offsets is None and rows.resets is None and dtype != torch.float64
