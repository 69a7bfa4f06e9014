"""The arms of the identity-prior experiment differ in the decay alone, and decay moves V where it should."""

import dataclasses

import pytest
import torch
from fused_rin.experiments.identity import trials as identity
from fused_rin.experiments.identity.trials import (
    PLANS,
    Trial,
    first_model,
    make_optimizer,
    run_trial,
    to_v_form,
    trials,
)
from fused_rin.experiments.tasks import digits
from fused_rin.identity_prior import identity_distance, recurrent_matrices

PLAN = dataclasses.replace(
    PLANS["digits"],
    rates={"sgd": 0.05, "rmsprop": 1e-3, "adam": 1e-3},
    settings={**PLANS["digits"].settings, "hidden_size": 12, "input_std": 0.3},
)
DECAYS = [(name, form) for name, forms in identity.FORMS.items() for form in forms]


@pytest.fixture(scope="module")
def task():
    return digits()


def walk(task, updates=25, **fields):
    """V after every update, [updates + 1, D, D], in float64."""
    trial = Trial("digits", samples=90, **fields)
    model, data = first_model(task, Trial("digits", "sgd", 90, "none"), PLAN).double(), task.subset(90, 0)
    if trial.arm == "v-decay":
        model = to_v_form(model)
    optimizer = make_optimizer(model, trial, PLAN)
    path = [recurrent_matrices(model)[0][1][0].detach().clone()]
    for step in range(updates):
        (x,), target = data.train_batch(step, 32)
        optimizer.zero_grad()
        data.loss(model(x.double()), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        path.append(recurrent_matrices(model)[0][1][0].detach().clone())
    return torch.stack(path)


@pytest.mark.parametrize("optimizer", identity.OPTIMIZERS)
def test_without_decay_the_u_and_the_v_form_walk_the_same_path(task, optimizer):
    u = walk(task, optimizer=optimizer, arm="none")
    v = walk(task, optimizer=optimizer, arm="v-decay", strength=0.0)
    assert (u[-1] - u[0]).abs().max() > 1e-3  # it is a path
    torch.testing.assert_close(u, v, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("optimizer", "form"), DECAYS)
def test_with_decay_they_part_one_to_the_identity_and_one_to_zero(task, optimizer, form):
    strength = 0.3 if form == "penalty" else 10.0
    free, u, v = (
        walk(task, 60, optimizer=optimizer, arm=arm, form=form, strength=strength if form else 0.0)[-1]
        for arm, form in (("none", ""), ("u-decay", form), ("v-decay", form))
    )
    eye = torch.eye(12)
    assert (u - eye).norm() < 0.95 * (free - eye).norm()
    assert v.norm() < 0.95 * free.norm()
    assert (v - eye).norm() > 1.2 * (free - eye).norm()


@pytest.mark.parametrize("form", ["penalty", "decoupled"])
def test_the_first_update_of_decay_is_what_the_formula_says(task, form):
    """Under SGD: - rate * strength * U for decay of U, - rate * strength * V for decay of V."""
    free = walk(task, 1, optimizer="sgd", arm="none")
    for arm in ("u-decay", "v-decay"):
        path = walk(task, 1, optimizer="sgd", arm=arm, form=form, strength=0.3)
        start = path[0] - torch.eye(12) if arm == "u-decay" else path[0]
        torch.testing.assert_close(path[1] - free[1], -0.05 * 0.3 * start, rtol=1e-6, atol=1e-9)


def test_only_the_recurrent_matrix_decays(task):
    for arm in ("u-decay", "v-decay"):
        trial = Trial("digits", "sgd", 90, arm, "penalty", 0.3)
        model = first_model(task, trial, PLAN)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = make_optimizer(model, trial, PLAN)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert moved == ["rnn.weight_hh_l0"]


def test_all_arms_start_alike(task):
    models = {arm: first_model(task, Trial("digits", "sgd", 90, arm), PLAN) for arm in identity_arms()}
    (_, expected), *_ = recurrent_matrices(models["none"])
    assert 0 < (expected - torch.eye(12)).abs().max() < 0.1
    (x,), _ = task.train_batch(0, 5)
    output = models["none"](x)
    for model in models.values():
        torch.testing.assert_close(recurrent_matrices(model)[0][1], expected)
        torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-4)
    assert not torch.equal(first_model(task, Trial("digits", "sgd", 90, "none", seed=1), PLAN)(x), output)


