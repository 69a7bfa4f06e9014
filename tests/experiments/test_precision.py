"""The precision experiment: what is rounded and how, that arms differ in that alone, and the command."""

import json
import math
from pathlib import Path

import pytest
import torch
from fused_rin.experiments.cli import main
from fused_rin.experiments.files import read_results
from fused_rin.experiments.precision import plots, report
from fused_rin.experiments.precision.trials import (
    FORMS,
    PLANS,
    ROUNDINGS,
    TRAININGS,
    Trial,
    rounding,
    run_trial,
    trials,
)
from fused_rin.experiments.tasks import Adding, digits
from fused_rin.experiments.training.loop import Loop
from fused_rin.experiments.training.optimizers import make_optimizers
from fused_rin.experiments.training.trainer import make_fabric

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "precision" / "results.json"
PAGE = REPOSITORY / "docs" / "precision.md"


def call(out, *more):
    with pytest.raises(SystemExit) as end:
        main(["experiment", "precision", "--out", str(out), *map(str, more)])
    return end.value.code


def read(path):
    return read_results(path, report.FORMAT, report.VERSION, "cells")


@pytest.mark.parametrize(
    ("name", "step"),  # of numbers from 1/2 to 1, as a share of the largest of a row
    [("bfloat16", 2.0**-8), ("float16", 2.0**-11), ("float8", 32 / 448), ("int8", 1 / 127)],
)
def test_every_rounding_is_the_nearest_of_its_type(name, step):
    torch.manual_seed(0)
    matrix = torch.empty(7, 50, dtype=torch.float64).uniform_(-1, 1)
    matrix[:, 0] = 1.0
    scales = torch.tensor([1.0, 1e-3, 7.0, 1e4, 0.3, 1.0, 2.0], dtype=torch.float64)[:, None]
    by_rows = name in ("float8", "int8")
    rounded = ROUNDINGS[name](matrix * scales) / scales if by_rows else ROUNDINGS[name](matrix)
    assert rounded.dtype == torch.float64
    error = (rounded - matrix).abs()
    assert error.max() <= step / 2 * (1 + 1e-6)
    assert error.max() > step / 2.5  # and no better
    torch.testing.assert_close(
        ROUNDINGS[name](rounded * scales if by_rows else rounded) / (scales if by_rows else 1), rounded
    )
    assert ROUNDINGS[name](torch.zeros(2, 3, dtype=torch.float64)).eq(0).all()


def loop_of(task, settings):
    model = settings.build_model(task)
    return Loop(settings, make_fabric(settings), task, model, make_optimizers(settings, model)), model


def test_what_is_rounded_is_u_or_u_plus_i():
    """By the state after the first step from a state of ones with no input: (U + I) 1, as far as rounding left it."""
    task = Adding(20, test_size=50)
    settings = PLANS["adding"].to_settings("adding", steps=3, device="cpu", length=20, threads=1)
    loop, model = loop_of(task, settings)
    for _ in range(3):
        loop.train_step()
    weight = model.rnn.weight_hh_l0.detach().clone()
    seen = []
    evaluate = loop.evaluate
    loop.evaluate = lambda: (seen.append(model.rnn.weight_hh_l0.detach().clone()), evaluate())[1]
    found = rounding(loop, model)
    assert torch.equal(model.rnn.weight_hh_l0, weight)  # put back
    eye = torch.eye(len(weight), dtype=torch.float64)
    expected = [
        matrix for rounds in ROUNDINGS.values()
        for matrix in (rounds(weight.double()), rounds(weight.double() + eye) - eye)
    ]  # fmt: skip
    assert len(seen) == len(expected) == 8
    for got, want in zip(seen, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-9)
    assert found["steps"] == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20]
    assert found["largest"]["u"] == pytest.approx(weight.abs().max().item())
    assert found["largest"]["v"] == pytest.approx((weight + eye).abs().max().item(), rel=1e-6)
    # V is 1 on its diagonal, U is small: its digits are finer, and the states nearer.
    for name in ("bfloat16", "float16", "int8"):
        assert found["astray"][name]["u"][-1] < 0.3 * found["astray"][name]["v"][-1]


def test_how_far_the_states_are_astray_is_what_it_says():
    task = digits()
    settings = PLANS["digits"].to_settings("digits", steps=1, device="cpu", hidden_size=12, threads=1)
    loop, model = loop_of(task, settings)
    found = rounding(loop, model)
    (x,), _ = next(task.test_batches(100))
    w, u = (p.detach().double() for p in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0))
    few = ROUNDINGS["int8"](u + torch.eye(12, dtype=torch.float64))
    exact = moved = torch.zeros(100, 12, dtype=torch.float64)
    for t in range(64):
        exact = (x[t].double() @ w.T + exact @ u.T + exact).relu()
        moved = (x[t].double() @ w.T + moved @ few.T).relu()
        if t + 1 in found["steps"]:
            place = found["steps"].index(t + 1)
            got = found["astray"]["int8"]["v"][place]
            want = ((moved - exact).norm() / exact.norm()).item()
            assert (got is None and not math.isfinite(want)) or got == pytest.approx(want, rel=1e-3)
    assert found["astray"]["int8"]["v"][-1] > 0.01


