"""The paper's experiments: its grid and settings, a table that says what was run, going on when interrupted."""

import dataclasses
import json
import os
import signal

import pytest
from experiment_helpers import REAL, metrics, needs
from fused_rin.experiments.cli import main
from fused_rin.experiments.errors import UserError
from fused_rin.experiments.paper import figures as paper
from fused_rin.experiments.paper import reproduce, tables
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


def test_the_second_set_of_babi_is_the_first_with_clipping_and_a_falling_rate():
    for plain, stable in zip(trials_of.babi(), trials_of.babi_stable(), strict=True):
        changed = {"clip": 1.0, "schedule": "cosine"}
        assert stable.settings == dataclasses.replace(plain.settings, **changed)
        assert (stable.row, stable.model, stable.paper) == (plain.row, plain.model, plain.paper)
        assert stable.settings.learning_rate_at(3099) < 1e-6 * plain.settings.learning_rate_at(3099)


@pytest.mark.parametrize("name", ["adding", "mnist", "babi"])
def test_all_start_with_the_papers_weights_and_a_constant_rate(name):
    for trial in trials_of.EXPERIMENTS[name]():
        s = trial.settings
        assert (s.input_std, s.recurrent_std, s.recurrent_init) == (1e-3, 1e-3, "normal")
        assert (s.noise, s.state_noise, s.identity_decay, s.weight_decay, s.ema) == (0.0,) * 5
        assert (s.eps, s.standardize, s.recurrent_rate) == (1e-8, False, 1.0)
        assert s.learning_rate_at(0) == s.learning_rate_at(s.steps - 1) == s.learning_rate


def entry(model, runs, paper="91.64 %", row="sequential-1-100", constants=(0.1135, 0.098)):
    return {"row": row, "model": model, "paper": paper, "epochs": 500, "constants": list(constants), "runs": runs}


def run(seed, accuracy, epochs=500.0, **others):
    return {"seed": seed, "epochs": epochs, "accuracy": accuracy, "loss": 1.0, **others}


def table(*results, experiment="mnist"):
    return tables.table({"experiment": experiment, "results": list(results)}).splitlines()


def test_the_table_has_the_mean_of_the_seeds_and_their_range_beside_the_paper():
    lines = table(entry("rin", [run(0, 0.5), run(1, 0.7)]), entry("irnn", [run(0, 0.6)], "83.55 %"))
    assert lines[0] == "| trial | one answer | rin, here | paper | irnn, here | paper |"
    assert lines[2] == "| sequential-1-100 | 11.35 % | 60.00 % (50.00 to 70.00) | 91.64 % | 60.00 % | 83.55 % |"
    assert "All at the paper's 500 epochs." in lines
    assert any(line.startswith("Seeds: rin 2, irnn 1;") for line in lines)
    assert not any("mean of" in line or "diverged" in line for line in lines)


def test_the_table_says_what_was_not_run_to_the_end():
    lines = table(entry("rin", [run(0, 0.5, epochs=12.5), run(1, 0.7)]))
    assert "60.00 % (50.00 to 70.00), 12.5 epochs" in lines[2]
    assert any("less than the paper's 500 were run; do not compare" in line for line in lines)


def test_a_run_that_diverged_has_its_last_finite_evaluation():
    lost = {"seed": 2, "epochs": 0.0, "diverged": "..."}  # before any
    lines = table(entry("rin", [run(0, 0.5), run(1, 0.9, epochs=60.0, diverged="..."), lost]))
    assert "| 70.00 % (50.00 to 90.00), diverged after 0 and 60 |" in lines[2]
    assert "Of a run that diverged, its last finite evaluation." in lines
    assert "All at the paper's 500 epochs." in lines
    assert "| diverged after 0 |" in table(entry("rin", [lost]))[2]


def test_what_one_answer_would_get_is_marked_here_and_in_the_paper():
    lines = table(entry("rin", [run(0, 0.098)], "9.8 %"), entry("irnn", [run(0, 0.0981)], "9.9 %"))
    assert lines[2] == "| sequential-1-100 | 11.35 % | 9.80 % † | 9.8 % † | 9.81 % | 9.9 % |"


