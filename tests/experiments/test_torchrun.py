"""Two processes under torchrun walk the path of one: the same batches, shared between them."""

import subprocess
import sys

import pytest
from experiment_helpers import REAL, metrics, needs, torchrun
from fused_rin.experiments.training.checkpoints import read_checkpoint
from fused_rin.experiments.training.runs import Run
from fused_rin.experiments.training.trainer import Trainer


def test_two_processes_train_as_one_and_resume(tiny_run, tmp_path):
    settings = ["--task", "adding", "--length", "10", "--hidden-size", "8", "--test-size", "1003", "--log-every", "5"]
    settings += ["--eval-every", "10", "--learning-rate", "1e-3", "--schedule", "constant", "--warmup", "0"]
    settings += ["--threads", "1", "--checkpoint-every", "7"]
    settings += ["--recurrent-optimizer", "muon", "--recurrent-rate", "0.5"]
    two = tmp_path / "two"
    result = torchrun(2, "train", *settings, "--steps", "13", "--out", two)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("curves:") == 1
    assert read_checkpoint(two / "checkpoint.pt")["step"] == 13

    one = tiny_run("one", steps=20, test_size=1003, recurrent_optimizer="muon", recurrent_rate=0.5)
    Trainer(one).run()
    together = {(record["step"], record["split"]): record for record in metrics(one.path)}
    # The steps after 13 on one process: how many there are is no part of the run.
    folder = Run.open(two)
    Trainer(Run(two, one.settings), resume=True).run()
    assert folder.settings.steps == 13
    compared = 0
    for record in metrics(two):
        expected = together.get((record["step"], record["split"]))
        if expected and record["step"] <= 10:
            for name in ("loss", "accuracy"):
                assert record[name] == pytest.approx(expected[name], rel=1e-4)
            compared += 1
    assert compared == 3
    last = [record for record in metrics(two) if record["split"] == "test"][-1]
    assert last["step"] == 20
    assert last["loss"] == pytest.approx(together[20, "test"]["loss"], rel=1e-4)


@needs("babi")
def test_two_processes_reproduce_together(tmp_path):
    out = tmp_path / "babi"
    command = ["reproduce", "babi", "--only", "task01-[ri]*", "--budget", "0.001", "--threads", "1"]
    for _ in range(2):  # the second time everything is there
        result = torchrun(2, *command, "--data-dir", REAL, "--out", out)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("| task01 | 18.7 % |") == 1
    alone = Run.new(tmp_path / "alone", Run.open(out / "task01-rin-seed0").settings)
    Trainer(alone).run()
    together = [(record["loss"], record["accuracy"]) for record in metrics(out / "task01-rin-seed0")]
    assert len(together) == 2
    for pair, record in zip(together, metrics(alone.path), strict=True):
        assert pair == pytest.approx((record["loss"], record["accuracy"]), rel=1e-4)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    result = torchrun(2, "train", "--task", "adding", "--batch-size", "33", "--out", tmp_path / "run")
    assert result.returncode != 0
    assert "batch_size must be a multiple of the number of processes, 2, got 33" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_processes_leave_their_group(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LEAVES)
    command = ["train", "--task", "adding", "--length", "10", "--hidden-size", "8", "--steps", "1", "--test-size", "32"]
    # With interpreters of its own: they fail in their last moments where a group is left.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run([*torchrun, *command, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("joined True, left True") == 2


LEAVES = """
import sys
import torch.distributed as dist
from fused_rin.experiments.cli import main

joined = []
initialize = dist.init_process_group
dist.init_process_group = lambda *args, **kwargs: (initialize(*args, **kwargs), joined.append(True))
try:
    main(sys.argv[1:])
finally:
    print(f"joined {bool(joined)}, left {not dist.is_initialized()}")
"""
