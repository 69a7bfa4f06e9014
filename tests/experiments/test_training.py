"""A run leaves what it should, and goes on after an interruption as if there had been none."""

import json
import math
import os
import signal
import subprocess
import time
from itertools import pairwise

import pytest
import torch
from experiment_helpers import fused_rin, metrics
from fused_rin.experiments.training.checkpoints import read_checkpoint
from fused_rin.experiments.training.progress import train_with_progress
from fused_rin.experiments.training.runs import Run
from fused_rin.experiments.training.settings import RECIPES, Settings
from fused_rin.experiments.training.trainer import Diverged, Trainer

from tests import warm


class Interruption(Exception):
    pass


def interrupt_at(step):
    def report(now, record):
        if record is None and now == step:
            os.kill(os.getpid(), signal.SIGINT)

    return report


def assert_same_state(first, second):
    a, b = read_checkpoint(first / "checkpoint.pt"), read_checkpoint(second / "checkpoint.pt")
    assert a.pop("seconds") > 0
    assert b.pop("seconds") > 0
    flat_a, flat_b = (torch.utils._pytree.tree_flatten(tree) for tree in (a, b))
    assert flat_a[1] == flat_b[1]
    for x, y in zip(flat_a[0], flat_b[0], strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


CASES = [
    {"model": "rin", "recurrent_init": "cycles", "recurrent_cycles": "2,3"},
    {"model": "irnn", "recurrent_optimizer": "muon", "recurrent_rate": 0.1},
    {"model": "lstm", "optimizer": "rmsprop", "num_layers": 2},
    {"model": "gru", "optimizer": "sgd", "precision": "64-true", "state_noise": 0.1, "weight_decay": 0.1},
    {
        "model": "rin-dt",
        "optimizer": "rmsprop",
        "identity_decay": 1.0,
        "weight_decay": 0.1,
        "ema": 0.9,
        "recurrent_rate": 0.3,
    },
    {
        "model": "rnn",
        "task": "digits",
        "noise": 0.1,
        "schedule": "cosine",
        "batch_size": 479,
        "permute": True,
        "standardize": True,
        "state_noise": 0.1,
        "ema": 0.99,
        "num_layers": 2,
    },
]


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: changes["model"])
@pytest.mark.parametrize("step", [1, 13])
def test_resumes_bit_for_bit(tiny_run, tmp_path, changes, step):
    whole = Trainer(tiny_run("whole", **changes)).run()
    assert (whole.step, whole.interrupted) == (24, False)

    folder = tiny_run("parts", **changes)
    first = Trainer(folder, report=interrupt_at(step)).run()
    assert (first.step, first.interrupted) == (step, True)
    rest = Trainer(Run.open(folder.path), resume=True).run()
    assert (rest.step, rest.interrupted) == (24, False)

    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")


def test_metrics_after_the_checkpoint_are_recorded_again_not_twice(tiny_run, tmp_path):
    """What a crash leaves: a checkpoint of step 14, metrics up to step 20, the last line cut short."""
    Trainer(tiny_run("whole")).run()
    folder = tiny_run("crashed")

    def crash(step, record):
        if step == 21:
            raise Interruption

    with pytest.raises(Interruption):
        Trainer(folder, report=crash).run()
    assert read_checkpoint(folder.checkpoint_path)["step"] == 14
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 25, "spl')
    Trainer(Run.open(folder.path), resume=True).run()
    assert metrics(folder.path) == metrics(tmp_path / "whole")


def test_metrics_hold_what_was_asked_for(tiny_run):
    folder = tiny_run()
    outcome = Trainer(folder).run()
    records = metrics(folder.path)
    assert [r["step"] for r in records if r["split"] == "train"] == [5, 10, 15, 20, 24]
    assert [r["step"] for r in records if r["split"] == "test"] == [10, 20, 24]
    assert outcome.test == folder.read_metrics()[-1]
    for record in records:
        assert 0 <= record["accuracy"] <= 1
        assert record["loss"] > 0
    assert all(r["gradient_norm"] > 0 and r["learning_rate"] == 1e-3 for r in records if r["split"] == "train")
    config = json.loads((folder.path / "config.json").read_text())
    assert config["settings"] == folder.settings.to_dict()


def test_training_metrics_are_means_over_the_samples_since_the_last_line(tiny_run):
    """With a learning rate of 0 the model never changes, so the means can be computed from outside."""
    trainer = Trainer(tiny_run(learning_rate=0.0))
    batches = [trainer.task.train_batch(number, 32) for number in range(5)]
    with torch.no_grad():
        losses = [trainer.task.loss(trainer.model(*inputs), target).item() for inputs, target in batches]
    tests = list(trainer.task.test_batches(20))
    with torch.no_grad():
        test_loss = trainer.task.loss(trainer.model(*tests[0].inputs), tests[0].target).item()
    trainer.run()
    records = metrics(trainer.folder.path)
    assert records[0]["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert all(r["loss"] == pytest.approx(test_loss, rel=1e-5) for r in records if r["split"] == "test")


def test_clipping_bounds_the_update(tiny_run):
    """Plain SGD with learning rate 1 moves the weights by the clipped gradient: exactly its norm."""
    trainer = Trainer(tiny_run(optimizer="sgd", learning_rate=1.0, clip=1e-3, steps=1))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.run()
    moved = sum(((p - q) ** 2).sum() for p, q in zip(trainer.model.parameters(), before, strict=True)) ** 0.5
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)
    assert metrics(trainer.folder.path)[0]["gradient_norm"] > 1e-3


