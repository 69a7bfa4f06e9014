"""The committed results: what the pages show is what the results files hold."""

import dataclasses
import json
from pathlib import Path

import pytest
from fused_rin.experiments.paper import recipe, records, tables
from fused_rin.experiments.paper.trials import EXPERIMENTS
from fused_rin.experiments.training.settings import RECIPES, Settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reproduction.md").read_text()
DOCS = ROOT / "docs" / "reproduction"
REPRODUCED = sorted(DOCS.glob("*/results.json"))


@pytest.mark.parametrize("path", REPRODUCED, ids=lambda path: path.parent.name)
def test_what_was_reproduced_is_shown_as_it_came_out(path):
    record = json.loads(path.read_text())
    text = tables.table(record)
    assert (path.parent / "table.md").read_text() == text + "\n"
    assert text in PAGE
    assert (path.parent / "figure.png").exists()
    trials = {(trial.row, trial.model): trial for trial in EXPERIMENTS[record["experiment"]]()}
    for entry in record["results"]:
        trial = trials[entry["row"], entry["model"]]
        assert (entry["paper"], entry["epochs"]) == (trial.paper, trial.epochs)
        for run in entry["runs"]:
            if not run["curve"]:  # lost before it was evaluated
                assert run["diverged"]
                assert "accuracy" not in run
                continue
            step, loss, accuracy, _ = run["curve"][-1]
            assert run["epochs"] == pytest.approx(step / trial.epoch)
            assert (loss, accuracy) == pytest.approx((run["loss"], run["accuracy"]), rel=1e-4)


def test_runs_are_added_to_those_that_are_there():
    def record(**runs):
        results = [
            {"row": row, "model": "rin", "runs": [{"seed": seed, "epochs": epochs, "from": source}]}
            for row, (seed, epochs, source) in runs.items()
        ]
        return {"experiment": "adding", "results": results}

    def merged(new, old):
        both = records.merged(new, old)["results"]
        return [(e["row"], [(r["seed"], r["epochs"], r["from"]) for r in e["runs"]]) for e in both]

    assert merged(record(T400=(0, 3, "new"), T200=(0, 1, "new")), record(T200=(1, 2, "old"), T300=(0, 9, "old"))) == [
        ("T200", [(0, 1, "new"), (1, 2, "old")]),
        ("T300", [(0, 9, "old")]),
        ("T400", [(0, 3, "new")]),
    ]
    assert merged(record(T200=(0, 2, "new")), record(T200=(0, 3, "old"))) == [("T200", [(0, 3, "old")])]
    assert merged(record(T200=(0, 3, "new")), record(T200=(0, 3, "old"))) == [("T200", [(0, 3, "new")])]


def test_a_step_is_timed_in_turns(monkeypatch):
    settings = Settings("adding", length=3, hidden_size=4, test_size=5)
    slow = dataclasses.replace(settings, hidden_size=5)
    turns = []
    monkeypatch.setattr(records.Trainer, "train_step", lambda trainer: turns.append(trainer.settings.hidden_size))
    times = records.milliseconds([settings, slow], seconds=0.0)
    assert turns == [4, 5] * 6  # one of each is not counted
    assert min(times) > 0
    assert len(times) == 2


def test_a_curve_is_thinned_and_keeps_its_end():
    curve = [[step, 1 / 3, 0.5, 10.0] for step in range(1, 151)]
    kept = records.thinned(curve)
    assert [step for step, *_ in kept] == list(range(3, 151, 3))
    assert kept[0] == [3, 0.33333, 0.5, 10.0]
    assert records.thinned(curve[:61])[-1][0] == 61


def test_all_experiments_were_reproduced():
    assert {"adding", "mnist", "babi"} <= {path.parent.name for path in REPRODUCED} <= set(EXPERIMENTS)


def test_the_recipe_is_what_was_run_and_the_page_shows_what_it_reached():
    runs = recipe.read(DOCS / "mnist-recipe")
    text = recipe.table(runs)
    assert (DOCS / "mnist-recipe" / "table.md").read_text() == text + "\n"
    assert text in PAGE
    for permute, name in ((False, "sequential"), (True, "permuted")):
        settings = runs[name]["settings"]
        assert settings.items() >= RECIPES["best"]["mnist", permute].items()
        assert Settings(**settings, data_dir="").num_layers == 1


def test_the_readme_says_how_long_the_long_commands_take():
    """As the results have it; bAbI by the time of a step, without evaluations."""
    lines = (ROOT / "README.md").read_text().splitlines()
    (permuted,) = [line for line in lines if "--recipe best --permute" in line]
    seconds = recipe.read(DOCS / "mnist-recipe")["permuted"]["metrics"][-1]["seconds"]
    assert permuted.endswith(f"# {seconds / 60:.0f} minutes")
    (babi,) = [line for line in lines if "reproduce babi --budget 0.1" in line]
    record = json.loads((DOCS / "babi" / "results.json").read_text())
    trials = {(trial.row, trial.model): trial.settings.steps for trial in EXPERIMENTS["babi"]()}
    seconds = sum(0.1 * trials[entry["row"], entry["model"]] * entry["step_ms"] / 1e3 for entry in record["results"])
    assert babi.endswith(f"# {seconds / 60:.0f} minutes")


def test_the_readme_shows_what_the_demo_measured():
    lines = (ROOT / "README.md").read_text().splitlines()
    for row in json.loads((ROOT / "docs" / "demo" / "results.json").read_text())["results"]:
        task, _, model = row["label"].partition(", ")
        if task == "adding":
            assert f"| {model} | {row['parameters']:,} | {row['loss']:.4f} | {row['milliseconds']:.1f} ms |" in lines


def test_drawing_leaves_the_table_and_the_curves(tmp_path):
    run = {"settings": Settings.for_task("mnist", recipe="best").to_dict(), "metrics": []}
    run["metrics"] = [{"step": 1875, "split": "test", "loss": 0.4, "accuracy": 0.876, "seconds": 180.0}]
    (tmp_path / "short.json").write_text(json.dumps(run))
    text = recipe.draw(tmp_path)
    what = "short | sequential | 128 | cycles 14,27,28,29 | adam, U muon | 0.003, U 9e-05 | pixels 0.1, h_0 0.5"
    reached = "1.00 | 28.00 | 3 | **87.60 %**"
    assert f"| {what} | {reached} | 91.64 % | 97.0 % | 98.7 % |" in text
    assert (tmp_path / "table.md").read_text() == text + "\n"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
