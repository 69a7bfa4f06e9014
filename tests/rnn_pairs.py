"""Pairs of a RIN and the torch.nn.RNN that it has to be the same as."""

from __future__ import annotations

import torch
from fused_rin import RIN
from torch import nn
from torch.nn.utils import rnn as rnn_utils

MODES = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
]


def pair(options=None, dtype=torch.float32, nonlinearity="relu", seed=0):
    """A RIN with skip=0 and the torch.nn.RNN whose weights it has."""
    torch.manual_seed(seed)
    theirs = nn.RNN(5, 7, nonlinearity=nonlinearity, dtype=dtype, **(options or {}))
    ours = RIN(5, 7, nonlinearity=nonlinearity, dtype=dtype, skip=0, **(options or {}))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, rnn_utils.PackedSequence):
            assert isinstance(a, rnn_utils.PackedSequence)
            assert torch.equal(a.batch_sizes, b.batch_sizes)
            for i, j in zip(a[2:], b[2:], strict=True):
                assert (i is None and j is None) or torch.equal(i, j)
            a, b = a.data, b.data
        torch.testing.assert_close(a, b, **tolerance)