def test_muon_moves_the_recurrent_matrices_and_adam_the_rest(tiny_run):
    options = {"recurrent_optimizer": "muon", "learning_rate": 0.01, "recurrent_rate": 0.1, "num_layers": 2, "steps": 1}
    trainer = Trainer(tiny_run(**options))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.run()
    rate = trainer.settings.learning_rate_at(0)
    for name, weight in trainer.model.named_parameters():
        moved = weight.detach() - before[name]
        if "weight_hh" in name:
            assert 0.68 <= torch.linalg.matrix_norm(moved, 2) / (0.1 * rate) <= 1.21
        else:  # the first step of Adam, wherever the gradient is not tiny
            assert moved.abs().max().item() == pytest.approx(rate, rel=0.02)


def test_a_recipe_is_where_settings_start_from():
    for permute in (False, True):
        recipe = Settings.for_task("mnist", recipe="best", permute=permute)
        assert recipe.to_dict().items() >= RECIPES["best"]["mnist", permute].items()
        assert (recipe.num_layers, recipe.model, recipe.permute) == (1, "rin", permute)
        assert 100 <= recipe.hidden_size <= 128
    assert Settings.for_task("mnist", recipe="best", learning_rate=1e-5).learning_rate == 1e-5
    assert Settings.for_task("mnist", recipe="best") != Settings.for_task("mnist")


def test_decay_pulls_u_and_the_other_weights_by_their_own_strength(tiny_run, monkeypatch):
    """Without gradients, a decoupled decay is all that moves a weight: by 1 - rate * decay a step."""
    trainer = Trainer(tiny_run(optimizer="adam", learning_rate=0.1, identity_decay=2.0, weight_decay=0.5, steps=2))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    loss = trainer.task.loss
    monkeypatch.setattr(trainer.task, "loss", lambda output, target: 0 * loss(output, target))
    trainer.run()
    for name, weight in trainer.model.named_parameters():
        factor = 1 - 0.1 * (2.0 if "weight_hh" in name else 0.5 if weight.dim() > 1 else 0.0)
        torch.testing.assert_close(weight, before[name] * factor**2)


def test_recurrent_matrices_and_biases_have_their_shares_of_the_learning_rate(tiny_run):
    """Adam's first step moves a weight by its learning rate."""
    shares = {"recurrent_rate": 0.25, "bias_rate": 0.5}
    trainer = Trainer(tiny_run(learning_rate=0.01, num_layers=2, eps=1e-20, steps=1, **shares))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.run()
    for name, weight in trainer.model.named_parameters():
        moved = (weight - before[name]).abs().max().item()
        share = 0.25 if "weight_hh" in name else 0.5 if "rnn.bias" in name else 1.0
        assert moved == pytest.approx(0.01 * share, rel=1e-3), name


def test_state_noise_is_on_the_first_state_of_training_alone(tiny_run, monkeypatch):
    trainer = Trainer(tiny_run(state_noise=0.3, num_layers=2, steps=3, batch_size=500, eval_every=3))
    states = []
    forward = trainer.model.module.rnn.forward
    monkeypatch.setattr(trainer.model.module.rnn, "forward", lambda x, h0=None: states.append(h0) or forward(x, h0))
    trainer.run()
    *noisy, test = states
    assert test is None
    assert [tuple(h0.shape) for h0 in noisy] == [(2, 500, 8)] * 3
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.stack(noisy).std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.stack(noisy).mean().item() == pytest.approx(0.0, abs=0.01)


def test_the_average_of_the_weights_is_what_is_evaluated(tiny_run):
    """Against the average computed from outside: decay (n + 1) / (n + 10), at most `ema`."""
    trainer = Trainer(tiny_run(ema=0.3, steps=10, learning_rate=0.01))
    means = [weight.detach().clone() for weight in trainer.model.parameters()]

    def follow(step, record):
        if record is None:
            decay = min(0.3, step / (step + 9))
            for mean, weight in zip(means, trainer.model.parameters(), strict=True):
                mean.mul_(decay).add_(weight.detach(), alpha=1 - decay)

    trainer.report = follow
    test = trainer.run().test
    checkpoint = read_checkpoint(trainer.folder.checkpoint_path)
    for (name, weight), mean in zip(trainer.model.module.named_parameters(), means, strict=True):
        torch.testing.assert_close(checkpoint["average"][name], mean)
        assert torch.equal(checkpoint["model"][name], weight)
        assert not torch.equal(mean, weight)
        weight.data.copy_(mean)
    trainer.average = {}
    assert trainer.evaluate() == pytest.approx({"loss": test["loss"], "accuracy": test["accuracy"]}, rel=1e-5)


