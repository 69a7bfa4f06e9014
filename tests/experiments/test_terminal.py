"""What the command line writes into a terminal of any width, a pipe, one that nobody reads, a disk that is full."""

import datetime
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

import pytest
from experiment_helpers import called, metrics
from fused_rin.experiments.bars import BAR, Bar, shorten
from fused_rin.experiments.errors import CLOSED
from fused_rin.experiments.training import progress
from fused_rin.experiments.training.checkpoints import read_checkpoint

from tests import warm

TRAIN = ["train", "--task", "adding", "--length", "10", "--hidden-size", "8", "--test-size", "20", "--threads", "1"]
TRAIN += ["--steps", "40", "--log-every", "10", "--eval-every", "10"]
# Not that of the tests: a process whose output is buffered is the usual one, and a width that is set hides the pty's.
PLAIN = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "COLUMNS")}


NAMES = ("checkpoint.pt", "checkpoint.previous.pt", "config.json", "curves.png", "metrics.jsonl")


# Of a bar: what tqdm knows when it draws it.
STATE = {"n": 12345, "total": 234000, "elapsed": 1234, "unit": "step", "rate": 10.0, "postfix": "train 0.0254/22.8%"}


def command(*arguments):
    return [*warm.PYTHON, "-m", "fused_rin", *map(str, arguments)]


def in_terminal(width, *arguments, **environment):
    """(exit code, lines) of the command in a terminal of so many columns, each state of a bar a line."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with subprocess.Popen(
        command(*arguments), env={**PLAIN, "PYTHONIOENCODING": "utf-8", **environment}, **streams
    ) as it:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 1 << 16):
                parts.append(part)
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9]*[A-Z]", "", b"".join(parts).decode())
    return it.returncode, [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize(("width", "environment"), [(80, {}), (300, {"COLUMNS": "80"})])
def test_lines_fit_the_terminal_and_the_bar_can_be_seen(tmp_path, width, environment):
    label_is_long = [*TRAIN, "--model", "rin-dt", "--steps", "1000", "--log-every", "50", "--eval-every", "100"]
    code, lines = in_terminal(width, *label_is_long, "--out", tmp_path / "run", **environment)
    assert code == 0, lines
    *progress, curves = lines  # a path is not cut
    assert curves.startswith("curves: ")
    assert max(map(len, progress)) <= 80, progress
    bars = [line.split("|")[1] for line in progress if "|" in line]
    assert len(bars) >= 10
    assert min(map(len, bars)) >= BAR
    assert set(bars[-1]) == {"█"}
    assert sum(": step " in line for line in progress) == 10
    assert any("[00:0" in line for line in progress)


@pytest.mark.parametrize("label", ["adding rin", "[12/60] sequential-1-100-rin-dt-seed0", ""])
def test_the_bar_in_every_width(monkeypatch, label):
    """Its own columns stay; what is behind it goes first, then the middle of the label."""
    monkeypatch.setattr(Bar, "format_dict", STATE)
    bar = Bar(label, total=4)  # no terminal here: it is disabled, and drawn by hand
    bar.desc = label
    for width in (20, 40, 60, 80, 100, 140):
        monkeypatch.setenv("COLUMNS", str(width))
        text = str(bar)
        assert len(text) == width
        assert len(text.split("|")[1]) >= BAR
        assert width < 40 or label[:10] in text, text
        assert width < 80 or "12345/234000" in text, text
        assert width < 140 or label in text, text
    assert text.endswith("[20:34<6:09:25, 10.00step/s, train 0.0254/22.8%]")


def test_a_long_label_loses_its_middle():
    assert shorten("sequential", 10) == "sequential"
    short = [shorten("sequential", width) for width in (9, 4, 3, 2, 1, 0, -1)]
    assert short == ["sequ..ial", "s..l", "seq", "se", "s", "", ""]


def test_output_that_nobody_reads_ends_the_run_quietly(tmp_path):
    running = subprocess.Popen(
        command(*TRAIN, "--steps", "100000", "--out", tmp_path / "run"),
        env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout.readline().startswith("adding rin: step 10/100000: ")  # at once, not with the rest
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait() == CLOSED
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] < 100000


def test_help_that_nobody_reads():
    """It lies in a buffer until the end."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command("train", "--help"), env=PLAIN, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (CLOSED, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_behind_the_output(tmp_path):
    with open("/dev/full", "w") as full:
        run = command(*TRAIN, "--out", tmp_path / "run")
        done = subprocess.run(run, env=PLAIN, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "fused-rin: error: the output cannot be written: No space left on device\n"


def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path):
    """As a limit on the size of files has it: what fits of a checkpoint is written, then the write fails. The old
    checkpoint stays, and the run ends as another does when it can write again."""
    folders = tmp_path / "whole", tmp_path / "full"
    for folder in folders:
        assert called(*TRAIN, "--checkpoint-every", 10, "--steps", 20, "--out", folder) == 0
    checkpoint = tmp_path / "full" / "checkpoint.pt"
    good = checkpoint.read_bytes()
    resume = ["train", "--steps", "40", "--resume"]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(good) // 2}, -1))"
    code = f"{limit}; from fused_rin.experiments.cli import main; main({[*resume, str(folder)]})"
    done = subprocess.run([*warm.PYTHON, "-c", code], env=PLAIN, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"fused-rin: error: .*/checkpoint.pt: cannot write the checkpoint: File too large\n", done.stderr
    )
    assert checkpoint.read_bytes() == good
    assert [sorted(path.name for path in folder.iterdir()) for folder in folders] == [sorted(NAMES)] * 2
    for folder in folders:
        assert called(*resume, folder) == 0
    assert metrics(tmp_path / "full") == metrics(tmp_path / "whole")


def test_a_long_run_says_once_when_it_will_end(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2024, 2, 28, 23, 0)

    monkeypatch.setattr(progress, "datetime", Clock)

    def texts(*seconds, first=0, steps=1000):
        nonlocal now
        now = 100.0
        end = progress.ExpectedEnd(first, steps)
        found = []
        for step, passed in enumerate(seconds, first + 1):
            now = 100.0 + passed
            found.append(end.after(step))
        return found

    # 2 s a step, and 995 to go; 6 s a step, and 14,400 to go.
    said = ["", "", "", "0:33:10 to go without evaluations, until 23:33", "", ""]
    assert texts(1.0, 2.0, 4.9, 8.0, 9.0, 10.0, steps=999) == said
    assert texts(6.0, first=10, steps=14411) == ["1 day, 0:00:00 to go without evaluations, until 23:00 on 29 February"]
    assert texts(2.0, 6.0, 9.0, steps=11) == ["", "", ""]  # soon over
