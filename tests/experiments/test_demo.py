"""The demo's parts: its folder, its verdicts, its table and its timing. The demo itself runs as `make demo`."""

import dataclasses
import functools
import json

import pytest
import torch
from fused_rin.experiments import demo as module
from fused_rin.experiments.cli import main
from fused_rin.experiments.errors import UserError
from fused_rin.experiments.timing import compare, peer_of


@pytest.fixture
def small(monkeypatch):
    """A demo of a few seconds: short sequences, few steps."""
    changes = {"hidden_size": 8, "steps": 6, "eval_every": 3, "log_every": 3, "threads": 1}
    monkeypatch.setattr(module, "ADDING", dataclasses.replace(module.ADDING, length=10, **changes))
    monkeypatch.setattr(module, "DIGITS", dataclasses.replace(module.DIGITS, **changes))
    monkeypatch.setattr(module, "TIMED", ((5, 2, 1, 4),))
    monkeypatch.setattr(module, "compare", functools.partial(compare, seconds=0.02))


class InThisProcess:
    """Stands for the pool of processes where starting some is not what is tested."""

    def __init__(self, *arguments):
        self.map = map

    def shutdown(self, **options):
        pass


def run(out):
    with pytest.raises(SystemExit) as end:
        main(["demo", "--out", str(out)])
    return end.value.code


def test_fails_when_rin_does_not_reach_what_is_demanded(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "ProcessPoolExecutor", InThisProcess)
    assert run(tmp_path / "demo") == 1
    printed = capsys.readouterr()
    assert "FAILED: adding, RIN has to reach loss < 0.01" in printed.err
    assert "FAILED: digits, RIN has to reach accuracy >= 93%" in printed.err
    assert "loss < 0.01: NO" in printed.out


def test_passes_when_it_does_and_runs_again(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "ADDING_LIMIT", 1e9)
    monkeypatch.setattr(module, "DIGITS_LIMIT", 0.0)
    out = tmp_path / "demo"
    assert run(out) == 0
    monkeypatch.setattr(module, "ProcessPoolExecutor", InThisProcess)
    assert run(out) == 0
    printed = capsys.readouterr().out
    for picture in (out / "adding.png", out / "digits.png"):
        assert str(picture) in printed
        assert picture.read_bytes().startswith(b"\x89PNG")
    for expected in ("RIN", "tanh nn.RNN", "nn.LSTM", "us per time step", "learning rate"):
        assert expected in printed
    files = [out / f"adding-{model}" / "config.json" for model in ("rin", "rnn", "lstm")]
    configs = [json.loads(file.read_text())["settings"] for file in files]
    assert [config.pop("model") for config in configs] == ["rin", "rnn", "lstm"]
    assert configs[0] == configs[1] == configs[2]
    report = json.loads((out / "results.json").read_text())
    assert [result["passed"] for result in report["results"]] == [None, None, True, True]
    assert [timing["kind"] for timing in report["timings"]] == ["forward", "training step"]


def test_leaves_other_folders_alone(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="not the folder of an earlier demo"):
        module.demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_the_timed_peer_computes_the_same():
    torch.manual_seed(0)
    rin = module.Settings.for_task("adding", hidden_size=17).build_model(module.ADDING.build_task()).rnn
    x = torch.randn(40, 3, 2)
    torch.testing.assert_close(rin(x), peer_of(rin)(x))


def test_timings_are_times():
    forward, step = compare(20, 2, 3, 8, seconds=0.05)
    assert (forward.kind, step.kind) == ("forward", "training step")
    assert 0 < forward.ours < step.ours < 1
    assert forward.ratio == pytest.approx(forward.theirs / forward.ours)
