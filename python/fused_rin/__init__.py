"""Persistent fused kernels for the Recurrent Identity Network, and for nn.RNN.

h_t = act(W x_t + b + U h_{t-1} + s * h_{t-1})     (Hu, Huber, Anumula, Liu: arXiv 1801.06105)
"""

import torch as _torch

from fused_rin import onnx, parametrize
from fused_rin.backends import BackendError, use_backend
from fused_rin.chunks import parallel_recurrence
from fused_rin.convert import Replaced, load_rnn_state_dict, replace_rnn, restore_rnn
from fused_rin.deep import DeepTransitionRIN
from fused_rin.device import Device
from fused_rin.explanation import Choice, explain
from fused_rin.functional import recurrence
from fused_rin.leaky import PLRNN, LeakyRNN, LeakyRNNCell, PLRNNCell
from fused_rin.library import operator_library
from fused_rin.modules import RIN, RINCell

# A model saved whole loads under weights_only=True, torch.load's default, as far as it is ours.
_torch.serialization.add_safe_globals([RIN, RINCell, DeepTransitionRIN, LeakyRNN, LeakyRNNCell, PLRNN, PLRNNCell])

__version__ = "0.1.0"

__all__ = [
    "PLRNN",
    "RIN",
    "BackendError",
    "Choice",
    "DeepTransitionRIN",
    "Device",
    "LeakyRNN",
    "LeakyRNNCell",
    "PLRNNCell",
    "RINCell",
    "Replaced",
    "explain",
    "load_rnn_state_dict",
    "onnx",
    "operator_library",
    "parallel_recurrence",
    "parametrize",
    "recurrence",
    "replace_rnn",
    "restore_rnn",
    "use_backend",
]
