"""Decay and penalty pull V = U + I to the identity, by exactly what the formulas say, and nothing else with it."""

import copy
import math

import pytest
import torch
from fused_rin import RIN, RINCell, replace_rnn
from fused_rin.identity_prior import (
    decoupled,
    identity_distance,
    identity_penalty,
    param_groups,
    prior_strength,
    recurrent_matrices,
)
from torch import nn


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.rnn = RIN(3, 4, 2, bidirectional=True, **options)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)
        for parameter in self.parameters():
            nn.init.normal_(parameter)


def test_every_parameter_is_in_one_group():
    torch.manual_seed(0)
    model = Net()
    identity, others, rest = param_groups(model, identity_decay=0.3, weight_decay=0.1)
    assert [group["weight_decay"] for group in (identity, others, rest)] == [0.3, 0.1, 0.0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [sorted(names[id(parameter)] for parameter in group["params"]) for group in (identity, others, rest)]
    assert len(grouped[0]) == 4
    assert all("weight_hh" in name for name in grouped[0])
    assert all("weight_ih" in name or name == "head.weight" for name in grouped[1])
    assert all("bias" in name or name == "norm.weight" for name in grouped[2])
    assert sorted(name for group in grouped for name in group) == sorted(names.values())


def test_tied_and_frozen_weights_are_there_once_and_not_at_all():
    model = nn.ModuleList([RIN(3, 4), RIN(3, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model[0].weight_ih_l0.requires_grad_(False)
    identity, others, _ = param_groups(model, identity_decay=0.3)
    assert len(identity["params"]) == 1
    assert len(others["params"]) == 1


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decoupled_decay_shrinks_u_by_its_factor_alone(name):
    """With a gradient of zero the only thing that moves is what decays: U by (1 - lr * decay), step after step."""
    torch.manual_seed(0)
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = decoupled(OPTIMIZERS[name](param_groups(model, identity_decay=0.5)))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule.step()
    factor = (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5)
    for key, value in model.state_dict().items():
        expected = before[key] * (factor if "weight_hh" in key else 1.0)
        torch.testing.assert_close(value, expected)


def test_decoupled_decay_follows_a_learning_rate_in_a_tensor_without_reading_it():
    """In a CUDA graph the rate of later steps is what the tensor holds then."""
    weight = nn.Parameter(torch.ones(2, 2))
    rate = torch.tensor(0.1)
    optimizer = decoupled(torch.optim.SGD([{"params": [weight], "weight_decay": 0.5}], lr=rate, fused=True))
    weight.grad = torch.zeros_like(weight)
    for value in (0.1, 0.05):
        rate.fill_(value)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5)))
    # On the device "meta" no tensor can be read: the hook must not want to.
    weight = nn.Parameter(torch.ones(2, 2, device="meta"))
    optimizer = decoupled(torch.optim.SGD([{"params": [weight], "weight_decay": 0.5}], lr=0.1))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    weight.grad = torch.zeros_like(weight)
    (hook,) = optimizer._optimizer_step_pre_hooks.values()
    hook(optimizer, (), {})


def test_decoupling_twice_decays_once():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": 0.5}], lr=0.1)
    assert decoupled(optimizer) is optimizer
    decoupled(optimizer)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95))


