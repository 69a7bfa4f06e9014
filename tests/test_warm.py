"""A fork of a Python that has imported torch is to its caller what a Python of its own would be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import warm

KINDS = {"own": [sys.executable], "fork": warm.PYTHON}
needs_forks = pytest.mark.skipif([sys.executable] == warm.PYTHON, reason="no processes are forked on this system")

# Exit status, output and the end of the errors have to be equal.
PROGRAMS = {
    "arguments": ["-c", "import sys; print(sys.argv, sys.path[0], __name__)", "one", "--two"],
    "module": ["-m", "json.tool", "--no-such-option"],
    "streams": ["-c", "import sys; print(sys.stdin.read()); print('no', file=sys.stderr)"],
    "environment": ["-c", "import os; print(sorted(os.environ.items()), os.getcwd(), os.getppid() > 1)"],
    "search path": ["-c", "import sys; print([path for path in sys.path if path.startswith('/nowhere')])"],
    "threads": ["-c", "import torch; print(torch.get_num_threads())"],
    "status": ["-c", "raise SystemExit(3)"],
    "message": ["-c", "raise SystemExit('it is over')"],
    "exception": ["-c", "print('so far'); raise ValueError('no')"],
    "warning": ["-W", "error", "-c", "import warnings; warnings.warn('no')"],
    "killed": ["-c", "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)"],
    "last words": ["-c", "import atexit; atexit.register(print, 'bye'); print('hello')"],
    "nobody reads": ["-c", "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('hello')"],
    "the package": ["-c", "import sys; a = 'fused_rin' in sys.modules; import fused_rin; print(a, fused_rin.__file__)"],
}


@needs_forks
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_is_as_a_python_of_its_own(tmp_path, name, unbuffered):
    environment = {**os.environ, "PYTHONPATH": "/nowhere/a:/nowhere/b", "OMP_NUM_THREADS": "1"}
    environment["PYTHONUNBUFFERED"] = unbuffered
    own, fork = (
        subprocess.run(
            [*python, *PROGRAMS[name]], cwd=tmp_path, env=environment, input="said", capture_output=True, text=True
        )
        for python in KINDS.values()
    )
    assert (fork.returncode, fork.stdout) == (own.returncode, own.stdout)
    assert fork.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]


WAITS = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"asked to end"), os._exit(5)))
print(os.getpid(), flush=True)
time.sleep(60)
"""


def start() -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen([*warm.PYTHON, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())  # type: ignore[union-attr]


@needs_forks
def test_a_signal_is_handed_on():
    process, _ = start()
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("asked to end", None)
    assert process.returncode == 5


@needs_forks
def test_a_fork_ends_with_the_process_that_stands_for_it():
    process, fork = start()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{fork}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
