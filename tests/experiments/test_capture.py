"""The captured update computes what the plain one does. CUDA graphs are played on the CPU (`recorded`), on a GPU
`tests/gpu/test_training.py` does the same with real ones.
"""

from __future__ import annotations

import sys

import pytest
import recorded
import torch
from fused_rin.experiments.tasks import Batch
from fused_rin.experiments.training import capture
from fused_rin.experiments.training import trainer as training
from fused_rin.experiments.training.capture import WARM_UP, CapturedUpdate
from fused_rin.experiments.training.runs import Run
from fused_rin.experiments.training.settings import Settings
from fused_rin.experiments.training.trainer import Trainer


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs as `recorded` plays them; returns a list that grows with every capture."""
    captured = []

    def record(work):
        captured.append(recorded.capture(work))
        return captured[-1]

    monkeypatch.setattr(capture, "_capture", record)
    monkeypatch.setattr(capture, "_run_aside", recorded.run_aside)
    monkeypatch.setattr(training, "can_capture", lambda settings, fabric: settings.graph)
    for module in ("torch.optim.adam", "torch.optim.rmsprop"):
        devices = "_get_capturable_supported_devices"
        monkeypatch.setattr(sys.modules[module], devices, lambda *a, **k: ["cpu", "cuda"])
    return captured


def settings(**others) -> Settings:
    common = {"hidden_size": 16, "batch_size": 8, "length": 12, "log_every": 4, "eval_every": 6, "test_size": 16}
    chosen = {"schedule": "cosine", "warmup": 0.3, "steps": 12, "checkpoint_every": 5, **common, **others}
    return Settings("adding", device="cpu", threads=1, input_std=0.3, **chosen)


CASES = {
    "adam": {"optimizer": "adam", "ema": 0.9, "state_noise": 0.1},
    "rmsprop": {"optimizer": "rmsprop", "identity_decay": 0.1, "weight_decay": 0.01, "recurrent_rate": 0.5},
    "sgd": {"optimizer": "sgd", "identity_decay": 0.1, "num_layers": 2},
    "muon": {"recurrent_optimizer": "muon", "recurrent_rate": 0.1, "identity_decay": 0.1},
    "plain": {"schedule": "constant", "warmup": 0.0, "clip": 0.0},
    "irnn": {"model": "irnn"},
    "rin-dt": {"model": "rin-dt"},
    "rnn": {"model": "rnn"},
    "float64": {"precision": "64-true", "ema": 0.9},
    "bfloat16": {"precision": "bf16-true", "ema": 0.9},
    "mixed": {"precision": "bf16-mixed"},
    "digits": {"noise": 0.1},
}


def make(path, name, **others) -> Trainer:
    chosen = settings(**CASES[name], **others)
    if name == "digits":
        chosen = Settings.from_dict({**chosen.to_dict(), "task": "digits", "batch_size": 32})
    return Trainer(Run.new(path, chosen))


def records(trainer) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in trainer.folder.read_metrics()]


@pytest.mark.parametrize("name", CASES)
def test_captured_and_plain_runs_walk_the_same_path(graphs, tmp_path, name):
    plain, captured = make(tmp_path / "plain", name, graph=False), make(tmp_path / "captured", name)
    start = [weight.detach().clone() for weight in plain.weights]
    for trainer in (plain, captured):
        trainer.run()
    assert len(graphs) == 1, "captured once, and not for the plain run"
    # The rates are of float32 in the tensors: a last place of every step may differ.
    tolerance = {"rtol": 0.05, "atol": 0.02} if "bf16" in plain.settings.precision else {"rtol": 2e-5, "atol": 2e-6}
    for first, ours, theirs in zip(start, captured.weights, plain.weights, strict=True):
        assert not torch.equal(first, theirs)
        torch.testing.assert_close(ours, theirs, **tolerance)
    for mean, theirs in zip(captured.average.values(), plain.average.values(), strict=True):
        torch.testing.assert_close(mean, theirs, **tolerance)
    for ours, theirs in zip(records(captured), records(plain), strict=True):
        assert ours.pop("split") == theirs.pop("split")
        assert ours == pytest.approx(theirs, rel=tolerance["rtol"] * 10, abs=tolerance["atol"])


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
@pytest.mark.parametrize("first", [True, False], ids=["captured, then plain", "plain, then captured"])
def test_a_run_goes_on_with_the_other_kind(graphs, tmp_path, optimizer, first):
    common = {"optimizer": optimizer, "schedule": "constant", "warmup": 0.0, "ema": 0.9}
    whole = Trainer(Run.new(tmp_path / "whole", settings(**common, graph=False)))
    whole.run()
    Trainer(Run.new(tmp_path / "parts", settings(**common, graph=first, steps=6))).run()
    rest = Trainer(Run(tmp_path / "parts", settings(**common, graph=not first)), resume=True)
    rest.run()
    assert len(graphs) == 1
    for ours, theirs in zip(rest.weights, whole.weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_a_gradient_that_is_not_finite_counts_as_zero(graphs, tmp_path):
    """In a replayed step as in any other."""
    trainer = Trainer(Run.new(tmp_path / "run", settings(optimizer="sgd", schedule="constant", warmup=0.0)))
    batch = trainer.task.train_batch

    def overflowing(number, *others):
        (x,), target = batch(number, *others)
        return Batch((x * (3e38 if number == WARM_UP + 2 else 1),), target)

    trainer.task.train_batch = overflowing
    trainer.run()
    skipped = [record["skipped"] for record in trainer.folder.read_metrics() if record["split"] == "train"]
    assert skipped == [0, 1, 0]
    assert all(weight.isfinite().all() for weight in trainer.weights)


def test_other_shapes_are_refused(graphs):
    sums = torch.zeros(())
    update = CapturedUpdate(lambda inputs, target: sums.add_((inputs[0] * target).sum()))
    for _ in range(WARM_UP + 3):
        update((torch.ones(2, 3),), torch.ones(3))
    assert sums == 6 * (WARM_UP + 3)
    for inputs, target in (
        ((torch.ones(1, 3),), torch.ones(3)),
        ((torch.ones(2, 3),), torch.ones(3, dtype=torch.float64)),
        ((torch.ones(2, 3), torch.ones(2, 3)), torch.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"a captured update has inputs and target of .*, got "):
            update(inputs, target)
    assert sums == 6 * (WARM_UP + 3)


def test_a_played_graph_has_the_rules_of_a_real_one():
    """Else the tests above would show nothing."""
    state, factor = torch.ones(2, requires_grad=True), 2.0

    def work():
        with torch.no_grad():
            state.mul_(factor)

    play = recorded.capture(work)
    assert state.tolist() == [1, 1], "recording computes nothing"
    play()
    assert state.tolist() == [2, 2]
    factor = 3.0  # numbers of Python are those of the recording
    play()
    assert state.tolist() == [4, 4]
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorded.capture(lambda: state.sum().item())
