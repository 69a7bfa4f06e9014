"""Whose threads a sweep runs on: torch's OpenMP team where there is one, else a pool; shared by callers, and forked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from fused_rin import _native, cpu

from .conftest import make_case, use_threads

TEAMS = ["torch's", "own"]


def need_torchs_threads() -> None:
    """Skips where torch has no OpenMP; where it has, on Linux, not to find its runtime is a failure."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        pytest.skip("looked up on Linux alone, and this build of torch may have no OpenMP")
    assert _native.has_torchs_threads()


@pytest.fixture(params=TEAMS)
def team(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch's":
        need_torchs_threads()
    _native.use_torchs_threads(request.param == "torch's")
    yield request.param
    _native.use_torchs_threads(True)


def run_python(code: str, **environment: str) -> str:
    """What a fresh process prints, its errors raised."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_many_python_threads_at_once(team):
    """Several callers, each of which may want the threads: same bits as alone."""
    cases = [make_case(60, 4, 100, seed=i) for i in range(4)] + [make_case(60, 1, 512, seed=9)]
    alone = [cpu.forward(*case.arguments)[0] for case in cases]
    wrong = []

    def work(case, want):
        for _ in range(30):
            if not torch.equal(cpu.forward(*case.arguments)[0], want):
                wrong.append(case)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(cases, alone, strict=True)]
    with use_threads(2):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


def test_the_lock_of_python_is_released():
    """Another Python thread makes progress while a long sweep runs."""
    case = make_case(4000, 16, 200)
    ticks, done = [], threading.Event()

    def sweep():
        cpu.forward(*case.arguments)
        done.set()

    worker = threading.Thread(target=sweep)
    worker.start()
    while not done.is_set():
        ticks.append(None)
    worker.join()
    assert len(ticks) > 1000


SETUP = """
import os, torch
from fused_rin import _native, cpu
from fused_rin.problem import ALL_ROWS, Rule
torch.set_num_threads(2)
_native.assume_processors(2)  # beside other tests a call may find none free, and do without a second thread
pre, weight = torch.randn(64, 8, 1, 256), torch.randn(1, 256, 256) / 100
run = lambda: cpu.forward(pre, weight, None, ALL_ROWS, Rule())[0]
"""

COUNT = """
torch.randn(500, 500) @ torch.randn(500, 500)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
"""

FORK = """
_native.use_torchs_threads({torchs})
want = run()                      # the threads exist now
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        # compared without torch, whose own threads do not survive a fork
        same = all(bytes(run().numpy().data) == bytes(want.numpy().data) for _ in range(2))
        os._exit(0 if same else 1)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
assert codes == [0, 0, 0], codes
assert torch.equal(run(), want)
print("forked well", _native.has_torchs_threads())
"""


def test_a_forked_child_has_threads_of_its_own(team):
    assert run_python(SETUP + FORK.format(torchs=team == "torch's")) == f"forked well {team == TEAMS[0]}"


counts_threads = pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="threads are counted where Linux lists them"
)


@counts_threads
def test_a_sweep_between_torchs_operators_starts_no_thread():
    """Torch's operators leave their threads spinning for a while; others would find the cores taken."""
    need_torchs_threads()
    code = """
torchs = run()
after = count()
_native.use_torchs_threads(False)
print(torch.equal(torchs, run()), after - before, count() - after)
"""
    assert run_python(SETUP + COUNT + code) == "True 0 1"


@counts_threads
def test_a_runtime_that_gives_fewer_threads_is_not_waited_for():
    code = "want = run()\nprint(count() - before)\ntorch.set_num_threads(1)\nprint(torch.equal(run(), want))"
    assert run_python(SETUP + COUNT + code, OMP_THREAD_LIMIT="1").split() == ["1", "True"]


MEMORY = """
import threading, torch
from fused_rin import recurrence
torch.set_num_threads(1)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
pre, weight = torch.zeros(2, 1, 1, 1500), torch.zeros(1, 1500, 1500)
recurrence(pre, weight)
before, done, end = resident(), threading.Barrier(25), threading.Event()
def work():
    recurrence(pre, weight)
    done.wait()
    end.wait()
workers = [threading.Thread(target=work) for _ in range(24)]
for worker in workers:
    worker.start()
done.wait()
print(resident() - before)
end.set()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_that_have_called_keep_no_matrix_each():
    """24 living threads, a packed U of 9 MB: what is kept is bounded for the process, 64 MB, not for a thread."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 << 20
