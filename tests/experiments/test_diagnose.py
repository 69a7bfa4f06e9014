"""The command writes numbers and pictures of a checkpoint, and refuses what is none."""

import json

import pytest
from fused_rin.experiments.cli import main
from fused_rin.experiments.training import Trainer


@pytest.mark.parametrize("model", ["rin", "rin-dt", "irnn", "tanh", "lstm"])
def test_diagnoses_a_trained_model(tiny_run, capsys, model):
    folder = tiny_run(model=model, test_size=200)
    Trainer(folder).run()
    with pytest.raises(SystemExit) as end:
        main(["diagnose", str(folder.checkpoint_path)])
    assert end.value.code == 0
    out = folder.path / "diagnostics"
    assert str(out) in capsys.readouterr().out
    numbers = json.loads((out / "diagnostics.json").read_text())
    assert len(numbers["gradient_norms"]) == 10
    assert min(numbers["gradient_norms"]) >= 0
    assert max(numbers["gradient_norms"]) > 0
    assert numbers["estimation_error"]["to_last"][-1] == 0
    pictures = {path.stem for path in out.glob("*.png")}
    plain = {"gradients", "estimation-error", "activity"}
    assert pictures == (plain if model == "lstm" else plain | {"eigenvalues"})


def test_refuses_what_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "file.pt").write_text("nothing")
    with pytest.raises(SystemExit) as end:
        main(["diagnose", str(tmp_path / "file.pt")])
    assert end.value.code == 2
    assert "is damaged or not a checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]
