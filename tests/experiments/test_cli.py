"""Mistakes end in one line on stderr and exit code 2, and nothing that was there before is touched."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from experiment_helpers import called, fused_rin, metrics
from fused_rin import __version__
from fused_rin.experiments.cli import main
from fused_rin.experiments.errors import UserError
from fused_rin.experiments.training.checkpoints import SEAL, SEALED, AtomicCheckpointIO, read_checkpoint
from fused_rin.experiments.training.runs import Run
from fused_rin.experiments.training.settings import Settings
from fused_rin.experiments.training.trainer import Trainer

SMALL = ["--length", "10", "--hidden-size", "8", "--steps", "4", "--test-size", "20", "--threads", "1"]
TRAIN = ["train", "--task", "adding", *SMALL]


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs the command line, which has to fail as every mistake does; returns its one line."""

    def run(*arguments):
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as error:
            main([str(argument) for argument in arguments])
        assert error.value.code == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("fused-rin")
        assert "Traceback" not in printed.err
        assert snapshot(tmp_path) == before
        return printed.err

    return run


CYCLES = [*TRAIN, "--recurrent-init", "cycles", "--recurrent-cycles"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "--task is required"),
        (["train", "--task", "additon"], "unknown task 'additon'; known: adding, digits, mnist, mnist-rows, babi"),
        ([*TRAIN, "--model", "rim"], "unknown model 'rim'; known: rin, rin-dt, irnn, tanh, rnn, lstm, gru"),
        ([*TRAIN, "--recurrent-optimizer", "adam"], "unknown recurrent_optimizer 'adam'; known: same, muon"),
        ([*TRAIN, "--optimizer", "adan"], "unknown optimizer 'adan'; known: adam, rmsprop, sgd"),
        ([*TRAIN, "--precision", "fp7"], "unknown precision 'fp7'"),
        ([*TRAIN, "--hidden-size", "0"], "hidden_size must be a positive integer, got 0"),
        ([*TRAIN, "--steps", "-3"], "steps must be a positive integer, got -3"),
        ([*TRAIN, "--batch-size", "0"], "batch_size must be a positive integer, got 0"),
        ([*TRAIN, "--batch-size", "two"], "invalid int value: 'two'"),
        ([*TRAIN, "--learning-rate", "nan"], "learning_rate must be finite and not negative, got nan"),
        ([*TRAIN, "--clip", "-1"], "clip must be finite and not negative, got -1.0"),
        ([*TRAIN, "--warmup", "2"], "warmup must be a share of the steps, between 0 and 1, got 2.0"),
        ([*TRAIN, "--recurrent-init", "shfit"], "unknown recurrent_init 'shfit'; known: normal, shift, cycles"),
        ([*TRAIN, "--recurrent-init", "cycles"], "recurrent_cycles goes with recurrent_init 'cycles', got '' with"),
        (
            [*TRAIN, "--recurrent-cycles", "5"],
            "recurrent_cycles goes with recurrent_init 'cycles', got '5' with 'normal'",
        ),
        ([*CYCLES, "5,4"], "recurrent_cycles must fit into hidden_size, got '5,4' and 8"),
        ([*CYCLES, "5,-2"], "recurrent_cycles must be positive integers with commas between, got '5,-2'"),
        ([*CYCLES, "5,"], "recurrent_cycles must be positive integers with commas between, got '5,'"),
        ([*TRAIN, "--model", "irnn", "--recurrent-init", "shift"], "recurrent_init 'shift' is for the model 'rin'"),
        ([*TRAIN, "--recipe", "bset"], "unknown recipe 'bset'; known: best"),
        ([*TRAIN, "--recipe", "best"], "the recipe 'best' is for the task mnist, got 'adding'"),
        ([*TRAIN, "--ema", "1"], "ema must be at least 0 and less than 1, got 1.0"),
        ([*TRAIN, "--state-noise", "-1"], "state_noise must be finite and not negative, got -1.0"),
        ([*TRAIN, "--weight-decay", "inf"], "weight_decay must be finite and not negative, got inf"),
        (
            [*TRAIN, "--model", "irnn", "--identity-decay", "1"],
            "identity_decay is for the models rin, rin-dt, got 'irnn'",
        ),
        (
            [*TRAIN, "--model", "lstm", "--state-noise", "1"],
            "state_noise is for the models rin, rin-dt, irnn, tanh, rnn, gru",
        ),
        (["train", "--task", "babi", "--state-noise", "1"], "on tasks of one sequence, got 'rin' on 'babi'"),
        ([*TRAIN, "--length", "1"], "length must be at least 2"),
        ([*TRAIN, "--no-such-option"], "unrecognized arguments: --no-such-option"),
        ([*TRAIN, "--device", "abacus"], "device 'abacus' cannot be used"),
        (["train", "--task", "digits", "--batch-size", "1438"], "batch_size must be at most 1437"),
    ],
)
def test_wrong_settings(fails, tmp_path, arguments, message):
    arguments = [*arguments, "--out", tmp_path / "run"] if arguments[:1] == ["train"] else arguments
    assert message in fails(*arguments)