def test_trainings_of_a_seed_have_one_start_and_differ_in_the_parameter(monkeypatch):
    """With a rate of 0 nothing moves: what is evaluated is the first network, with U or V of so many digits."""
    from fused_rin.experiments.precision import trials as module

    monkeypatch.setitem(module.PLANS, "digits", module.Plan(2, {"learning_rate": 0.0, "threads": 1}))
    made = {}
    evaluate = Loop.evaluate

    def noting(loop, *rest):
        made[trial.training, trial.form] = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
        return evaluate(loop, *rest)

    monkeypatch.setattr(module.Loop, "evaluate", noting)
    monkeypatch.setattr(module, "rounding", lambda loop, model: {})
    task = digits()
    for trial in trials(1):
        if trial.task == "digits":
            run_trial(trial, task, 2)
    assert [*made] == [("32-true", "u"), *((t, f) for t in TRAININGS[1:] for f in FORMS)]
    start = {name.removeprefix("_forward_module."): p for name, p in made["32-true", "u"].items()}
    for (training, form), parameters in made.items():
        parameters = {name.removeprefix("_forward_module."): p for name, p in parameters.items()}
        dtype = torch.bfloat16 if training == "bf16-true" else torch.float32
        for name, value in parameters.items():
            want = start[name] + torch.eye(100) if form == "v" and "weight_hh" in name else start[name]
            assert value.dtype == dtype
            assert torch.equal(value, want.to(dtype)), (training, form, name)


def test_a_trial_that_grows_too_large_has_diverged(monkeypatch):
    from fused_rin.experiments.precision import trials as module

    monkeypatch.setitem(module.PLANS, "digits", module.Plan(9, {"learning_rate": 1e30, "clip": 0.0, "threads": 1}))
    (record,) = run_trial(Trial("digits", "32-true", "u"), digits(), 9)
    assert record["diverged"]
    assert record["last"]
    assert "rounded" not in record


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("precision") / "run"
    assert call(out, "--only", "digits-*", "--budget", "0.01", "--threads", 1, "--seeds", 2) == 0
    return out


def test_the_command_writes_records_results_table_and_pictures(finished, tmp_path):
    records = [json.loads(line) for line in (finished / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 5
    assert all(record["step"] == 24 and record["last"] for record in records)
    content = read(finished / "results.json")
    assert [(cell["training"], cell["form"]) for cell in content["cells"]] == [
        ("32-true", "u"), *((training, form) for training in TRAININGS[1:] for form in FORMS)
    ]  # fmt: skip
    exact = content["cells"][0]
    mine = [record for record in records if record["training"] == "32-true"]
    assert exact["seeds"] == [0, 1]
    assert exact["accuracy"] == pytest.approx([record["accuracy"] for record in mine], rel=1e-3)
    for name in ROUNDINGS:
        for form in FORMS:
            got = exact["rounded"][name][form]["loss"]
            assert got == pytest.approx([record["rounded"][name][form]["loss"] for record in mine], rel=1e-3)
            ends = [record["astray"][name][form][-1] for record in mine]
            assert exact["astray"][name][form][-1] == pytest.approx(math.sqrt(ends[0] * ends[1]), rel=1e-3)
    table = (finished / "table.md").read_text()
    assert "**0.01 of the planned updates (digits 2400): not the experiment**; 2 seeds a cell." in table
    assert table.count("| digits |") == 3
    assert {path.stem for path in finished.glob("*.png")} == {"scores", "states"}
    assert call(tmp_path / "drawn", "--draw", finished / "results.json") == 0
    assert (tmp_path / "drawn" / "table.md").read_text() == table


def test_other_experiments_folders_and_files_are_refused(finished, tmp_path, capsys):
    assert call(finished, "--only", "digits-*", "--budget", "0.02", "--seeds", 1) == 2
    assert "was started with budget 0.01, 0.02 is asked for" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["experiment", "identity-prior", "--out", str(finished), "--only", "digits-sgd-N90-none-seed0"])
    assert end.value.code == 2
    assert "is not empty and not a folder of this experiment" in capsys.readouterr().err
    assert call(tmp_path / "x", "--draw", REPOSITORY / "docs" / "identity-prior" / "results.json") == 2
    assert "is not a file of fused-rin precision results" in capsys.readouterr().err


def test_diverged_seeds_are_in_the_table():
    records = [
        {"task": "adding", "training": "bf16-true", "form": "v", "seed": seed, "step": 9, "last": True, **more}
        for seed, more in enumerate([{"loss": None, "diverged": True}, {"loss": 2.5e32, "accuracy": 0.0}])
    ]
    content = json.loads(report.summarise([[record] for record in records], 1.0))
    assert content["cells"][0]["diverged"] == 1
    assert "| adding |  |  |  |  | 2.5e+35 diverged (1 of 2) |" in report.table(content)
    assert plots.draw(content) == {}


def test_the_committed_page_is_what_the_committed_results_give():
    content = read(RESULTS)
    assert content["budget"] == 1
    assert {len(cell["seeds"]) for cell in content["cells"]} == {5}
    assert {cell["task"] for cell in content["cells"]} == set(PLANS)
    table = report.table(content)
    folder, page = PAGE.with_suffix(""), PAGE.read_text()
    assert (folder / "table.md").read_text() == table + "\n"
    for name in plots.draw(content):
        assert 10_000 < (folder / f"{name}.png").stat().st_size < 150_000
        assert f"(precision/{name}.png)" in page
    quoted = [line for line in page.splitlines() if line.startswith(tuple(f"| {task} |" for task in PLANS))]
    assert len(quoted) == 9
    assert set(quoted) <= set(table.splitlines())
