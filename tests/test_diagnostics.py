"""The numbers are what their definitions say, on networks small enough to compute them by hand."""

import pytest
import torch
from fused_rin import RIN, RINCell, diagnostics
from torch import nn


class Last(nn.Module):
    """A recurrent network read at its last step, with an embedding before it."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, 1)

    def forward(self, x):
        output = self.rnn(x)[0]
        return self.head(output[:, -1] if self.rnn.batch_first else output[-1])


def make(kind, **options):
    torch.manual_seed(0)
    rnn = kind(3, 6, **options)
    for parameter in rnn.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Last(rnn)


@pytest.mark.parametrize("kind", [RIN, nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
def test_gradient_norms_are_those_of_autograd(kind, batch_first):
    model = make(kind, batch_first=batch_first)
    x = torch.randn((4, 9, 3) if batch_first else (9, 4, 3), requires_grad=True)
    model(x).square().sum().backward()
    expected = (x.grad.transpose(0, 1) if batch_first else x.grad).flatten(1).norm(dim=1)
    model.zero_grad()
    with torch.no_grad():  # also where no graph is wanted
        norms = diagnostics.gradient_norms(model, (x.detach(),), lambda output: output.square().sum())
    torch.testing.assert_close(norms, expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.rnn._forward_hooks
    assert not model.rnn._forward_pre_hooks


def test_a_rin_keeps_the_gradient_that_a_small_tanh_rnn_loses():
    """U = 0: dh_T/dh_t is the identity for the RIN; V = I/2 halves it at every step."""
    rin, tanh = make(RIN), make(nn.RNN)
    with torch.no_grad():
        rin.rnn.weight_hh_l0.zero_()
        rin.rnn.weight_ih_l0.abs_()
        rin.rnn.bias_ih_l0.fill_(1.0)
        rin.rnn.bias_hh_l0.zero_()
        tanh.rnn.weight_hh_l0.copy_(0.5 * torch.eye(6))
    x = torch.rand(40, 4, 3)
    norms = [diagnostics.gradient_norms(model, (x,), torch.sum) for model in (rin, tanh)]
    torch.testing.assert_close(norms[0], norms[0][-1].expand(40))
    assert norms[1][0] < 1e-9 * norms[1][-1]


def test_estimation_error_is_the_mean_difference_of_states():
    model = make(RIN)
    x = torch.randn(9, 4, 3)
    states = model.rnn(x)[0].detach()
    to_last, to_previous = diagnostics.estimation_error(model, (x,))
    before = torch.cat([torch.zeros(1, 4, 6), states[:-1]])
    torch.testing.assert_close(to_last, (states - states[-1]).mean((1, 2)))
    torch.testing.assert_close(to_previous, (states - before).mean((1, 2)))
    assert to_last[-1] == 0


def test_activity_counts_dead_and_active_units():
    model = make(RIN)
    with torch.no_grad():
        for name, parameter in model.rnn.named_parameters():
            parameter.zero_()
            if name == "bias_ih_l0":
                parameter.copy_(torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]))
            if name == "weight_ih_l0":
                parameter[2, 0] = 10.0
    x = torch.zeros(5, 2, 3)
    x[:2, 1, 0] = -1.0  # the third unit is off in one of two sequences for two steps
    dead, active = diagnostics.activity(model, (x,))
    assert dead == pytest.approx(0.5)
    torch.testing.assert_close(active, torch.tensor([5 / 12, 5 / 12, 0.5, 0.5, 0.5]))


def test_eigenvalues_are_those_of_identity_plus_u():
    model = make(RIN, num_layers=2)
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(torch.diag(torch.arange(6.0)))
        model.rnn.weight_hh_l1.zero_()
        model.rnn.weight_hh_l1[0, 1], model.rnn.weight_hh_l1[1, 0] = 2.0, -2.0
    values = diagnostics.eigenvalues(model)
    assert sorted(values["rnn.weight_hh_l0"].real.tolist()) == pytest.approx([1, 2, 3, 4, 5, 6])
    assert sorted(values["rnn.weight_hh_l1"].imag.tolist()) == pytest.approx([-2, 0, 0, 0, 0, 2])
    with pytest.raises(ValueError, match="no recurrent matrix"):
        diagnostics.eigenvalues(make(nn.LSTM))


def test_a_named_module_an_unbatched_sequence_and_a_named_argument():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = RIN(3, 6), nn.GRU(6, 5)

        def forward(self, x):
            return self.second(input=self.first(x)[0])[0]

    torch.manual_seed(0)
    model, x = Two(), torch.randn(9, 3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    states = model.first(x)[0].detach().requires_grad_()
    model.second(states)[0].square().sum().backward()
    norms = diagnostics.gradient_norms(model, (x,), lambda output: output.square().sum(), model.second)
    torch.testing.assert_close(norms, states.grad.norm(dim=1))
    to_last, _ = diagnostics.estimation_error(model, (x,))
    torch.testing.assert_close(to_last, (states - states[-1]).mean(1).detach())


def test_what_cannot_be_looked_into_is_refused():
    x = torch.zeros(5, 2, 3)
    with pytest.raises(ValueError, match="name its recurrent module"):
        diagnostics.activity(nn.Linear(3, 3), (torch.zeros(2, 3),))
    with pytest.raises(ValueError, match="reads whole sequences, got a RINCell"):
        diagnostics.activity(nn.Identity(), (x,), RINCell(3, 3))
    with pytest.raises(ValueError, match="does not call its recurrent module"):
        diagnostics.gradient_norms(nn.Linear(3, 1), (x,), torch.sum, RIN(3, 3))
    model = RIN(3, 3)
    with pytest.raises(ValueError, match="must read a tensor, got a PackedSequence"):
        diagnostics.activity(model, (nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])),))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_everything_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    model, x = make(RIN), torch.randn(9, 4, 3)
    figures = [
        diagnostics.draw_gradient_norms({"a": diagnostics.gradient_norms(model, (x,), torch.sum)}),
        diagnostics.draw_estimation_error({"a": diagnostics.estimation_error(model, (x,))}),
        diagnostics.draw_activity({"a": diagnostics.activity(model, (x,))}),
        diagnostics.draw_eigenvalues(diagnostics.eigenvalues(model)),
    ]
    for index, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{index}.png")
        assert (tmp_path / f"{index}.png").read_bytes().startswith(b"\x89PNG")
        assert figure.axes[0].get_legend().get_texts()
