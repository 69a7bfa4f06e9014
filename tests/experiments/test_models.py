"""The models have the paper's initialisations and read the last state."""

import pytest
import torch
from fused_rin.experiments.models import MODELS, SequenceModel, make_rnn
from torch import nn


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layers", [1, 2])
def test_reads_the_last_state_of_the_last_layer(name, layers):
    torch.manual_seed(0)
    model = SequenceModel(make_rnn(name, 3, 17, layers, input_std=0.3, recurrent_std=0.01), 4)
    x = torch.randn(7, 5, 3)
    torch.testing.assert_close(model(x), model.head(model.rnn(x)[0][-1]))
    assert model(x).shape == (5, 4)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_biases_start_at_zero(name):
    rnn = make_rnn(name, 3, 17, 2)
    biases = {key: value for key, value in rnn.named_parameters() if "bias" in key}
    assert len(biases) == (6 if name == "rin-dt" else 4)
    assert all((value == 0).all() for value in biases.values())


def test_rin_and_irnn_start_as_in_the_paper():
    torch.manual_seed(0)
    rin = make_rnn("rin", 50, 200)
    assert float(rin.skip) == 1
    assert rin.weight_ih_l0.std().item() == pytest.approx(1e-3, rel=0.05)
    assert rin.weight_hh_l0.std().item() == pytest.approx(1e-3, rel=0.05)
    irnn = make_rnn("irnn", 50, 200, input_std=0.1)
    assert float(irnn.skip) == 0
    assert irnn.weight_ih_l0.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(irnn.weight_hh_l0, torch.eye(200))


def test_a_shift_start_hands_every_state_to_the_next_unit():
    rin = make_rnn("rin", 1, 5, 2, recurrent_std=0.0, recurrent_init="shift")
    with torch.no_grad():
        rin.weight_ih_l0.zero_()
        h = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]], [[0.0] * 5]])
        assert rin(torch.zeros(1, 1, 1), h)[1][0, 0].tolist() == [5.0, 1.0, 2.0, 3.0, 4.0]
        assert torch.equal(rin(torch.zeros(5, 1, 1), h)[1][0], h[0])
        assert torch.equal(rin.weight_hh_l1, rin.weight_hh_l0)
    torch.manual_seed(0)
    drawn = make_rnn("rin", 1, 100, recurrent_std=0.01, recurrent_init="shift").weight_hh_l0
    start = make_rnn("rin", 1, 100, recurrent_std=0.0, recurrent_init="shift").weight_hh_l0
    assert (drawn - start).std().item() == pytest.approx(0.01, rel=0.05)


def test_a_start_of_cycles_turns_each_by_itself_and_keeps_the_other_units():
    rin = make_rnn("rin", 1, 7, recurrent_std=0.0, recurrent_init="cycles", cycles=(2, 3))
    with torch.no_grad():
        rin.weight_ih_l0.zero_()
        h = torch.arange(1.0, 8.0).view(1, 1, 7)
        assert rin(torch.zeros(1, 1, 1), h)[1][0, 0].tolist() == [2.0, 1.0, 5.0, 3.0, 4.0, 6.0, 7.0]
        assert torch.equal(rin(torch.zeros(6, 1, 1), h)[1], h)
    whole = make_rnn("rin", 1, 7, recurrent_std=0.0, recurrent_init="cycles", cycles=(7,)).weight_hh_l0
    assert torch.equal(whole, make_rnn("rin", 1, 7, recurrent_std=0.0, recurrent_init="shift").weight_hh_l0)


@pytest.mark.parametrize(("name", "gates"), [("rnn", 1), ("lstm", 4), ("gru", 3)])
def test_peers_start_with_glorot_and_orthogonal_gates(name, gates):
    torch.manual_seed(0)
    rnn = make_rnn(name, 30, 50)
    assert isinstance(rnn, {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[name])
    bound = (6 / (30 + 50)) ** 0.5  # of one gate, not of the stacked matrix
    for w_ih, w_hh in zip(rnn.weight_ih_l0.chunk(gates), rnn.weight_hh_l0.chunk(gates), strict=True):
        assert 0.95 * bound < w_ih.abs().max() <= bound
        torch.testing.assert_close(w_hh @ w_hh.T, torch.eye(50), atol=1e-5, rtol=0)


def test_a_rin_is_the_relu_rnn_with_the_identity_added():
    torch.manual_seed(0)
    rin = make_rnn("rin", 2, 20, input_std=0.3, recurrent_std=0.05)
    peer = nn.RNN(2, 20, nonlinearity="relu")
    peer.load_state_dict({key: value for key, value in rin.state_dict().items() if key != "skip"})
    with torch.no_grad():
        peer.weight_hh_l0 += torch.eye(20)
    x = torch.randn(30, 4, 2)
    torch.testing.assert_close(rin(x), peer(x))


def test_deep_transition_is_two_transitions_a_step():
    torch.manual_seed(0)
    rnn = make_rnn("rin-dt", 3, 7, input_std=0.5, recurrent_std=0.2).double()
    for bias in (rnn.bias_ih_l0, rnn.bias_deep_l0):
        nn.init.normal_(bias, std=0.1)
    x = torch.randn(11, 4, 3, dtype=torch.double, requires_grad=True)
    eye = torch.eye(7, dtype=torch.double)
    h, states = torch.zeros(4, 7, dtype=torch.double), []
    for x_t in x:
        between = torch.relu(x_t @ rnn.weight_ih_l0.T + h @ (rnn.weight_hh_l0 + eye).T + rnn.bias_ih_l0)
        h = torch.relu(between @ (rnn.weight_deep_l0[0] + eye).T + rnn.bias_deep_l0[0])
        states.append(h)
    expected = torch.stack(states)
    assert (expected > 0).any()
    output, last = rnn(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(last[0], expected[-1])
    wanted = (x, *(p for name, p in rnn.named_parameters() if name != "bias_hh_l0"))
    upstream = torch.randn_like(output)
    for ours, theirs in zip(
        torch.autograd.grad(output, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_tanh_is_the_tanh_rnn_on_our_kernels():
    torch.manual_seed(0)
    ours, theirs = make_rnn("tanh", 3, 17, 2), make_rnn("rnn", 3, 17, 2)
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if name != "skip"})
    x = torch.randn(9, 4, 3)
    torch.testing.assert_close(ours(x), theirs(x))
