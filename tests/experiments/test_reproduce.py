"""The paper's experiments: its grid and settings, a table that says what was run, going on when interrupted."""

import json
import os
import signal

import pytest
from experiment_helpers import REAL, metrics, needs
from fused_rin.experiments.cli import main
from fused_rin.experiments.errors import UserError
from fused_rin.experiments.paper import figures as paper
from fused_rin.experiments.paper import reproduce
from fused_rin.experiments.paper import trials as trials_of
from fused_rin.experiments.training.trainer import Trainer


def test_adding_has_the_papers_settings():
    trials = list(trials_of.adding())
    first = [(trial.row, trial.model) for trial in trials[:4]]
    assert first == [("T200", "rin"), ("T200", "irnn"), ("T200", "lstm"), ("T300", "rin")]
    assert len(trials) == 9
    for trial in trials:
        s = trial.settings
        assert (s.optimizer, s.batch_size, s.clip, s.num_layers, s.hidden_size) == ("adam", 32, 100.0, 1, 100)
        assert (s.train_size, s.test_size, s.steps) == (100_000, 10_000, 300 * 3125)
        assert s.learning_rate == {200: 1e-4, 300: 1e-5, 400: 1e-6}[s.length]


def test_mnist_has_the_papers_settings_and_all_of_table_1():
    trials = list(trials_of.mnist())
    assert len(trials) == 2 * (6 * 3 + 1)
    for trial in trials:
        s = trial.settings
        assert (s.optimizer, s.batch_size, s.clip, s.learning_rate, s.task) == ("rmsprop", 128, 0.0, 1e-6, "mnist")
        assert s.steps == 500 * 468
    found = {(t.row, t.model): t.paper for t in trials}
    assert found["sequential-1-100", "rin"] == "91.64 %"
    assert found["permuted-3-200", "lstm"] == "53.29 %"
    assert found["permuted-1-100", "rin-dt"] == "86.23 %"
    assert {t.settings.permute for t in trials if t.row.startswith("permuted")} == {True}


def test_babi_has_the_papers_settings_and_all_of_table_3():
    trials = list(trials_of.babi())
    assert len(trials) == 60
    for trial in trials:
        s = trial.settings
        assert (s.optimizer, s.batch_size, s.hidden_size, s.steps) == ("adam", 32, 100, 100 * 31)
        assert s.learning_rate == (1e-4 if trial.model == "irnn" else 1e-3)
    means = {model: sum(values) / 20 for model, values in paper.BABI.items()}
    assert means == pytest.approx({"rin": 52.6, "irnn": 48.9, "lstm": 51.0}, abs=0.06)


@pytest.mark.parametrize("make", trials_of.EXPERIMENTS.values())
def test_all_start_with_the_papers_weights_and_a_constant_rate(make):
    for trial in make():
        s = trial.settings
        assert (s.input_std, s.recurrent_std, s.recurrent_init) == (1e-3, 1e-3, "normal")
        assert (s.noise, s.state_noise, s.identity_decay, s.weight_decay, s.ema) == (0.0,) * 5
        assert (s.eps, s.standardize, s.recurrent_rate) == (1e-8, False, 1.0)
        assert s.learning_rate_at(0) == s.learning_rate_at(s.steps - 1) == s.learning_rate


def entry(model, runs, paper="91.64 %", row="sequential-1-100"):
    return {"row": row, "model": model, "paper": paper, "runs": runs}


def test_the_table_says_what_was_run():
    runs = [{"seed": 0, "accuracy": 0.5, "loss": 1.0}, {"seed": 1, "accuracy": 0.7, "loss": 1.0}]
    text = reproduce.table({"experiment": "mnist", "budget": 0.02, "results": [entry("rin", runs)]})
    assert "0.02 of the paper's number of epochs; do not compare" in text
    assert "| sequential-1-100 | rin | 2 | 60.00 % (50.00 % to 70.00 %) | 91.64 % |" in text
    assert "mean of" not in text
    results = [entry("rin", [*runs, {"seed": 2, "diverged": "..."}]), entry("rin", runs[1:], "93.70 %", "other")]
    text = reproduce.table({"experiment": "mnist", "budget": 1.0, "results": results})
    assert "the paper's number of epochs." in text
    assert "diverged (1 of 3)" in text
    assert "| **mean of 2** | rin | | 65.00 % | 92.67 % |" in text


