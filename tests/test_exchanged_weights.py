"""Modules one of whose weights was exchanged for another that does not fit."""

from __future__ import annotations

import pytest
import torch
from fused_rin import RIN, RINCell
from torch import nn


def _exchanged(kind):
    """A module with a weight that does not fit, a call of it, and the error."""
    rin, cell, x = RIN(3, 4, num_layers=2), RINCell(3, 33), torch.randn(20, 2, 3)
    if kind.startswith("none"):
        rin.weight_hh_l0 = None
        return (
            rin,
            (x[:1] if kind == "none, one step" else x,),
            (TypeError, "weight_hh_l0 must be a Tensor, got NoneType"),
        )
    if kind == "as many numbers":
        rin.weight_hh_l0 = nn.Parameter(torch.randn(2, 8))
        return rin, (x,), (RuntimeError, r"weight_hh_l0 must have shape \(4, 4\), got \(2, 8\)")
    if kind == "later layer elsewhere":
        rin.weight_ih_l1 = nn.Parameter(rin.weight_ih_l1.detach().to("meta"))
        return rin, (x,), (RuntimeError, "weight_ih_l1 must be on cpu, got meta")
    if kind == "one step elsewhere":
        rin.weight_hh_l1 = nn.Parameter(rin.weight_hh_l1.detach().to("meta"))
        return rin, (x[:1],), (RuntimeError, "weight_hh_l1 must be on cpu, got meta")
    if kind == "one direction in another dtype":
        rin = RIN(3, 4, bidirectional=True)
        rin.bias_ih_l0_reverse = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        return rin, (x,), (RuntimeError, "bias_ih_l0 must be alike in both directions")
    cell = cell.bfloat16()
    if kind == "cell too wide":
        cell.weight_hh = nn.Parameter(torch.zeros(34, 33, dtype=torch.bfloat16))
        return cell, (x[0].bfloat16(),), (RuntimeError, r"weight_hh must have shape \(33, 33\), got \(34, 33\)")
    h = torch.ones(2, 33, dtype=torch.bfloat16, device="meta")
    return cell, (x[0].bfloat16(), h), (RuntimeError, "hx must be on the device of input, cpu, got meta")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["none", "none, one step", "as many numbers", "later layer elsewhere", "one step elsewhere",
     "one direction in another dtype",
     "cell too wide", "cell and a state elsewhere"],
)  # fmt: skip
def test_exchanged_weights_are_refused_before_a_kernel_reads_them(kind, grad):
    module, args, (error, text) = _exchanged(kind)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=text):
        module(*args)
