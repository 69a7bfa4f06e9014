"""Calls from Python at their worst, each result compared bit for bit with that of a lone call on one thread.

    python -m tests.sanitize.calls SCENARIO... [--rounds N] [--threads-in-children N] [--quiet-forks]

in one process. Ends with exit code 0 if all results were as alone. `--rounds` is how often each scenario is gone
through. ThreadSanitizer's runtime cannot start threads in a child of a process that has some: there
`--threads-in-children 1`. AddressSanitizer's (GCC 12's) leaves a child with a locked allocator if another thread asked
for memory just as it forked: there `--quiet-forks`, with which no other thread is in a call then.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
from fused_rin import RIN, RINCell, _native, cpu
from torch import Tensor

from tests.conftest import make_case

CHILD_SECONDS = 120  # an alarm ends a child that hangs
threads_in_children, quiet_forks = 2, False


def numbers(*tensors: Tensor) -> tuple[bytes, ...]:
    """Without an operator that torch would run on several threads, which a forked child does not have."""
    return tuple(bytes(t.detach().contiguous().view(torch.uint8).numpy().data) for t in tensors)


class Probe:
    """A call that anyone may make at any time, and what it gave alone."""

    def __init__(self, name: str, run: Callable[[], tuple[bytes, ...]]) -> None:
        self.name, self.run = name, run
        self.alone = run()

    def check(self) -> None:
        if self.run() != self.alone:
            raise AssertionError(f"{self.name}: other bits than alone")


def _layer(inputs: int, hidden: int, steps: int, batch: int, **options: object) -> Callable[[], tuple[bytes, ...]]:
    """Forward and backward through autograd, on one module and one input for all."""
    module = RIN(inputs, hidden, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3 / hidden**0.5)
    x = torch.randn(steps, batch, inputs, dtype=module.weight_ih_l0.dtype).requires_grad_()
    grad = torch.randn(steps, batch, hidden, dtype=x.dtype)

    def run() -> tuple[bytes, ...]:
        out, h_n = module(x)
        return numbers(out, h_n, *torch.autograd.grad(out, [x, *module.parameters()], grad))

    return run


def _sweeps(**options: object) -> Callable[[], tuple[bytes, ...]]:
    """The bare recurrence and its gradient, without autograd: also in a child of which torch does not know."""
    case = make_case(40, 12, 37, 3, num_reversed=1, **options)  # type: ignore[arg-type]

    def run() -> tuple[bytes, ...]:
        out, h_n = cpu.forward(*case.arguments)
        return numbers(out, h_n, *cpu.backward(out, h_n, case.weight, out, case.rows, case.rule))

    return run


def _step() -> Callable[[], tuple[bytes, ...]]:
    cell = RINCell(64, 1024).requires_grad_(False)
    x, h = torch.randn(3, 64), torch.randn(3, 1024)
    return lambda: numbers(cell(x, h))


def make_probes() -> list[Probe]:
    """Of which threads share rows of all layouts, outputs, the outputs of a step, and nothing."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    probes = [
        Probe("layer, rows", _layer(16, 48, 60, 24)),
        Probe("layer, outputs", _layer(8, 512, 12, 1)),
        Probe("layer, bfloat16", _layer(9, 40, 20, 33, dtype=torch.bfloat16)),
        Probe("sweeps, packed", _sweeps(layout="packed", resets=True)),
        Probe("sweeps, lengths", _sweeps(layout="lengths", dtype=torch.float64)),
        Probe("step", _step()),
    ]
    torch.set_num_threads(2)
    _native.assume_processors(2)
    return probes


