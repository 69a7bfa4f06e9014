"""What of the training loop's benchmark runs without a GPU: it measures what it says, and writes it down."""

import json

import pytest
import torch
from fused_rin.experiments import tasks

from benchmarks import loop


def test_the_overhead_is_what_the_loop_adds(tmp_path, monkeypatch):
    monkeypatch.setitem(loop.TASKS, "cpu", ("digits",))
    monkeypatch.setattr(loop, "SECONDS", 0.5)
    loop.main([str(tmp_path / "loop.json")])
    content = json.loads((tmp_path / "loop.json").read_text())
    (point,) = content["points"]
    assert (point["task"], point["batch"], point["units"]) == ("digits", 64, 100)
    assert 0 < point["bare_ms"] < point["step_ms"] < 1000
    assert point["overhead"] == pytest.approx(1 - point["bare_ms"] / point["step_ms"], abs=1e-3)
    assert content["machine"]["torch"] == torch.__version__


def test_an_epoch_of_every_rin_of_table_1(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "mnist", lambda folder, rows, *others: tasks.digits(*others))
    rows = loop.epochs(tmp_path, "cpu", rounds=1)
    nets = [(row["trial"].removeprefix("sequential-"), row["model"]) for row in rows]
    table = ["1-100", "1-200", "2-100", "2-200", "3-100", "3-200"]
    assert sorted(nets) == sorted([("1-100", "rin-dt"), *((net, "rin") for net in table)])
    for row in rows:
        assert row["epochs"] == 500
        assert row["epoch_s"] == pytest.approx(468 * row["step_ms"] / 1e3 + row["evaluation_s"], abs=0.01)
    times = {net: row["step_ms"] for net, row in zip(nets, rows, strict=True)}
    assert times["3-200", "rin"] > times["1-100", "rin"] > 0


def test_random_pixels_stand_in_for_mnist(tmp_path, monkeypatch):
    """Where the data are not at hand."""
    monkeypatch.setattr(tasks, "read_mnist", loop.random_mnist)
    task = tasks.mnist(tmp_path)
    (x,), labels = task.train_batch(0, 128)
    assert (task.train_size, x.shape, labels.shape) == (60_000, (784, 128, 1), (128,))
    assert 0.45 < x.mean() < 0.55
    assert labels.unique().tolist() == list(range(10))
