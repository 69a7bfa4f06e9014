"""Export to ONNX: every layer of a RIN becomes one standard RNN operator (onnx_rnn.py)."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fused_rin import onnx_rnn, watchers


def _translate(x: Any, w: Any, r: Any, b: Any, lengths: Any = None, h0: Any = None, activation: str = "Relu") -> Any:
    from onnxscript import opset18 as op

    return op.RNN(x, w, r, b, lengths, h0, **onnx_rnn.attributes(activation, w.shape[0], w.shape[1]))


def export_onnx(model: torch.nn.Module, args: tuple[Any, ...], f: Any = None, **kwargs: Any) -> Any:
    """`torch.onnx.export(model, args, f, dynamo=True, ...)` for a model that holds RINs; the model stays as it is.

    From torch 2.8 on that is all it is, on a copy in eval mode; 2.6 and 2.7 export a RIN in this way alone. Each layer
    becomes one RNN operator, which ONNX Runtime runs, with `lengths` as its sequence lengths; with `resets` its steps
    are unrolled into elementary operators. A RINCell exports as matrix products. Arguments and result are
    torch.onnx.export's. Raises ImportError without the package onnxscript.
    """
    table = {torch.ops.fused_rin.onnx_rnn.default: _translate, **kwargs.pop("custom_translation_table", {})}
    copied = copy.deepcopy(model).eval()
    watchers.within_export_onnx = True
    try:
        return torch.onnx.export(copied, args, f, dynamo=True, custom_translation_table=table, **kwargs)
    finally:
        watchers.within_export_onnx = False
