"""The sliced plan with several programs, which Triton's interpreter alone would run one after the other.

Here every program of a grid gets a thread, and a seeded scheduler passes a baton between them before each access to
memory. The kernel, its barrier and its exchange buffers run as they are written. One thread runs at a time, so memory
is sequentially consistent: what is proved is the protocol, not the hardware's memory ordering (for which
tests/triton_aot reads the PTX).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from fused_rin import reference
from fused_rin.triton_kernels import Plan, backward, forward, sweep
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

from tests.conftest import Case, check_sweeps, make_case

MEMORY_ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_rmw")


class Deadlock(Exception):
    pass


class Program(threading.Thread):
    """One program of a grid. It runs only between `go` and the next release of the scheduler's baton."""

    def __init__(self, body: Callable[[], None], schedule: Schedule) -> None:
        super().__init__(daemon=True)
        self.body, self.schedule = body, schedule
        self.go = threading.Semaphore(0)
        self.done = False

    def run(self) -> None:
        self.go.acquire()
        try:
            if self.schedule.error is None:  # else another has failed before this one began
                self.body()
        except BaseException as e:
            self.schedule.error = self.schedule.error or e
        self.done = True
        self.schedule.baton.release()

    def pause(self) -> None:
        index = interpreter_builder.grid_idx
        self.schedule.baton.release()
        self.go.acquire()
        if self.schedule.error is not None:
            raise SystemExit
        interpreter_builder.grid_idx = index


class Schedule:
    """Runs the programs of a grid side by side, switching at random wherever one touches memory."""

    def __init__(self, seed: int, patience: int = 10_000) -> None:
        self.random = random.Random(seed)
        self.patience = patience
        self.baton = threading.Semaphore(0)
        self.error: BaseException | None = None

    def run(self, bodies: list[Callable[[], None]]) -> None:
        alive = [Program(body, self) for body in bodies]
        for program in alive:
            program.start()
        # Some seeds let one program run for long stretches, as when another starts late or is held up.
        stay = self.random.choice([0.0, 0.5, 0.95])
        running = alive[0]
        for _ in range(self.patience):
            if running.done or self.random.random() >= stay:
                running = self.random.choice(alive)
            running.go.release()
            self.baton.acquire()
            alive = [program for program in alive if not program.done]
            if not alive or self.error is not None:
                break
        if alive and self.error is None:
            self.error = Deadlock(f"{len(alive)} programs never came through the barrier")
        for program in alive:
            program.go.release()
            program.join()
        if self.error is not None:
            raise self.error


@contextmanager
def side_by_side(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[list[int]]:
    """Within it, the interpreter runs the programs of a grid under a Schedule. Yields the grids' sizes."""
    sizes: list[int] = []
    call = GridExecutor.__call__
    set_grid_idx = InterpreterBuilder.set_grid_idx

    def call_together(executor, *args, **kwargs):
        kernel, bodies = executor.fn, []

        def collect(builder, *index):
            """Called before each program: the first time, put a collector in the kernel's place."""
            set_grid_idx(builder, *index)
            executor.fn = lambda **arguments: add(index, arguments)

        def add(index, arguments):
            def body():
                set_grid_idx(interpreter_builder, *index)
                kernel(**arguments)

            bodies.append(body)
            x, y, z = interpreter_builder.grid_dim
            if len(bodies) == x * y * z:
                sizes.append(len(bodies))
                Schedule(seed).run(bodies)

        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "set_grid_idx", collect)
            try:
                call(executor, *args, **kwargs)
            finally:
                executor.fn = kernel

    with monkeypatch.context() as patch:
        for name in MEMORY_ACCESSES:
            patch.setattr(InterpreterBuilder, name, _pausing(getattr(InterpreterBuilder, name)))
        patch.setattr(GridExecutor, "__call__", call_together)
        yield sizes


def _pausing(access: Callable) -> Callable:
    def paused(*args, **kwargs):
        me = threading.current_thread()
        if isinstance(me, Program):
            me.pause()
        return access(*args, **kwargs)

    return paused


def slices_of_16(hidden: int, matrix: str, wave: int) -> Plan:
    tile_k = 16 if matrix == "streamed" else -(-hidden // 32) * 16
    return Plan("sliced", 16, 16, 2, tile_k, -(-hidden // 16), 4, matrix, "ieee", 0, wave)


def check(case: Case, plan: Plan) -> None:
    check_sweeps(partial(forward, plan=plan), partial(backward, plan=plan), case)


def run_forward(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(*case.arguments, plan=slices_of_16(40, "registers", 1))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("matrix", ["registers", "streamed"])
def test_slices_meet_under_any_schedule(matrix: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(3, 18, 40, 2, num_reversed=1, seed=seed)
    with side_by_side(monkeypatch, seed) as sizes:
        check(case, slices_of_16(40, matrix, wave=4))
    assert set(sizes) == {12}  # 3 slices, 2 batch tiles, 2 recurrences


def test_waves_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs at a time than there are tiles, with lengths, resets and a 16-bit exchange."""
    options = {"dtype": torch.float16, "layout": "lengths", "resets": True, "num_reversed": 1, "activation": "tanh"}
    with side_by_side(monkeypatch, 1) as sizes:
        check(make_case(4, 18, 33, 2, **options), slices_of_16(33, "registers", wave=3))
    assert sizes == [9, 3] * 4  # forward, and backward with either or both gradients


@pytest.mark.parametrize("seed", range(3))
def test_every_schedule_gives_the_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(4, 3, 40)
    with side_by_side(monkeypatch, 100):
        expected = run_forward(case)
    with side_by_side(monkeypatch, seed):
        got = run_forward(case)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of five schedules, how many gave a wrong forward sweep."""
    case = make_case(6, 2, 40)
    exact = reference.forward(*case.arguments)[0]
    wrong = 0
    for seed in range(5):
        with side_by_side(monkeypatch, seed):
            out = run_forward(case)[0]
        wrong += not torch.allclose(out, exact, rtol=1e-4, atol=1e-4)
    return wrong


def test_without_the_barrier_the_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedules are harsh enough to notice."""
    assert _wrong_numbers(monkeypatch) == 0
    monkeypatch.setattr(sweep, "_meet", lambda p_arrived, expected: None)
    assert _wrong_numbers(monkeypatch) >= 3


def test_a_barrier_that_lets_one_through_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    meet = sweep._meet
    monkeypatch.setattr(sweep, "_meet", lambda p_arrived, expected: meet(p_arrived, expected - 1))
    assert _wrong_numbers(monkeypatch) >= 1


def test_a_barrier_that_waits_for_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    meet = sweep._meet
    monkeypatch.setattr(sweep, "_meet", lambda p_arrived, expected: meet(p_arrived, expected + 1))
    with side_by_side(monkeypatch, 0), pytest.raises(Exception, match="never came through"):
        run_forward(make_case(2, 2, 40))