def test_a_parameter_without_gradient_does_not_decay():
    """As in torch's own optimizers: it takes no part in the step."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = decoupled(torch.optim.SGD([{"params": [weight], "weight_decay": 0.5}], lr=0.1))
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))


def test_decay_pulls_a_rin_to_identity_and_a_plain_rnn_to_zero():
    torch.manual_seed(0)
    rin, plain = RIN(2, 5), nn.RNN(2, 5, nonlinearity="relu")
    groups = param_groups(nn.ModuleList([rin, plain]), identity_decay=1.0, weight_decay=1.0)
    optimizer = torch.optim.SGD(groups, lr=0.5)
    for _ in range(60):
        for parameter in (*rin.parameters(), *plain.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    (_, v), (_, w) = recurrent_matrices(nn.ModuleList([rin, plain]))
    torch.testing.assert_close(v[0], torch.eye(5))
    torch.testing.assert_close(w[0], torch.zeros(5, 5))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("skip", [1.0, 0.5, 0.0])
def test_distance_and_penalty_are_of_v_minus_identity(heads, skip):
    torch.manual_seed(0)
    model = RIN(3, 6, skip=skip, num_heads=heads)
    nn.init.normal_(model.weight_hh_l0)
    size = 6 // heads
    blocks = [model.weight_hh_l0[i * size : (i + 1) * size].detach() for i in range(heads)]
    expected = math.sqrt(sum(((block + (skip - 1) * torch.eye(size)) ** 2).sum().item() for block in blocks))
    assert identity_distance(model) == {"weight_hh_l0": pytest.approx(expected, rel=1e-5)}
    penalty = identity_penalty(model, 0.3)
    assert penalty.item() == pytest.approx(0.15 * expected**2, rel=1e-5)
    penalty.backward()
    wanted = 0.3 * torch.cat([block + (skip - 1) * torch.eye(size) for block in blocks])
    torch.testing.assert_close(model.weight_hh_l0.grad, wanted)


def test_penalty_and_decay_are_the_same_under_plain_sgd():
    torch.manual_seed(0)
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    decayed = torch.optim.SGD(param_groups(models[0], identity_decay=0.2), lr=0.1)
    penalised = torch.optim.SGD(models[1].parameters(), lr=0.1)
    x = torch.randn(5, 2, 3)
    for _ in range(3):
        for model, optimizer in zip(models, (decayed, penalised), strict=True):
            loss = model.head(model.norm(model.rnn(x)[0].tanh())).square().mean()
            if model is models[1]:
                loss = loss + identity_penalty(model, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_shared_matrix_counts_once():
    """So that penalty and decay stay the same where weights are tied."""
    model = nn.ModuleList([RIN(3, 4), RIN(3, 4), RIN(3, 4)])
    nn.init.normal_(model[0].weight_hh_l0)
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    distances = identity_distance(model)
    assert list(distances) == ["0.weight_hh_l0", "2.weight_hh_l0"]
    identity_penalty(model, 0.3).backward()
    torch.testing.assert_close(model[0].weight_hh_l0.grad, 0.3 * model[0].weight_hh_l0.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_small_u_is_not_lost_beside_the_identity(dtype):
    """In bfloat16 the step at 1 is 2^-7: U = 0.001 would vanish in (U + I) - I."""
    model = RIN(3, 4, dtype=dtype)
    nn.init.constant_(model.weight_hh_l0, 1e-3)
    expected = 4 * float(torch.tensor(1e-3, dtype=dtype))
    assert identity_distance(model)["weight_hh_l0"] == pytest.approx(expected, rel=1e-6)
    identity_penalty(model, 2.0).backward()
    torch.testing.assert_close(model.weight_hh_l0.grad, 2 * model.weight_hh_l0.detach())


def test_converted_models_decay_where_their_form_says():
    """from_rnn gives U = V - I, which decays to the identity; replace_rnn keeps V, an ordinary weight."""
    model = nn.ModuleList([nn.RNN(2, 3, nonlinearity="relu"), nn.RNN(2, 3)])
    replace_rnn(model)
    model[0] = RIN.from_rnn(model[0].to_rnn())
    identity, others, _ = param_groups(model, identity_decay=0.1)
    assert identity["params"] == [model[0].weight_hh_l0]
    assert [id(weight) for weight in others["params"]] == [
        id(weight) for weight in (model[0].weight_ih_l0, model[1].weight_ih_l0, model[1].weight_hh_l0)
    ]


def test_a_parametrized_matrix_has_a_distance_and_a_penalty_but_no_decay():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = RIN(2, 3)
    nn.init.constant_(model.weight_hh_l0, 1.0)
    torch.nn.utils.parametrize.register_parametrization(model, "weight_hh_l0", Twice())
    assert identity_distance(model) == {"weight_hh_l0": pytest.approx(6.0)}
    identity_penalty(model).backward()
    torch.testing.assert_close(model.parametrizations.weight_hh_l0.original.grad, torch.full((3, 3), 4.0))
    assert sum(len(group["params"]) for group in param_groups(model)) == 4
    with pytest.raises(ValueError, match="cannot act on weight_hh_l0: it is parametrized; use identity_penalty"):
        param_groups(model, identity_decay=0.1)


def test_decoupled_decay_survives_a_checkpoint_and_a_copy():
    """A state dict has the decay but no hook, and so has a deep copy: `decoupled` gives the hook back."""

    def make(model):
        return torch.optim.SGD(param_groups(model, identity_decay=0.5), lr=0.1)

    model = RIN(2, 3)
    nn.init.constant_(model.weight_hh_l0, 1.0)
    state = decoupled(make(model)).state_dict()
    loaded = make(model)
    loaded.load_state_dict(state)
    model.weight_hh_l0.grad = torch.zeros(3, 3)
    decoupled(loaded).step()
    torch.testing.assert_close(model.weight_hh_l0.detach(), torch.full((3, 3), 0.95))
    twin, optimizer = copy.deepcopy((model, loaded))
    twin.weight_hh_l0.grad = torch.zeros(3, 3)
    decoupled(optimizer).step()
    torch.testing.assert_close(twin.weight_hh_l0.detach(), torch.full((3, 3), 0.95**2))


@pytest.mark.parametrize("skip", [1.0, 0.5])
def test_decay_of_a_cell_and_of_heads_pulls_v_to_the_skip(skip):
    model = nn.ModuleList([RINCell(2, 4, skip=skip), RIN(2, 4, num_heads=2, bidirectional=True, skip=skip)])
    optimizer = torch.optim.SGD(param_groups(model, identity_decay=1.0), lr=0.5)
    for _ in range(60):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    matrices = recurrent_matrices(model)
    assert [name for name, _ in matrices] == ["0.weight_hh", "1.weight_hh_l0", "1.weight_hh_l0_reverse"]
    for _, matrix in matrices:
        torch.testing.assert_close(matrix, (skip * torch.eye(matrix.shape[-1])).expand_as(matrix))


def test_cells_and_torch_modules_count():
    model = nn.ModuleDict({"cell": RINCell(2, 3), "rnn": nn.RNN(2, 3), "lstm": nn.LSTM(2, 3)})
    with torch.no_grad():
        model["rnn"].weight_hh_l0.copy_(torch.eye(3))
        model["cell"].weight_hh.zero_()
    assert identity_distance(model) == {"cell.weight_hh": 0.0, "rnn.weight_hh_l0": 0.0}


def test_a_fixed_prior_weakens_with_the_data():
    assert prior_strength(0.1, 1000) == pytest.approx(0.1)
    assert prior_strength(0.1, 2000) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: param_groups(RIN(2, 3), identity_decay=-1.0),
            "identity_decay must be finite and not negative",
        ),
        (
            lambda: param_groups(RIN(2, 3), weight_decay=math.nan),
            "weight_decay must be finite and not negative",
        ),
        (lambda: param_groups(nn.RNN(2, 3), identity_decay=0.1), "needs a RIN with skip != 0"),
        (lambda: param_groups(RIN(2, 3, skip=0.0), identity_decay=0.1), "needs a RIN with skip != 0"),
        (lambda: identity_distance(nn.LSTM(2, 3)), "no recurrent matrix"),
        (lambda: identity_penalty(nn.Linear(2, 3)), "no recurrent matrix"),
        (lambda: prior_strength(0.0, 10), "sigma must be positive and finite, got 0"),
        (lambda: prior_strength(1.0, 0), "samples must be positive, got 0"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_module_can_say_which_of_its_weights_are_u():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.u = nn.Parameter(torch.zeros(2, 3, 3))
            self.w = nn.Parameter(torch.zeros(3, 3))

        def identity_weights(self):
            return [self.u]

    model = nn.Sequential(Own())
    identity, others = param_groups(model, identity_decay=0.1)
    assert identity["params"] == [model[0].u]
    assert others["params"] == [model[0].w]
    assert identity_distance(model) == {"0.u": 0.0}
