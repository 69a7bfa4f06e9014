"""All peers by name; ours is the first, the best of the others is what it is compared with."""

from __future__ import annotations

from benchmarks.peers.jax_scan import JaxScan
from benchmarks.peers.onednn import OneDNN
from benchmarks.peers.onnx_engines import OnnxRuntime, OpenVINO
from benchmarks.peers.protocol import Peer
from benchmarks.peers.torch_rnn import FusedRIN, TorchCompile, TorchRNN

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (FusedRIN, TorchRNN, JaxScan, OneDNN, OnnxRuntime, OpenVINO, TorchCompile)
}
OURS = FusedRIN.name