def identity_arms():
    return dict.fromkeys(trial.arm for trial in trials(1))


def test_the_plan_has_every_arm_everywhere_and_priors_that_fall_as_one_over_n():
    all_trials = list(trials(2))
    assert len({trial.name for trial in all_trials}) == len(all_trials) == 2 * 272
    cells = {(t.task, t.optimizer, t.samples) for t in all_trials}
    assert len(cells) == 2 * 3 * 3 + 2 * 3 + 2 * 2
    for cell in cells:
        arms = {t.arm for t in all_trials if (t.task, t.optimizer, t.samples) == cell}
        assert arms == {"u-decay", "v-decay", "none"} | ({"small-rate"} if not PLANS[cell[0]].grows else set())
    priors = [t for t in all_trials if t.prior]
    assert {t.arm for t in priors} == {"u-decay"}
    for t in priors:
        smallest = PLANS[t.task].sizes[0]
        assert t.samples > smallest
        assert t.strength == pytest.approx(t.prior * smallest / t.samples)


def test_updates_grow_with_the_data_where_epochs_are_fixed(task, monkeypatch):
    assert [PLANS["mnist-rows-epochs"].updates_at(n, 400) for n in (300, 3000, 30000)] == [400, 4000, 40000]
    assert [PLANS["mnist-rows"].updates_at(n, 400) for n in (300, 4000, 60000)] == [400] * 3
    plan = dataclasses.replace(PLAN, grows=True)
    for samples, last in ((90, 6), (360, 24)):
        records = run_trial(Trial("digits", "adam", samples, "none"), task, plan, 6)
        assert records[-1]["step"] == last


def test_a_trial_records_what_it_says(task):
    trial = Trial("digits", "adam", 90, "u-decay", "decoupled", 1.0)
    records = run_trial(trial, task, PLAN, 16)
    assert [record["step"] for record in records] == [0, 2, 4, 8, 12, 16]
    assert [record.get("last") for record in records] == [None] * 5 + [True]
    assert run_trial(trial, task, PLAN, 16) == records
    first = records[0]
    model, data = first_model(task, trial, PLAN), task.subset(90, 0)
    (x,), target = data.train_batch(0, 90)
    loss = data.loss(model(x), target)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm > 1
    assert first["gradient_norm"] is None
    assert records[1]["gradient_norm"] > 0
    assert first["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["gradient"] == pytest.approx(model.rnn.weight_hh_l0.grad.norm().item(), rel=1e-4)
    assert first["distance"] == pytest.approx(identity_distance(model)["rnn.weight_hh_l0"], rel=1e-6)
    assert first["pull"] == pytest.approx(1.0 * model.rnn.weight_hh_l0.detach().norm().item(), rel=1e-5)
    radius = torch.linalg.eigvals(model.rnn.weight_hh_l0.double() + torch.eye(12)).abs().max().item()
    assert first["radius"] == pytest.approx(radius, rel=1e-5)
    times = [t for t, _ in first["over_time"]]
    assert (times[0], times[-1], len(times)) == (0, 63, 16)
    (x,), target = next(task.test_batches(360))
    assert first["accuracy"] == pytest.approx(task.correct(first_model(task, trial, PLAN)(x), target).float().mean())


def test_the_small_rate_takes_four_times_the_updates(task):
    records = run_trial(Trial("digits", "sgd", 90, "small-rate"), task, PLAN, 8)
    assert records[-1]["step"] == 32


def test_what_grows_too_large_is_recorded_as_diverged(task):
    plan = dataclasses.replace(PLAN, rates={"sgd": 1e20})
    records = run_trial(Trial("digits", "sgd", 90, "none"), task, plan, 8)
    assert records[-1]["diverged"]
    assert records[-1]["last"]
    assert records[-1]["step"] < 8
