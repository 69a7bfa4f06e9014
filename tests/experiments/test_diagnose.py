"""The command writes numbers and pictures of a checkpoint, and refuses what is none."""

import json
from pathlib import Path

import pytest
import torch
from fused_rin.experiments.cli import main
from fused_rin.experiments.diagnose import FORMAT, VERSION, draw
from fused_rin.experiments.files import read_results
from fused_rin.experiments.training.checkpoints import AtomicCheckpointIO, read_checkpoint
from fused_rin.experiments.training.settings import Settings
from fused_rin.experiments.training.trainer import Trainer


@pytest.mark.parametrize("model", ["rin", "rin-dt", "irnn", "tanh", "lstm"])
def test_diagnoses_a_trained_model(tiny_run, capsys, model):
    folder = tiny_run(model=model, test_size=200)
    Trainer(folder).run()
    with pytest.raises(SystemExit) as end:
        main(["diagnose", str(folder.checkpoint_path)])
    assert end.value.code == 0
    out = folder.path / "diagnostics"
    assert str(out) in capsys.readouterr().out
    (numbers,) = json.loads((out / "diagnostics.json").read_text())["networks"]
    assert numbers["name"] == f"{model}, step 24"
    assert len(numbers["gradient_norms"]) == 10
    assert min(numbers["gradient_norms"]) >= 0
    assert max(numbers["gradient_norms"]) > 0
    assert numbers["estimation_error"]["to_last"][-1] == 0
    pictures = {path.stem for path in out.glob("*.png")}
    plain = {"gradients", "estimation-error", "activity"}
    assert pictures == (plain if model == "lstm" else plain | {"eigenvalues"})


def read(path):
    return read_results(path, FORMAT, VERSION, "networks")["networks"]


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["diagnose", *map(str, arguments)])
    return end.value.code


@pytest.fixture
def trained(tiny_run):
    """Makes a run of 24 steps and returns its checkpoint."""

    def make(name="run", **changes):
        folder = tiny_run(name, test_size=200, **changes)
        Trainer(folder).run()
        return folder.checkpoint_path

    return make


def test_the_numbers_are_those_of_the_trained_network(trained, tmp_path):
    checkpoint = trained()
    assert call(checkpoint, "--out", tmp_path / "out") == 0
    (network,) = read(tmp_path / "out" / "diagnostics.json")
    content = read_checkpoint(checkpoint)
    settings = Settings.from_dict(content["settings"])
    task = settings.build_task()
    model = settings.build_model(task)
    model.load_state_dict(content["model"])
    (x,), target = next(task.test_batches(128))
    x.requires_grad_()
    task.loss(model(x), target).backward()
    assert network["gradient_norms"] == pytest.approx(x.grad.flatten(1).norm(dim=1).tolist(), rel=1e-4)
    states = model.rnn(x)[0].detach()
    assert network["estimation_error"]["to_last"] == pytest.approx(
        (states - states[-1]).mean((1, 2)).tolist(), rel=1e-3
    )
    assert network["activity"]["active"] == pytest.approx((states != 0).float().mean((1, 2)).tolist(), rel=1e-4)
    radius = max(abs(complex(*value)) for value in network["eigenvalues"]["rnn.weight_hh_l0"])
    v = model.rnn.weight_hh_l0.detach() + torch.eye(8)
    assert radius == pytest.approx(torch.linalg.eigvals(v).abs().max().item(), rel=1e-4)


