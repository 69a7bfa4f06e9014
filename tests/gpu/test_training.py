"""Training with its update in a CUDA graph. On the CPU, tests/experiments/test_capture.py plays such graphs."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
pytest.importorskip("lightning_fabric", reason="training needs Lightning Fabric (the extra 'experiments')")

from fused_rin.experiments.training.runs import Run  # noqa: E402
from fused_rin.experiments.training.settings import Settings  # noqa: E402
from fused_rin.experiments.training.trainer import Trainer  # noqa: E402

CASES = {
    "adam": {"optimizer": "adam", "schedule": "cosine", "warmup": 0.3, "ema": 0.9, "state_noise": 0.1},
    "rmsprop": {"optimizer": "rmsprop", "schedule": "cosine", "identity_decay": 0.1, "recurrent_rate": 0.5},
    "sgd": {"optimizer": "sgd", "schedule": "cosine", "identity_decay": 0.1, "num_layers": 2},
    "muon": {"recurrent_optimizer": "muon", "schedule": "cosine", "recurrent_rate": 0.1},
    "irnn": {"model": "irnn"},
    "rin-dt": {"model": "rin-dt"},
    "lstm": {"model": "lstm"},
    "mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", CASES)
def test_captured_and_plain_runs_walk_the_same_path(tmp_path, name):
    trainers = []
    for graph in (True, False):
        settings = Settings(
            "adding", device="cuda", graph=graph, input_std=0.3, hidden_size=32, batch_size=16, length=40, steps=12,
            log_every=4, eval_every=6, checkpoint_every=5, test_size=32, **CASES[name],
        )  # fmt: skip
        trainers.append(Trainer(Run.new(tmp_path / str(graph), settings)))
    captured, plain = trainers
    start = [weight.detach().clone() for weight in plain.weights]
    for trainer in trainers:
        trainer.run()
    assert captured.captured
    assert not plain.captured
    tolerance = {"rtol": 0.05, "atol": 0.02} if name == "mixed" else {"rtol": 1e-4, "atol": 1e-5}
    for first, ours, theirs in zip(start, captured.weights, plain.weights, strict=True):
        assert not torch.equal(first, theirs)
        torch.testing.assert_close(ours, theirs, **tolerance)
    for ours, theirs in zip(captured.folder.read_metrics(), plain.folder.read_metrics(), strict=True):
        assert ours["split"] == theirs["split"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05 if name == "mixed" else 1e-3)


def test_a_captured_run_goes_on_on_the_cpu_and_back(tmp_path):
    common = {"steps": 4, "hidden_size": 16, "length": 12, "batch_size": 8, "test_size": 16, "optimizer": "rmsprop"}
    Trainer(Run.new(tmp_path / "run", Settings("adding", device="cuda", **common))).run()
    for steps, device in ((8, "cpu"), (12, "cuda")):
        settings = Settings("adding", device=device, **{**common, "steps": steps})
        trainer = Trainer(Run(tmp_path / "run", settings), resume=True)
        assert trainer.run().step == steps
        assert all(weight.isfinite().all() for weight in trainer.weights)