def test_the_mean_over_the_rows_is_of_those_that_were_run():
    first = entry("rin", [run(0, 0.5), run(1, 0.7)]), entry("irnn", [run(0, 0.2)], "80 %")
    second = entry("rin", [run(1, 0.8)], "93.70 %", "other", (0.2,))
    lines = table(*first, second)
    assert lines[3] == "| other | 20.00 % | 80.00 % | 93.70 % |  |  |"
    assert lines[4] == "| **mean of 2** | 15.68 % | **70.00 %** | 92.67 % | **20.00 %** (1) | 80.00 % |"


def test_adding_has_errors_and_no_answers():
    lines = table(entry("rin", [{**run(0, 0.9), "loss": 0.00217}], "solved", "T200", ()), experiment="adding")
    assert lines[2] == "| T200 | 0.0022 | solved |"
    assert "always answering 1 gives 0.1667" in lines[-1]


def test_the_picture_has_a_dot_for_every_run_and_a_ring_for_every_figure_of_the_paper():
    runs = [run(0, 0.5), run(1, 0.7, diverged="..."), {"seed": 2, "epochs": 0.0, "diverged": "..."}]
    results = [entry("rin", runs), entry("irnn", runs[:1], "83.55 %")]
    (axis,) = tables.draw({"experiment": "mnist", "results": results}).axes
    heights = {style: [] for style in ("full", "none")}
    for line in axis.lines:
        heights[line.get_fillstyle()] += list(line.get_ydata())
    assert heights == {"full": [50.0, 70.0, 50.0], "none": [91.64, 83.55]}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["sequential-1-100"]


def test_adding_is_drawn_against_sequences_and_against_time():
    curve = [[3125, 0.1, 0.2, 60.0], [6250, 0.01, 0.5, 120.0]]
    runs = [{**run(0, 0.5), "batch_size": 32, "curve": curve}]
    record = {"experiment": "adding", "results": [entry("rin", runs, "solved", "T200", ())]}
    by_samples, by_time = (axis.lines[0].get_xydata().ravel() for axis in tables.draw(record).axes)
    assert by_samples == pytest.approx([0.1, 0.1, 0.2, 0.01])
    assert by_time == pytest.approx([1.0, 0.1, 2.0, 0.01])
    record["results"][0]["step_ms"] = 5.0  # what was measured alone goes before what the run took
    by_time = tables.draw(record).axes[1].lines[0].get_xydata().ravel()
    assert by_time == pytest.approx([3125 / 12000, 0.1, 6250 / 12000, 0.01])


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
    for picture in ("task01.png", "figure.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "0.0968 epochs |" in (out / "table.md").read_text()  # 3 steps of 31
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
    assert "| task01 | 18.7 % | 0 epochs | 51.9 % |" in (parts / "table.md").read_text()
    assert call(parts) == 0
    assert (parts / "table.md").read_text() == (whole / "table.md").read_text()
    assert metrics(parts / "task01-rin-seed0") == metrics(whole / "task01-rin-seed0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget must be positive"),
        ({"seeds": 0}, "seeds must be a positive integer"),
        (
            {"only": "nothing"},
            "no trial of 'adding' matches 'nothing'; their names are ROW-MODEL-seedN, with row T200, T300, T400, "
            "model rin, irnn, lstm and N up to 0",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        reproduce.reproduce("adding", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@needs("babi")
def test_a_budget_of_a_single_step_is_said_to_be_one(tmp_path, capsys):
    overrides = {"threads": 1, "device": "cpu", "data_dir": str(REAL)}
    assert reproduce.reproduce("babi", tmp_path, budget=1e-6, only="task04-rin-*", overrides=overrides) == 0
    assert "budget 1e-06 is a single step of 3,100: this trains nothing" in capsys.readouterr().err
    assert [record["step"] for record in metrics(tmp_path / "task04-rin-seed0")] == [1, 1]