def test_the_picture_has_a_dot_for_every_run_and_a_ring_for_every_figure_of_the_paper():
    runs = [{"seed": 0, "accuracy": 0.5}, {"seed": 1, "accuracy": 0.7}, {"seed": 2, "diverged": "..."}]
    results = [entry("rin", runs), entry("irnn", runs[:1], "83.55 %")]
    (axis,) = reproduce.draw_beside_paper({"experiment": "mnist", "budget": 1.0, "results": results}).axes
    heights = {style: [] for style in ("full", "none")}
    for line in axis.lines:
        heights[line.get_fillstyle()] += list(line.get_ydata())
    assert heights == {"full": [50.0, 70.0, 50.0], "none": [91.64, 83.55]}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["sequential-1-100"]


@needs("babi")
def test_reproduces_goes_on_and_refuses_other_settings(tmp_path, capsys):
    out = tmp_path / "babi"

    def call(*more):
        command = ["reproduce", "babi", "--only", "task01-[ri]*", "--threads", "1", "--data-dir", str(REAL)]
        with pytest.raises(SystemExit) as end:
            main([*command, "--out", str(out), *more])
        return end.value.code

    assert call("--budget", "0.001", "--seeds", "2") == 0
    names = ["task01-irnn-seed0", "task01-irnn-seed1", "task01-rin-seed0", "task01-rin-seed1"]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == names
    before = {name: (out / name / "metrics.jsonl").read_bytes() for name in names}
    for picture in ("task01.png", "beside-paper.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "0.001 of the paper's number of epochs" in (out / "table.md").read_text()
    # One run is lost: the same command makes it again and leaves the others as they are.
    for file in (out / names[2]).iterdir():
        file.unlink()
    (out / names[2]).rmdir()
    assert call("--budget", "0.001", "--seeds", "2") == 0
    for name in names:
        if name != names[2]:
            assert (out / name / "metrics.jsonl").read_bytes() == before[name]
    again = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in before[names[2]].splitlines()]
    assert metrics(out / names[2]) == again
    results = json.loads((out / "results.json").read_text())
    assert [(r["model"], len(r["runs"])) for r in results["results"]] == [("rin", 2), ("irnn", 2)]
    capsys.readouterr()
    config = json.loads((out / names[0] / "config.json").read_text())
    config["settings"]["batch_size"] = 16
    (out / names[0] / "config.json").write_text(json.dumps(config))
    assert call("--budget", "0.001") == 2
    assert "has batch_size 16, 32 was asked for" in capsys.readouterr().err


@needs("babi")
def test_an_interrupted_trial_goes_on_where_it_stopped(tmp_path, monkeypatch):
    def call(out):
        overrides = {"threads": 1, "device": "cpu", "data_dir": str(REAL)}
        return reproduce.reproduce("babi", out, budget=0.002, only="task01-rin-*", overrides=overrides)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(whole) == 0
    step = Trainer.train_step

    def interrupted(trainer):
        step(trainer)
        if trainer.step == 3:  # of 6
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert call(parts) == 130
    assert not (parts / "table.md").exists()
    assert call(parts) == 0
    assert (parts / "table.md").read_text() == (whole / "table.md").read_text()
    assert metrics(parts / "task01-rin-seed0") == metrics(whole / "task01-rin-seed0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget must be positive"),
        ({"seeds": 0}, "seeds must be a positive integer"),
        ({"only": "nothing"}, "no trial of 'adding' matches 'nothing'; the first is 'T200-rin-seed0'"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        reproduce.reproduce("adding", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