@pytest.mark.parametrize("command", [["train", "--task", "mnist"], ["reproduce", "babi", "--budget", "0.001"]])
def test_data_that_are_missing_or_damaged(fails, tmp_path, command):
    command = [*command, "--data-dir", tmp_path, "--out", tmp_path / "run"]
    assert "is not there" in fails(*command)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(b"not MNIST")
    (tmp_path / "babi").mkdir()
    (tmp_path / "babi" / "tasks_1-20_v1-2.tar.gz").write_bytes(b"not bAbI")
    error = fails(*command)
    assert "is damaged" in error
    assert (
        "put it there, name another folder with --data-dir or FUSED_RIN_DATA, or fetch it: fused-rin download" in error
    )


def test_a_cuda_that_is_not_there(fails, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "device 'cuda' cannot be used" in fails(*TRAIN, "--device", "cuda", "--out", tmp_path / "run")


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run of four steps."""
    folder = Run.new(tmp_path / "finished", Settings.for_task("adding", **_values(SMALL)))
    Trainer(folder).run()
    return folder.path


def _values(options):
    return {name[2:].replace("-", "_"): int(value) for name, value in zip(options[::2], options[1::2], strict=True)}


def test_an_existing_run_is_not_overwritten(fails, finished):
    assert "holds a run already; go on with --resume" in fails(*TRAIN, "--out", finished)


def test_a_folder_with_other_contents_is_not_used(fails, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text('{"format": "something else"}')
    assert "is not empty and not a run folder" in fails(*TRAIN, "--out", tmp_path / "thesis")
    assert "is not a run folder" in fails("train", "--resume", tmp_path / "thesis")


def test_a_run_folder_that_cannot_be_made(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "the run folder: Not a directory" in fails(*TRAIN, "--out", tmp_path / "file" / "run")
    assert "the run folder: Not a directory" in fails(*TRAIN, "--out", tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_permission(fails, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in fails(*TRAIN, "--out", tmp_path / "locked" / "run")


def test_resuming_what_is_not_there(fails, tmp_path):
    assert "is not a run folder" in fails("train", "--resume", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is damaged or not a checkpoint"),
        (lambda path: path.write_bytes(b""), "is damaged or not a checkpoint"),
        (lambda path: path.write_text("not a checkpoint"), "is damaged or not a checkpoint"),
        (lambda path: torch.save({"state_dict": {}}, path), "is not a checkpoint of fused-rin"),
        (lambda path: torch.save([1, 2], path), "is not a checkpoint of fused-rin"),
        (lambda path: torch.save(torch.nn.Linear(1, 1), path), "is damaged or not a checkpoint"),
        (lambda path: path.unlink(), "cannot read the checkpoint: No such file"),
        (lambda path: alter(path, version=99), "checkpoint version 99, expected 2"),
        (lambda path: torch.save(read_checkpoint(path), path), "is damaged: its checksum is missing"),
        (lambda path: alter(path, model={}), "should be"),
        (lambda path: alter(path, optimizers=[{"state": {}, "param_groups": []}]), "does not fit this run"),
        (lambda path: alter(path, totals=torch.zeros(3)), "does not fit this run"),
        (lambda path: alter(path, step=None), "does not fit this run"),
    ],
)
def test_damaged_and_foreign_checkpoints(fails, finished, damage, message):
    damage(finished / "checkpoint.pt")
    assert message in fails("train", "--resume", finished)


def alter(path, **changes):
    AtomicCheckpointIO().save_checkpoint({**read_checkpoint(path), **changes}, path)


def test_any_flipped_bit_of_a_checkpoint_is_noticed(fails, finished):
    """In the archive's headers, the pickle, a weight, the directory at the end, the checksum, its name, its length."""
    path = finished / "checkpoint.pt"
    good = path.read_bytes()
    weight = good.index(read_checkpoint(path)["model"]["rnn.weight_hh_l0"].numpy().tobytes())
    assert torch.load(path, weights_only=True)["step"] == 4  # the checksum is in nobody's way
    sealed = len(good) - SEALED
    for place in (0, 3, 20, good.index(b"fused-rin checkpoint"), weight, weight + 100, sealed - 22, sealed - 2, sealed,
                  sealed + len(SEAL), len(good) - 1):  # fmt: skip
        for bit in (0, 7):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            with pytest.raises(UserError, match=rf"{path}: is damaged"):
                read_checkpoint(path)
    assert f"{path}: is damaged" in fails("diagnose", path)
    assert "the one before it, of step 0, is sound" in fails("train", "--resume", finished)
    path.write_bytes(good)
    assert read_checkpoint(path)["step"] == 4


def test_a_damaged_checkpoint_names_the_one_before_it_which_goes_on(fails, tmp_path):
    short = [*TRAIN, "--steps", "9", "--checkpoint-every", "4", "--eval-every", "3"]
    for name in ("whole", "damaged"):
        assert called(*short, "--out", tmp_path / name) == 0
    path = tmp_path / "damaged" / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = fails("train", "--resume", path.parent)
    assert "is damaged: its sha256 is" in message
    found = re.search(r"the one before it, of step 8, is sound; to go back to it: (cp .*)$", message)
    subprocess.run(shlex.split(found[1]), check=True)
    assert called("train", "--resume", path.parent) == 0
    assert metrics(path.parent) == metrics(tmp_path / "whole")
    assert read_checkpoint(path)["step"] == 9
    for broken in (path, path.with_name("checkpoint.previous.pt")):  # where there is no sound one, none is named
        broken.write_bytes(content[:-1])
    assert "the one before it" not in fails("train", "--resume", path.parent)


def test_a_checkpoint_from_before_there_were_checksums(finished):
    torch.save({**read_checkpoint(finished / "checkpoint.pt"), "version": 1}, finished / "checkpoint.pt")
    assert called("train", "--resume", finished, "--steps", "6") == 0
    assert [record["step"] for record in metrics(finished)] == [4, 4, 6, 6]


def test_a_checkpoint_that_would_run_code_does_not(fails, finished, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    torch.save({"format": "fused-rin checkpoint", "model": Payload()}, finished / "checkpoint.pt")
    assert "is damaged or not a checkpoint" in fails("train", "--resume", finished)
    assert not (tmp_path / "was here").exists()


def test_a_checkpoint_of_another_run(fails, finished, tmp_path):
    other = Run.new(tmp_path / "other", Settings.for_task("adding", **{**_values(SMALL), "hidden_size": 9}))
    Trainer(other).run()
    (finished / "checkpoint.pt").write_bytes(other.checkpoint_path.read_bytes())
    assert "it has hidden_size 9, 8 was asked for" in fails("train", "--resume", finished)


def test_a_damaged_configuration(fails, finished):
    config = json.loads((finished / "config.json").read_text())
    for change, message in (
        ({"steps": "many"}, "setting 'steps' must be of type int, got 'many'"),
        ({"moodel": "rin"}, "unknown setting 'moodel'"),
        ({"model": "rim"}, "unknown model 'rim'"),
    ):
        altered = {**config, "settings": {**config["settings"], **change}}
        (finished / "config.json").write_text(json.dumps(altered))
        assert message in fails("train", "--resume", finished)


def test_settings_of_a_run_stay_as_they_are(fails, finished):
    assert "the run has model rin, lstm was asked for" in fails("train", "--resume", finished, "--model", "lstm")
    assert "--out and --resume cannot be given" in fails("train", "--resume", finished, "--out", finished)
    assert "--recipe and --resume cannot be given" in fails("train", "--resume", finished, "--recipe", "best")


def test_a_run_can_be_made_longer(finished):
    with pytest.raises(SystemExit) as end:
        main(["train", "--resume", str(finished), "--steps", "6"])
    assert end.value.code == 0
    assert [record["step"] for record in metrics(finished)] == [4, 4, 6, 6]


def test_train_from_the_shell(tmp_path):
    result = fused_rin(*TRAIN, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "test loss" in result.stdout
    files = {"checkpoint.pt", "checkpoint.previous.pt", "config.json", "curves.png", "metrics.jsonl"}
    assert {path.name for path in (tmp_path / "runs" / "adding-rin-0").iterdir()} == files


def test_two_runs_in_one_folder_at_once(fails, tmp_path):
    """The second is refused while the first trains, and when the first began after the second looked."""
    settings = Settings.for_task("adding", **_values(SMALL))
    first, second = Run.new(tmp_path / "both", settings), Run.new(tmp_path / "both", settings)
    first.create()
    with pytest.raises(UserError, match="another process trains in this folder"):
        second.create()
    assert "another process trains in this folder" in fails("train", "--resume", tmp_path / "both")
    first.release()
    with pytest.raises(UserError, match="holds a run already"):
        second.create()
    assert Run.open(tmp_path / "both").settings == settings


def test_a_package_of_the_extras_that_is_missing_is_named(fails, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("fused_rin.experiments.training.") and not name.endswith((".runs", ".settings")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    message = fails(*TRAIN)
    assert "lightning_fabric is not installed; the commands need: pip install 'fused-rin[experiments]'" in message


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fused-rin {__version__}, torch {torch.__version__}\n"


@pytest.mark.parametrize(
    ("option", "tasks"), [("--length 10", "adding"), ("--train-size 100", "adding"), ("--babi-task 2", "babi")]
)
def test_a_setting_that_the_task_does_not_look_at_is_refused(fails, option, tasks):
    name = option.split()[0]
    assert f"{name} is for the task {tasks}, got 'digits'" in fails("train", "--task", "digits", *option.split())
