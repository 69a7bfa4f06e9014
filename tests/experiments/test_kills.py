"""A run that was killed goes on to what it would have become, bit for bit; and two processes do not share a folder."""

import subprocess
from pathlib import Path

import pytest
from fused_rin.experiments.cli import main
from fused_rin.experiments.errors import UserError
from fused_rin.experiments.files import FolderLock, write_atomically
from fused_rin.experiments.identity.experiment import IdentityPrior
from fused_rin.experiments.trial_folder import run_experiment

from tests import warm

EXPERIMENT = ["experiment", "identity-prior", "--only", "digits-sgd-N90-none*", "--budget", "0.02"]
KILLS = Path(__file__).with_name("kills.py")


def test_killed_at_any_moment(tmp_path):
    """Ten random ones and before every fifth operation on a file; `kills.py` itself does as many as it is asked for."""
    command = [*warm.PYTHON, KILLS, tmp_path / "kills", "--times", "10", "--every", "5"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 10 times" in done.stdout


def leftover(folder, name):
    path = folder / f".{name}.12345.tmp"
    folder.mkdir(exist_ok=True)
    path.write_bytes(b"half a fi")
    return path


@pytest.mark.parametrize("command", ["train", "experiment", "demo"])
def test_what_a_killed_process_left_of_its_first_file_is_in_nobodys_way(tmp_path, command, monkeypatch):
    first = {"train": "config.json", "experiment": "config.json", "demo": "demo.json"}[command]
    half = leftover(tmp_path / "run", first)
    arguments = {
        "train": ["train", "--task", "adding", "--length", "10", "--steps", "2", "--test-size", "20", "--threads", "1"],
        "experiment": EXPERIMENT,
        "demo": ["demo"],
    }[command]
    if command == "demo":
        monkeypatch.setattr("fused_rin.experiments.demo._demo", lambda out: 0)
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--out", str(tmp_path / "run")])
    assert end.value.code == 0
    assert not half.exists()
    assert (tmp_path / "run" / first).exists()


def test_files_of_others_stay(tmp_path, capsys):
    half = leftover(tmp_path / "run", "config.json")
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    for command in (["train", "--task", "adding"], EXPERIMENT, ["demo"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--out", str(tmp_path / "run")])
        assert end.value.code == 2
        assert "is not empty" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {half.name, "thesis.tex"}


@pytest.mark.parametrize(("command", "does"), [(EXPERIMENT, "runs this experiment"), (["demo"], "runs a demo")])
def test_two_processes_in_one_folder(tmp_path, capsys, command, does):
    (tmp_path / "both").mkdir()
    lock = FolderLock(tmp_path / "both")
    lock.take("is busy")
    with pytest.raises(SystemExit) as end:
        main([*command, "--out", str(tmp_path / "both")])
    assert end.value.code == 2
    assert f"both: another process {does} in this folder; name another one" in capsys.readouterr().err
    assert list((tmp_path / "both").iterdir()) == []
    lock.release()


def test_a_folder_is_free_again_after_a_failure(tmp_path, monkeypatch):
    def fail(*arguments):
        raise UserError("no")

    monkeypatch.setattr(IdentityPrior, "run_trial", fail)
    for _ in range(2):
        with pytest.raises(UserError, match="no"):
            run_experiment(IdentityPrior(), tmp_path / "run", budget=0.02, only="digits-sgd-N90-none*")


def test_the_old_content_is_kept_where_it_was_asked_for(tmp_path):
    path, old = tmp_path / "file", tmp_path / "old"
    for text in (b"1", b"2", b"3"):
        write_atomically(path, text, keep=old)
    assert (path.read_bytes(), old.read_bytes()) == (b"3", b"2")
    old.unlink()
    old.hardlink_to(path)  # a process was killed between the two
    write_atomically(path, b"4", keep=old)
    assert (path.read_bytes(), old.read_bytes()) == (b"4", b"3")
    assert sorted(tmp_path.iterdir()) == [path, old]


def test_without_hard_links_the_new_content_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    for text in (b"1", b"2"):
        write_atomically(tmp_path / "file", text, keep=tmp_path / "old")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"2"]