def test_cosine_schedule_falls_to_zero(tiny):
    settings = tiny(schedule="cosine", learning_rate=0.5, steps=100)
    assert settings.learning_rate_at(0) == 0.5
    assert settings.learning_rate_at(50) == pytest.approx(0.25)
    assert 0 < settings.learning_rate_at(99) < 1e-3


def test_warmup_rises_linearly_to_what_follows(tiny):
    rates = [tiny(schedule="cosine", learning_rate=0.5, steps=100, warmup=0.1).learning_rate_at(i) for i in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    constant = tiny(learning_rate=0.5, warmup=0.5)
    assert [constant.learning_rate_at(i) for i in (5, 11, 12, 23)] == pytest.approx([0.25, 0.5, 0.5, 0.5])


def test_learns_the_short_adding_problem(tiny_run):
    outcome = Trainer(tiny_run(hidden_size=32, steps=1000, test_size=200, learning_rate=3e-3)).run()
    assert outcome.test["loss"] < 0.02 < 1 / 6


def test_a_run_that_diverges_says_so_and_keeps_a_finite_checkpoint(tiny_run):
    folder = tiny_run(optimizer="sgd", learning_rate=1e30, clip=0.0)
    with pytest.raises(Diverged, match="no gradient of the 5 steps before step 10 was finite"):
        Trainer(folder).run()
    assert metrics(folder.path)[0]["skipped"] == 4
    checkpoint = read_checkpoint(folder.checkpoint_path)
    assert checkpoint["step"] == 7
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_run, monkeypatch):
    """Step 2 of 5 overflows: the weights stay, and the log line counts the other four."""
    trainer = Trainer(tiny_run(steps=5, optimizer="sgd"))
    states = []
    trainer.report = lambda step, record: states.append([p.detach().clone() for p in trainer.model.parameters()])
    loss = trainer.task.loss

    def overflowing(output, target):
        return loss(output, target) * (float("inf") if trainer.step == 2 and torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(trainer.task, "loss", overflowing)
    trainer.run()
    same = [all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) for a, b in pairwise(states[:5])]
    assert same == [False, True, False, False]
    record = metrics(trainer.folder.path)[0]
    assert record["skipped"] == 1
    assert 0 < record["loss"] < 10


def test_a_loss_that_is_not_finite_is_null_in_the_metrics(tiny_run):
    folder = tiny_run()
    folder.create()
    folder.append_metrics({"step": 1, "split": "test", "loss": float("inf")})
    assert json.loads(folder.metrics_path.read_text()) == {"step": 1, "split": "test", "loss": None}
    assert math.isnan(folder.read_metrics()[0]["loss"])


@pytest.mark.parametrize(("model", "precision"), [("lstm", "bf16-mixed"), ("rin", "bf16-true")])
def test_bf16_runs_and_resumes(tiny_run, tmp_path, model, precision):
    Trainer(tiny_run("whole", model=model, precision=precision)).run()
    folder = tiny_run("parts", model=model, precision=precision)
    Trainer(folder, report=interrupt_at(13)).run()
    Trainer(Run.open(folder.path), resume=True).run()
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_curves_are_drawn(tiny_run):
    folder = tiny_run()
    train_with_progress(folder)
    assert folder.curves_path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_leave_a_usable_checkpoint(tmp_path, number):
    """A real signal to a real process in the middle of a run that would take minutes."""
    out = tmp_path / "run"
    command = [*warm.PYTHON, "-m", "fused_rin.experiments", "train", "--task", "adding", "--length", "20"]
    command += [
        "--hidden-size",
        "8",
        "--steps",
        "1000000",
        "--log-every",
        "5",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
            assert time.monotonic() < deadline, "no metrics after a minute"
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert f"--resume {out}" in errors
    assert "Traceback" not in errors
    step = read_checkpoint(out / "checkpoint.pt")["step"]
    assert step >= 15
    assert not list(out.glob(".*"))
    if number == signal.SIGTERM:
        return  # starting one more process once is enough
    again = fused_rin("train", "--resume", out, "--steps", step + 5)
    assert again.returncode == 0, again.stderr
    assert metrics(out)[-1]["step"] == step + 5


def test_a_write_that_fails_leaves_the_old_checkpoint(tiny_run, monkeypatch):
    folder = tiny_run()
    trainer = Trainer(folder)
    trainer.run()
    good = folder.checkpoint_path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exception, match="No space left"):
        trainer._save()
    assert folder.checkpoint_path.read_bytes() == good
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "checkpoint.previous.pt",
        "checkpoint.pt",
        "config.json",
        "metrics.jsonl",
    ]
