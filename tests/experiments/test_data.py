"""MNIST and bAbI: read, checked, and asked for where they are not. The real files are used where they lie."""

import gzip
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from experiment_helpers import REAL, needs
from fused_rin.experiments import data
from fused_rin.experiments.babi import Babi, parse
from fused_rin.experiments.errors import UserError
from fused_rin.experiments.tasks import mnist
from fused_rin.experiments.training.settings import Settings
from fused_rin.experiments.training.trainer import Trainer


@needs("mnist")
def test_mnist_pixel_by_pixel_and_row_by_row():
    pixels = mnist(REAL)
    (x,), labels = next(pixels.test_batches(100))
    assert x.shape == (784, 100, 1)
    assert pixels.train_size == 60_000
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert x.min() == 0
    assert x.max() == 1
    rows = mnist(REAL, rows=True)
    torch.testing.assert_close(next(rows.test_batches(100)).inputs[0].transpose(0, 1).reshape(100, 784), x[..., 0].t())
    permuted = mnist(REAL, permute=True)
    torch.testing.assert_close(next(permuted.test_batches(100)).inputs[0].sort(0).values, x.sort(0).values)


@needs("mnist")
@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:1000], lambda b: b""], ids=["tail", "head", "empty"])
def test_a_damaged_mnist_is_noticed(tmp_path, damage):
    shutil.copytree(REAL / "mnist", tmp_path / "mnist")
    file = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    file.chmod(0o644)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.*is damaged.*put it there.*download mnist"):
        data.read_mnist(tmp_path)


@needs("mnist")
def test_a_changed_pixel_is_noticed_and_plain_files_are_read(tmp_path):
    (tmp_path / "mnist").mkdir()
    for name in data.MNIST:
        content = gzip.decompress((REAL / "mnist" / f"{name}.gz").read_bytes())
        (tmp_path / "mnist" / name).write_bytes(content)
    assert len(data.read_mnist(tmp_path)[1][1]) == 10_000
    content = bytearray((tmp_path / "mnist" / "t10k-images-idx3-ubyte").read_bytes())
    content[5000] ^= 1
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte: is damaged or not MNIST: its sha256 is"):
        data.read_mnist(tmp_path)


@pytest.mark.parametrize(("task", "name"), [("mnist", "mnist"), ("mnist-rows", "mnist"), ("babi", "babi")])
def test_missing_data_are_asked_for(tmp_path, task, name):
    with pytest.raises(UserError, match=f"put it there.*fused-rin download {name} --data-dir {tmp_path}"):
        Settings.for_task(task, data_dir=str(tmp_path)).build_task()


def test_the_data_folder_is_named_or_in_the_environment(monkeypatch):
    monkeypatch.setenv("FUSED_RIN_DATA", "/from/environment")
    assert data.data_folder("/named") == Path("/named")
    assert data.data_folder() == Path("/from/environment")
    monkeypatch.delenv("FUSED_RIN_DATA")
    assert data.data_folder() == Path("data")


@needs("mnist")
def test_download_fetches_checks_and_writes(tmp_path, monkeypatch):
    """From a public home that is a folder here: urllib opens file: as it opens https:."""
    monkeypatch.setattr(data, "MNIST_HOME", (REAL / "mnist").as_uri() + "/")
    assert len(data.download("mnist", tmp_path)) == 4
    assert data.download("mnist", tmp_path) == []
    assert len(data.read_mnist(tmp_path)[0][1]) == 60_000


def test_a_download_that_is_not_the_data_is_not_kept(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"an error page"))
    monkeypatch.setattr(data, "MNIST_HOME", home.as_uri() + "/")
    with pytest.raises(UserError, match="is damaged or not MNIST"):
        data.download("mnist", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.gz"))
    monkeypatch.setattr(data, "BABI_HOME", (home / "nothing").as_uri())
    with pytest.raises(UserError, match="cannot be fetched"):
        data.download("babi", tmp_path / "data")


def test_parsing_joins_all_statements_before_a_question():
    questions = parse(
        "1 Mary moved to the bathroom.\n2 John went.\n3 Where is Mary? \tbathroom\t1\n4 Mary left.\n"
        "5 Where is John?\thallway,den\t2\n1 It rains.\n2 Why? \tclouds\t1\n"
    )
    first, second, third = questions
    assert first == (["mary", "moved", "to", "the", "bathroom", "john", "went"], ["where", "is", "mary"], "bathroom")
    assert second.story == [*first.story, "mary", "left"]
    assert second.answer == "hallway,den"
    assert third.story == ["it", "rains"]


@needs("babi")
def test_all_twenty_tasks_have_a_thousand_questions():
    files = data.read_babi(REAL)
    assert len(files) == 40
    assert all(len(parse(text)) == 1000 for text in files.values())


@needs("babi")
def test_babi_batches_are_padded_on_the_left():
    task = Babi(6, REAL)
    (story, question), answer = task.train_batch(0, 32)
    assert task.output_size == 2
    assert story.shape[1] == question.shape[1] == len(answer) == 32
    for sequences in (story, question):
        padding = sequences == 0
        assert (padding[1:] <= padding[:-1]).all()
        assert not padding[-1].any()
        assert sequences.max() < task.vocabulary
    assert 0.6 < task.baseline < 0.7
    with pytest.raises(UserError, match="babi_task must be between 1 and 20, got 21"):
        Babi(21, REAL)


@needs("babi")
def test_a_damaged_archive_is_noticed(tmp_path):
    (tmp_path / "babi").mkdir()
    path = tmp_path / "babi" / data.BABI_ARCHIVE
    content = (REAL / "babi" / data.BABI_ARCHIVE).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged"):
        data.read_babi(tmp_path)
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(UserError, match=r"is damaged or not bAbI v1\.2.*put it there.*download babi"):
        data.read_babi(tmp_path)


@needs("babi")
@pytest.mark.parametrize("model", ["rin", "lstm"])
def test_the_three_networks_learn_a_babi_task(tiny_run, model):
    """Yes or no (task 6) from 8 units: the loss falls below that of guessing on what it is trained on."""
    folder = tiny_run(task="babi", model=model, babi_task=20, hidden_size=16, data_dir=str(REAL), steps=120)
    trainer = Trainer(folder)
    trainer.run()
    last = [record for record in folder.read_metrics() if record["split"] == "train"][-1]
    assert last["loss"] < 0.8 * trainer.task.baseline