@contextlib.contextmanager
def workers(*bodies: Callable[[], None]) -> Iterator[None]:
    """Each body again and again in a thread of its own while the context lasts; what one of them raises is raised."""
    stop, errors = threading.Event(), []

    def work(body: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def caller(probes: list[Probe], seed: int, change: Callable[[random.Random], None] = lambda draw: None):
    draw = random.Random(seed)

    def body() -> None:
        change(draw)
        draw.choice(probes).check()

    return body


def in_a_child(body: Callable[[], None]) -> None:
    """Forks, and raises if `body` does there, or hangs."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(CHILD_SECONDS)
            body()
            code = 0
        except BaseException as error:
            print(f"in a child: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        raise AssertionError(f"a child ended with {code}")


def all_in_a_child(probes: list[Probe]) -> None:
    def body() -> None:
        torch.set_num_threads(threads_in_children)
        for probe in probes:
            if not probe.name.startswith("layer"):  # autograd's threads are not there; the forward pass is
                probe.check()

    in_a_child(body)


# ---- scenarios


def forks_before_the_first_call(rounds: int) -> None:
    """A process that has imported everything and called nothing; children of it make the first call."""

    def body() -> None:
        for probe in make_probes():
            torch.set_num_threads(threads_in_children)
            probe.check()

    for _ in range(min(rounds, 3)):
        in_a_child(body)


def exits_during_a_call(rounds: int) -> None:
    """The main thread returns while a daemon thread is in a call, which ends before or after the process does.

    The native call alone: a thread that is just then in an operator of torch aborts the process (until Python 3.14).
    """

    def body(number: int) -> None:
        steps, batch, hidden = 200 * (1 + number % 10), 16, 256
        pre, weight = torch.randn(steps, batch, 1, hidden), torch.randn(1, hidden, hidden) / 100
        out, h_n = torch.empty_like(pre), torch.empty(batch, 1, hidden)
        tensors = (weight.data_ptr(), pre.data_ptr(), 0, 0, out.data_ptr(), h_n.data_ptr())
        sizes, rule = (steps, batch, 1, hidden), (0, 1, False, 1.0, 0)
        begun = threading.Event()

        for tensor in (pre, weight, out, h_n):  # for ever: to free one, torch lets go of Python's lock, too
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))

        def call() -> None:
            begun.set()
            _native.sweep(sizes, rule, (0, 0, 0), tensors, threads_in_children, "")

        threading.Thread(target=call, daemon=True).start()
        begun.wait()
        time.sleep(0.002 * (number % 7))

    for number in range(4 * rounds):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            signal.alarm(CHILD_SECONDS)
            torch.set_num_threads(threads_in_children)
            body(number)
            sys.exit(0)  # as a program ends, not os._exit
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != 0:
            raise AssertionError(f"a process that ended during a call ended with {code}")


def many_threads(rounds: int) -> None:
    """Several Python threads on one module, while everything that may change between calls changes during calls."""
    probes = make_probes()
    every = os.sched_getaffinity(0)

    def change_own(draw: random.Random) -> None:
        torch.set_num_threads(draw.randint(1, 3))
        os.sched_setaffinity(0, {draw.choice(sorted(every))} if draw.random() < 0.3 else every)

    def change_all() -> None:
        torch.set_num_threads(random.randint(1, 3))
        _native.assume_processors(random.randint(0, 3))
        _native.end_teams_at(random.choice([0, 0, 1, 5]))
        _native.use_torchs_threads(random.random() < 0.5)
        random.choice([_native.found_crowded, _native.forget_crowds])()
        time.sleep(0.001)

    with workers(*(caller(probes, seed, change_own) for seed in range(3)), change_all):
        time.sleep(0.4 * rounds)
    _native.end_teams_at(0)
    _native.use_torchs_threads(True)
    _native.forget_crowds()
    _native.assume_processors(2)
    for threads in (1, 2, 3, 2, 1):  # and between the calls of one thread
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, {min(every)} if threads == 3 else every)
        for probe in probes:
            probe.check()
    os.sched_setaffinity(0, every)


class _Within(torch.autograd.Function):
    """The identity, whose backward pass calls what it is given."""

    @staticmethod
    def forward(ctx, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return grad, None


def nested_calls(rounds: int) -> None:
    """A backward pass within a backward pass, from a function and from a hook, alone and beside other threads."""
    probes = make_probes()
    module = RIN(5, 30)
    x = torch.randn(7, 3, 5)

    def body() -> None:
        @torch.enable_grad()  # a backward pass turns it off
        def within(*grad: Tensor) -> None:
            for probe in probes[:4]:
                probe.check()

        leaf = x.clone().requires_grad_()
        out, _ = module(_Within.apply(leaf, within))
        out.register_hook(within)
        torch.autograd.grad(out.sum(), [leaf, *module.parameters()])

    for _ in range(rounds):
        body()
        with workers(caller(probes, 1), body):
            time.sleep(0.3)


def exceptions(rounds: int) -> None:
    """Bad calls in one thread, memory that is not to be had, and signals in the main thread, while others work."""
    probes = make_probes()
    module = RIN(5, 30)

    def expect(kind: type[BaseException], call: Callable[[], object]) -> None:
        try:
            call()
        except kind:
            return
        raise AssertionError(f"no {kind.__name__}")

    def bad() -> None:
        expect(RuntimeError, lambda: module(torch.randn(4, 2, 6)))
        expect(ValueError, lambda: module(torch.randn(4, 2, 5).double()))
        expect(ValueError, lambda: _native.plan((1, 1, 1, 4), 0, 0, 1, "abacus"))
        # 16 TB for a matrix, before a single number is read: there are no tensors.
        nothing = (0, 0, 0, 0, 0, 0)
        expect(
            MemoryError,
            lambda: _native.sweep((1, 1, 1, 1 << 21), (0, 1, False, 1.0, 0), (0, 0, 0), nothing, 2, ""),
        )
        time.sleep(0.001)

    class Rung(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Rung

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with workers(caller(probes, 1), caller(probes, 2), bad):
            for i in range(20 * rounds):
                with contextlib.suppress(Rung, KeyboardInterrupt):
                    if i % 4:
                        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 5e-3))
                    else:
                        threading.Timer(0.002, signal.raise_signal, (signal.SIGINT,)).start()
                    try:
                        for probe in probes:
                            probe.check()
                        time.sleep(0.02)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    for probe in probes:
        probe.check()


class _CallingDataset(torch.utils.data.Dataset):
    """An item is whether a call in the worker gave what it gave in the parent."""

    def __init__(self, probes: list[Probe]) -> None:
        self.probes = probes

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> bool:
        torch.set_num_threads(threads_in_children)
        self.probes[-1 - index % 3].check()
        return True


def forks_after_calls(rounds: int) -> None:
    """After a call, while other threads are in calls, from a thread, and as a DataLoader does."""
    probes = make_probes()
    for team in (True, False):
        _native.use_torchs_threads(team)
        for probe in probes:
            probe.check()
        all_in_a_child(probes)
    _native.use_torchs_threads(True)
    errors: list[BaseException] = []

    def fork() -> None:
        try:
            all_in_a_child(probes)
        except BaseException as error:
            errors.append(error)

    with workers(*([] if quiet_forks else [caller(probes, 1), caller(probes, 2)])):
        for _ in range(3 * rounds):
            all_in_a_child(probes)
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
    if errors:
        raise errors[0]
    if threads_in_children > 1:  # its workers start some
        dataset = _CallingDataset(probes)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=CHILD_SECONDS
        )
        if [bool(item) for item in loader] != [True] * len(dataset):
            raise AssertionError("a worker's item is missing")
    for probe in probes:
        probe.check()


def no_more_threads(rounds: int) -> None:
    """A process without room for another thread's stack: a call goes on with what threads there are, its own.

    Not under a sanitizer, whose own tables are beyond any limit.
    """
    probes = make_probes()
    _native.use_torchs_threads(False)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20), before[1]))  # a stack takes 8 MB
    try:
        try:
            threading.Thread(target=int).start()
        except RuntimeError:
            pass
        else:
            raise AssertionError("threads are still to be had")
        for probe in probes:
            probe.check()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    for probe in probes:
        probe.check()


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        forks_before_the_first_call, exits_during_a_call, many_threads, nested_calls, exceptions, forks_after_calls,
        no_more_threads,
    )
}  # fmt: skip


def main() -> None:
    global threads_in_children, quiet_forks
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads-in-children", type=int, default=threads_in_children)
    parser.add_argument("--quiet-forks", action="store_true")
    arguments = parser.parse_args()
    threads_in_children, quiet_forks = arguments.threads_in_children, arguments.quiet_forks
    for name in arguments.scenarios:
        begin = time.monotonic()
        SCENARIOS[name](arguments.rounds)
        print(f"{name}: as alone, {time.monotonic() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