def test_several_networks_are_compared_and_drawn_again(trained, tmp_path, capsys):
    checkpoints = [trained("a"), trained("b"), trained("c", model="lstm")]
    assert call(*checkpoints, "--out", tmp_path / "out") == 0
    networks = read(tmp_path / "out" / "diagnostics.json")
    assert [network["name"] for network in networks] == ["rin, step 24", "rin, step 24", "lstm, step 24"]
    figures = draw(networks)
    labels = [text.get_text() for text in figures["gradients"].axes[0].get_legend().get_texts()]
    assert labels == ["rin, step 24", "rin, step 24'", "lstm, step 24"]
    assert len(figures["eigenvalues"].axes[0].collections) == 2
    assert call("--draw", tmp_path / "out" / "diagnostics.json", "--out", tmp_path / "again") == 0
    for path in (tmp_path / "out").glob("*.png"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert call(checkpoints[0], "--first", "--out", tmp_path / "first") == 0
    (first,) = read(tmp_path / "first" / "diagnostics.json")
    assert first["name"] == "rin, step 0"
    assert first["gradient_norms"] != networks[0]["gradient_norms"]
    values = first["eigenvalues"]["rnn.weight_hh_l0"]  # I + U with U from N(0, 0.001^2)
    assert all(abs(complex(*value) - 1) < 0.02 for value in values)


def edit(checkpoint, change):
    content = read_checkpoint(checkpoint)
    change(content)
    AtomicCheckpointIO().save_checkpoint(content, checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("nothing"), "is damaged or not a checkpoint"),
        (lambda path: path.write_bytes(b""), "is damaged or not a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is damaged or not a checkpoint"),
        (lambda path: path.unlink(), "cannot read the checkpoint"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot read the checkpoint"),
        (lambda path: torch.save({"model": {}}, path), "is not a checkpoint of fused-rin"),
        (lambda path: edit(path, lambda content: content.update(version=9)), "version 9, expected 2"),
        (lambda path: edit(path, lambda content: content.pop("settings")), "cannot be used: 'settings'"),
        (lambda path: edit(path, lambda content: content.update(settings=[1])), "cannot be used"),
        (lambda path: edit(path, lambda content: content["settings"].update(model="rim")), "unknown model 'rim'"),
        (lambda path: edit(path, lambda content: content.update(model=None)), "cannot be used"),
        (lambda path: edit(path, lambda content: content["model"].pop("head.bias")), "head.bias should be"),
        (lambda path: edit(path, lambda content: content["model"]["head.bias"].fill_(torch.nan)), "infinite or NaN"),
        (lambda path: edit(path, lambda content: content.update(step="many")), "cannot be used"),
    ],
)
def test_damaged_checkpoints_end_in_one_line(trained, tmp_path, capsys, damage, message):
    checkpoint = trained()
    damage(checkpoint)
    capsys.readouterr()
    assert call(checkpoint, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged or not a results file"),
        ("{}", "is not a file of fused-rin diagnostics"),
        ('{"format": "fused-rin diagnostics", "version": 2}', "version 2, expected 1"),
        ('{"format": "fused-rin diagnostics", "version": 1, "networks": [{}]}', "is damaged"),
        (None, "cannot read the results"),
    ],
)
def test_what_is_no_diagnostics_file_is_not_drawn(tmp_path, capsys, content, message):
    path = tmp_path / "diagnostics.json"
    if content is not None:
        path.write_text(content)
    assert call("--draw", path, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_or_both_are_refused(tmp_path, capsys):
    assert call() == 2
    assert call(tmp_path / "a.pt", "--draw", tmp_path / "b.json") == 2
    assert "needs a checkpoint, or --draw FILE; not both" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["first", "trained"])
def test_the_committed_page_is_what_the_committed_results_give(moment):
    repository = Path(__file__).resolve().parents[2]
    networks = read(repository / "docs" / "diagnostics" / f"{moment}.json")
    steps = {"first": 0, "trained": 2200}
    assert [n["name"] for n in networks] == [f"{m}, step {steps[moment]}" for m in ("rin", "irnn", "rnn", "lstm")]
    assert {len(network["gradient_norms"]) for network in networks} == {200}
    page = (repository / "docs" / "diagnostics.md").read_text()
    for name in draw(networks):
        picture = repository / "docs" / "diagnostics" / moment / f"{name}.png"
        assert 10_000 < picture.stat().st_size < 150_000
        assert f"(diagnostics/{moment}/{name}.png)" in page
