"""The models have the paper's initialisations and read the last state."""

import pytest
import torch
from fused_rin.experiments.models import MODELS, build_model
from torch import nn


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layers", [1, 2])
def test_reads_the_last_state_of_the_last_layer(name, layers):
    torch.manual_seed(0)
    model = build_model(name, 3, 4, 17, layers, input_std=0.3, recurrent_std=0.01)
    x = torch.randn(7, 5, 3)
    torch.testing.assert_close(model(x), model.head(model.rnn(x)[0][-1]))
    assert model(x).shape == (5, 4)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_biases_start_at_zero(name):
    model = build_model(name, 3, 4, 17, 2)
    biases = {key: value for key, value in model.rnn.named_parameters() if "bias" in key}
    assert len(biases) == 4
    assert all((value == 0).all() for value in biases.values())


def test_rin_and_irnn_start_as_in_the_paper():
    torch.manual_seed(0)
    rin = build_model("rin", 50, 1, 200).rnn
    assert float(rin.skip) == 1
    assert rin.weight_ih_l0.std().item() == pytest.approx(1e-3, rel=0.05)
    assert rin.weight_hh_l0.std().item() == pytest.approx(1e-3, rel=0.05)
    irnn = build_model("irnn", 50, 1, 200, input_std=0.1).rnn
    assert float(irnn.skip) == 0
    assert irnn.weight_ih_l0.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(irnn.weight_hh_l0, torch.eye(200))


@pytest.mark.parametrize(("name", "gates"), [("rnn", 1), ("lstm", 4), ("gru", 3)])
def test_peers_start_with_glorot_and_orthogonal_gates(name, gates):
    torch.manual_seed(0)
    rnn = build_model(name, 30, 1, 50).rnn
    assert isinstance(rnn, {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[name])
    bound = (6 / (30 + 50)) ** 0.5  # of one gate, not of the stacked matrix
    for w_ih, w_hh in zip(rnn.weight_ih_l0.chunk(gates), rnn.weight_hh_l0.chunk(gates), strict=True):
        assert 0.95 * bound < w_ih.abs().max() <= bound
        torch.testing.assert_close(w_hh @ w_hh.T, torch.eye(50), atol=1e-5, rtol=0)


def test_a_rin_is_the_relu_rnn_with_the_identity_added():
    torch.manual_seed(0)
    rin = build_model("rin", 2, 1, 20, input_std=0.3, recurrent_std=0.05).rnn
    peer = nn.RNN(2, 20, nonlinearity="relu")
    peer.load_state_dict({key: value for key, value in rin.state_dict().items() if key != "skip"})
    with torch.no_grad():
        peer.weight_hh_l0 += torch.eye(20)
    x = torch.randn(30, 4, 2)
    torch.testing.assert_close(rin(x), peer(x))
