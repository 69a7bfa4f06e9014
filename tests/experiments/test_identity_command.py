"""`fused-rin experiment identity-prior`: runs what is not there, says what was run, draws, refuses the rest."""

import json
import math
from pathlib import Path

import pytest
from experiment_helpers import needs
from fused_rin.experiments.cli import main
from fused_rin.experiments.files import read_results
from fused_rin.experiments.identity import plots as identity_plots
from fused_rin.experiments.identity import report as identity_report
from fused_rin.experiments.identity.experiment import IdentityPrior
from fused_rin.experiments.identity.trials import PLANS

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "identity-prior" / "results.json"
PAGE = REPOSITORY / "docs" / "identity-prior.md"
SOME = ["--only", "digits-sgd-N[93]*", "--budget", "0.02", "--threads", "1"]  # N = 90 and 360, 8 updates


def read(path):
    return read_results(path, identity_report.FORMAT, identity_report.VERSION, "cells")


def call(out, *more):
    with pytest.raises(SystemExit) as end:
        main(["experiment", "identity-prior", "--out", str(out), *map(str, more)])
    return end.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("identity") / "run"
    assert call(out, *SOME, "--seeds", 2) == 0
    return out


def copy_of(folder, tmp_path):
    there = tmp_path / "copy"
    there.mkdir()
    for path in folder.iterdir():
        (there / path.name).write_bytes(path.read_bytes())
    return there


def test_writes_records_results_table_and_pictures(finished):
    records = [json.loads(line) for line in (finished / "records.jsonl").read_text().splitlines()]
    assert sum(record.get("last", False) for record in records) == 2 * (8 + 10)
    assert all(0 <= record["accuracy"] <= 1 and record["distance"] > 0 for record in records)
    content = read(finished / "results.json")
    assert len(content["cells"]) == 18
    for cell in content["cells"]:
        mine = [r for r in records if r.get("last") and all(r[name] == cell[name] for name in identity_report.KEY)]
        assert cell["seeds"] == [r["seed"] for r in mine] == [0, 1]
        assert cell["last"]["accuracy"] == pytest.approx([r["accuracy"] for r in mine], rel=1e-3)
        assert cell["curves"]["radius"][-1] == pytest.approx(sum(r["radius"] for r in mine) / 2, rel=1e-3)
    table = (finished / "table.md").read_text()
    assert "**0.02 of the planned updates (digits 400): not the experiment**; 2 seeds a cell." in table
    assert table.count("| u-decay | penalty | 0.1 |") == 2
    pictures = {path.stem for path in finished.glob("*.png")}
    assert pictures == {"summary", "digits-strength", "digits-training", "digits-over-time", "prior"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in finished.glob("*.png"))


def test_a_part_of_the_experiment_without_its_base_is_drawn_as_far_as_it_goes(finished):
    """What `--only '*-u-decay-*'` leaves: nothing to be a share of, or ahead of."""
    content = read(finished / "results.json")
    content["cells"] = [cell for cell in content["cells"] if cell["arm"] == "u-decay"]
    assert any(cell["prior"] for cell in content["cells"])
    assert set(identity_plots.draw(content)) == {"digits-strength", "digits-training", "digits-over-time"}
    assert "| u-decay | penalty | 0.1 |" in identity_report.table(content)


def test_gains_are_of_a_seed_against_itself_without_decay():
    """Seeds that differ by 10 points and gain 2 and 3: 2.5 ± 0.5, where accuracies alone would say 2.5 ± 7."""

    def cell(*accuracies, lost=()):
        whole = {seed: accuracy for seed, accuracy in enumerate(accuracies) if seed not in lost}
        last = {"last": {"accuracy": [*whole.values()]}} if whole else {}
        return {"seeds": [*range(len(accuracies))], "diverged": [*lost], **last}

    free, decayed = cell(0.70, 0.80, 0.90), cell(0.72, 0.10, 0.93, lost=[1])
    assert identity_report.gains(decayed, free) == pytest.approx({0: 2.0, 2: 3.0})
    values = [*identity_report.gains(decayed, free).values()]
    assert identity_report.standard_error(values) == pytest.approx(0.5)
    assert math.isnan(identity_report.standard_error(values[:1]))
    assert identity_report.gains(cell(0.5, lost=[0]), free) == {}
    other = cell(0.60, 0.90, 1.0), cell(0.50, 0.50, 0.50)
    assert identity_report.pooled([(decayed, free), other]) == pytest.approx([(2 + 10) / 2, (3 + 50) / 2])
    assert identity_report.pooled([]) == []


def test_finished_trials_are_not_run_again_and_cut_ones_are(finished, tmp_path, monkeypatch):
    there = copy_of(finished, tmp_path)
    before = (there / "records.jsonl").read_text()
    lines = before.splitlines(keepends=True)
    end = next(number for number, line in enumerate(lines, 1) if '"last"' in line)
    (there / "records.jsonl").write_text("".join(lines[end:])[:-100])  # the first trial is lost, the last one cut
    ran = []
    run_trial = IdentityPrior.run_trial
    monkeypatch.setattr(
        IdentityPrior,
        "run_trial",
        lambda self, trial, *rest: (ran.append(trial.name), run_trial(self, trial, *rest))[1],
    )
    assert call(there, *SOME, "--seeds", 2) == 0
    assert len(ran) == 2
    assert sorted((there / "records.jsonl").read_text().splitlines()) == sorted(before.splitlines())
    assert call(there, *SOME, "--seeds", 2) == 0
    assert len(ran) == 2
    results = [json.loads((folder / "results.json").read_text()) for folder in (finished, there)]
    assert results[0] == results[1]


