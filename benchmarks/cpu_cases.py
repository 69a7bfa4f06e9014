"""The points of the CPU comparison with torch.nn.RNN, and what is timed at each."""

from __future__ import annotations

from collections.abc import Callable

import fused_rin
import torch

# (B, T, H), input_size = hidden_size unless given as a fourth number; fp32.
INFERENCE = [
    (1, 512, 64), (1, 512, 128), (1, 512, 256), (1, 256, 512), (1, 128, 1024), (16, 256, 128), (16, 256, 256),
    (64, 128, 128), (64, 128, 256), (64, 64, 512),
]  # fmt: skip
TRAINING = [
    (1, 512, 64), (1, 512, 128), (1, 512, 256), (1, 256, 512), (16, 256, 128), (16, 256, 256), (64, 128, 128),
    (64, 128, 256), (64, 64, 512), (128, 784, 100), (128, 784, 100, 1),
]  # fmt: skip


def make_pair(hidden: int, input_size: int, start: str) -> tuple[torch.nn.RNN, fused_rin.RIN]:
    """nn.RNN(relu) and the RIN that is the same function: V = U + I.

    `start` is "rnn" for nn.RNN's own initialisation, V uniform in +-1/sqrt(H) (about half of the states are 0), or
    "rin" for the RIN's, U from N(0, 0.001^2), with input weights as nn.RNN has them (few states are 0).
    """
    rnn = torch.nn.RNN(input_size, hidden, nonlinearity="relu")
    rin = fused_rin.RIN(input_size, hidden)
    with torch.no_grad():
        for name, theirs in rnn.named_parameters():
            ours = getattr(rin, name)
            if name != "weight_hh_l0":
                ours.copy_(theirs)
            elif start == "rnn":
                ours.copy_(theirs - torch.eye(hidden))
            else:
                theirs.copy_(ours + torch.eye(hidden))
    return rnn, rin


def inference(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return module(x)[0]

    return run


def training(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward and backward, gradients of the input and all weights; no optimizer."""
    x = x.clone().requires_grad_()

    def run() -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        x.grad = None
        out = module(x)[0]
        out.backward(grad)
        return x.grad

    return run