def test_an_interrupted_experiment_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    run_trial, ran = IdentityPrior.run_trial, []

    def interrupted(self, trial, *rest):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(trial.name)
        return run_trial(self, trial, *rest)

    monkeypatch.setattr(IdentityPrior, "run_trial", interrupted)
    assert call(tmp_path / "run", *SOME) == 130
    assert "interrupted after 2 trials; the same command goes on" in capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert sum(record.get("last", False) for record in records) == 2
    ran.clear()
    assert call(tmp_path / "run", "--only", "digits-sgd-N90-[ns]*", *SOME[2:], "--seeds", 1) == 0
    assert ran == []  # the two are these two


def test_draws_a_results_file_without_running_anything(finished, tmp_path):
    assert call(tmp_path / "drawn", "--draw", finished / "results.json") == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "table.md",
        *(p.name for p in finished.glob("*.png")),
    }
    assert (tmp_path / "drawn" / "table.md").read_text() == (finished / "table.md").read_text()


def test_a_diverged_trial_is_in_the_table(tmp_path):
    trial = dict(zip(identity_report.KEY, ("digits", "sgd", 90, "none", "", 0.0, 0.0), strict=True))
    text = identity_report.summarise([[{**trial, "seed": 0, "step": 3, "diverged": True, "last": True}]], 1.0)
    (tmp_path / "results.json").write_text(text)
    assert call(tmp_path, "--draw", tmp_path / "results.json") == 0
    assert "| diverged (1 of 1) |" in (tmp_path / "table.md").read_text()
    assert [path.stem for path in tmp_path.glob("*.png")] == ["digits-strength"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "budget must be positive and finite, got 0.0"),
        (["--budget", "nan"], "budget must be positive and finite, got nan"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--threads", "-1"], "threads must be at least 0, got -1"),
        (["--only", "nothing"], "no trial matches 'nothing'; the first is 'digits-sgd-N90-none-seed0'"),
        (["--only", "mnist-rows-*", "--data-dir", "/nowhere"], "MNIST is not there"),
        (["--draw", "/nowhere/results.json"], "/nowhere/results.json: cannot read the results: No such file"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, capsys, options, message):
    assert call(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_and_files_of_something_else_are_refused(finished, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    assert call(tmp_path / "thesis", *SOME) == 2
    assert "is not empty and not a folder of this experiment" in capsys.readouterr().err
    there = copy_of(finished, tmp_path)
    assert call(there, *SOME, "--budget", "0.03") == 2
    assert "was started with budget 0.02, 0.03 is asked for" in capsys.readouterr().err
    lines = (there / "records.jsonl").read_text().splitlines()
    (there / "records.jsonl").write_text("\n".join([lines[0][:50], *lines[1:]]))
    assert call(there, *SOME) == 2
    assert "records.jsonl: line 1 is damaged" in capsys.readouterr().err
    for content, message in (
        ("{", "is damaged or not a results file"),
        ("[]", "is not a file of fused-rin identity-prior results"),
        ('{"format": "fused-rin identity-prior results", "version": 9}', "version 9, expected 2"),
        ('{"format": "fused-rin identity-prior results", "version": 2}', "is damaged: it has no cells"),
        ('{"format": "fused-rin identity-prior results", "version": 2, "cells": [{}]}', "is damaged: KeyError"),
    ):
        (tmp_path / "results.json").write_text(content)
        assert call(tmp_path / "drawn", "--draw", tmp_path / "results.json") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


@needs("mnist")
def test_mnist_rows_are_run_as_well(tmp_path, monkeypatch):
    from experiment_helpers import REAL

    only = ["--only", "mnist-rows-adam-N300-none-*", "--budget", "0.005", "--data-dir", REAL]
    assert call(tmp_path / "run", *only, "--seeds", 1) == 0
    content = read(tmp_path / "run" / "results.json")
    assert [cell["samples"] for cell in content["cells"]] == [300]


def test_the_committed_page_is_what_the_committed_results_give():
    content = read(RESULTS)
    assert content["budget"] == 1
    assert RESULTS.stat().st_size < 300_000
    table = identity_report.table(content)
    folder, page = PAGE.with_suffix(""), PAGE.read_text()
    assert (folder / "table.md").read_text() == table + "\n"
    for name in identity_plots.draw(content):
        assert 10_000 < (folder / f"{name}.png").stat().st_size < 150_000
        assert f"(identity-prior/{name}.png)" in page
    starts = tuple(f"| {plan} |" for plan in PLANS)
    quoted, made = ([line for line in text.splitlines() if line.startswith(starts)] for text in (page, table))
    assert len(made) == 28  # of every plan, optimizer and N
    assert quoted == made
