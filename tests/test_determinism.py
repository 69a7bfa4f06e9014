"""Where two calls give the same bits: a test for each row of the table in docs/determinism.md."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from fused_rin import RIN, RINCell, cpu, recurrence
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import use_threads

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EXACT = DTYPES[:2]  # what a state is handed over in without rounding
HIDDEN = [5, 40, 129, 200]  # one vector and several, below and above 128
SETS = cpu.instruction_sets()

Pairs = Iterator[tuple[Tensor, Tensor]]
ROWS: dict[str, tuple[str, Callable[[], Pairs]]] = {}


def row(bits: str) -> Callable[[Callable[[], Pairs]], Callable[[], Pairs]]:
    """A row of the table: its name, what it says of the bits, and pairs of tensors to try it on.

    equal: all pairs have the same bits. differ: some do not, and all agree up to rounding. torch's: a matrix product of
    torch decides, so they agree up to rounding and no more is said.
    """

    def enter(function: Callable[[], Pairs]) -> Callable[[], Pairs]:
        ROWS[function.__name__.replace("_", "-")] = bits, function
        return function

    return enter


# ---- what is called ----


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(kind: type[RIN] | type[RINCell], *sizes: int, **options) -> RIN | RINCell:
    """States of some size that do not grow: radius of U 0.3, skip 0.5."""
    module = kind(*sizes, skip=0.5, **options)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i) * 0.3 / module.hidden_size**0.5)
    return module


def results(outputs: Sequence[Tensor], leaves: Iterable[Tensor]) -> list[Tensor]:
    """Outputs and gradients, those of the outputs being 1 less the output: the same for a sequence in any batch."""
    states = [out.detach() for out in outputs]
    return [*states, *torch.autograd.grad(outputs, list(leaves), [1 - out for out in states])]


def run_module(module: RIN | RINCell, x: Tensor, hx: Tensor | None = None, **rows) -> list[Tensor]:
    """Of a module: outputs, then the gradients of x and of all weights."""
    x = x.clone().requires_grad_()
    out = module(x, hx, **rows)
    return results(out if isinstance(out, tuple) else (out,), [x, *module.parameters()])


def run_recurrence(pre: Tensor, weight: Tensor, h0: Tensor, **options) -> list[Tensor]:
    """out, h_n, and the gradients of pre, h0 and U."""
    leaves = [t.clone().requires_grad_() for t in (pre, h0, weight)]
    return results(recurrence(leaves[0], leaves[2], leaves[1], skip=0.5, **options), leaves)


def problem(steps: int, batch: int, groups: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """pre, U, h0."""
    weight = draw(groups, hidden, hidden, dtype=torch.float64, seed=1) * 0.3 / hidden**0.5
    return draw(steps, batch, groups, hidden, dtype=dtype), weight.to(dtype), draw(batch, groups, hidden, dtype=dtype)


def every_set(dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[torch.dtype]:
    """Each dtype under each instruction set."""
    for name in SETS:
        with cpu.use_instruction_set(name):
            yield from dtypes


def over_threads(call: Callable[[], list[Tensor]]) -> Pairs:
    with use_threads(1):
        one = call()
    for threads in (2, 3):
        with use_threads(threads):
            yield from zip(call(), one, strict=True)


SEVERAL = [{"bidirectional": True}, {"num_heads": 2}, {"num_layers": 2}]

# ---- from run to run ----


def everything() -> list[Tensor]:
    """One of each: outputs and gradients of all ways that a call goes."""
    found = []
    for dtype in every_set():
        found += run_recurrence(*problem(20, 5, 2, 40, dtype), reverse=[False, True])
        found += run_recurrence(*problem(6, 3, 1, 20, dtype), backend="reference")
        for options in ({}, *SEVERAL):
            module, x = make(RIN, 7, 40, dtype=dtype, **options), draw(20, 5, 7, dtype=dtype)
            found += run_module(module, x)
            found += run_module(module, x, lengths=[20, 3, 0, 11, 20])
            found += run_module(module, x[:1])
            with torch.no_grad():
                found += module(x[:2, :1])
        found += run_module(make(RINCell, 7, 40, dtype=dtype), draw(9, 7, dtype=dtype))
    return found


def digest() -> str:
    sums = hashlib.sha256()
    for tensor in everything():
        sums.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


@row("equal")
def again() -> Pairs:
    first = everything()
    for _ in range(3):
        yield from zip(everything(), first, strict=True)


@row("equal")
def again_in_a_new_process() -> Pairs:
    code = "import torch; torch.set_num_threads(1); from tests.test_determinism import digest; print(digest())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield torch.tensor(list(bytes.fromhex(done.stdout.strip()))), torch.tensor(list(bytes.fromhex(digest())))


@row("equal")
def callers_at_once() -> Pairs:
    cases = [problem(60, 6, 1, hidden, dtype) for hidden, dtype in zip((40, 100, 129, 200), DTYPES, strict=True)]
    want, got = [run_recurrence(*case)[:4] for case in cases], {}
    with use_threads(2):
        workers = [
            threading.Thread(target=lambda i=i: got.update({i: [run_recurrence(*cases[i])[:4] for _ in range(10)]}))
            for i in range(len(cases))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for i, one in enumerate(want):
        for other in got[i]:
            yield from zip(other, one, strict=True)


# ---- threads ----


@row("equal")
def threads_recurrence() -> Pairs:
    for dtype in every_set():
        with use_threads(2):  # both ways to share the work, and the rows of several recurrences
            assert "share the outputs" in cpu.describe(50, 1, 1, 700, dtype)
            assert "each with sequences" in cpu.describe(200, 33, 1, 70, dtype)
            assert "each with sequences" in cpu.describe(200, 5, 3, 70, dtype)
        for case in (problem(50, 1, 1, 700, dtype), problem(200, 33, 1, 70, dtype), problem(200, 5, 3, 70, dtype)):
            yield from over_threads(lambda case=case: run_recurrence(*case)[:4])


@row("equal")
def threads_layer() -> Pairs:
    for dtype in every_set():
        for steps, batch, hidden, layers in ((40, 1, 300, 1), (30, 9, 70, 2), (20, 16, 129, 1)):
            module, x = make(RIN, 7, hidden, layers, dtype=dtype), draw(steps, batch, 7, dtype=dtype)
            yield from over_threads(lambda module=module, x=x: run_module(module, x))
        module, x = make(RIN, 7, 70, dtype=dtype), draw(30, 9, 7, dtype=dtype)
        ragged = {"lengths": [30, 7, 30, 0, 1, 22, 22, 30, 9]}
        yield from over_threads(lambda module=module, x=x, rows=ragged: run_module(module, x, **rows))


@row("equal")
def threads_several_recurrences() -> Pairs:
    for dtype in every_set():
        for options in SEVERAL[:2]:
            module, x = make(RIN, 7, 70, dtype=dtype, **options), draw(40, 9, 7, dtype=dtype)
            yield from over_threads(lambda module=module, x=x: run_module(module, x)[:2])


@row("equal")
def threads_a_few_steps() -> Pairs:
    for dtype in every_set():
        cell, module = make(RINCell, 300, 1100, dtype=dtype), make(RIN, 300, 1100, dtype=dtype)
        x = draw(4, 1, 300, dtype=dtype)
        with torch.no_grad():
            yield from over_threads(lambda cell=cell, x=x: [cell(x[0])])
            yield from over_threads(lambda module=module, x=x: list(module(x[:1])))
            if dtype in EXACT:
                yield from over_threads(lambda module=module, x=x: list(module(x)))


@row("equal")
def threads_flushing_denormals() -> Pairs:
    for dtype in every_set([torch.float32]):
        pre, weight, h0 = problem(60, 9, 1, 70, dtype)
        case = (pre * 1e-39, weight, h0 * 1e-37)
        with use_threads(4):
            run_recurrence(*case)  # now the threads are there, in a mode of their own
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor has no such mode")
        try:
            pairs = list(over_threads(lambda case=case: run_recurrence(*case)[:4]))
        finally:
            torch.set_flush_denormal(False)
        yield from ((a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


@row("torch's")
def threads_products_of_torch() -> Pairs:
    case = problem(200, 9, 1, 70, torch.float32)
    yield from over_threads(lambda: run_recurrence(*case)[4:])
    for options in SEVERAL[:2]:
        module, x = make(RIN, 7, 70, **options), draw(40, 9, 7)
        yield from over_threads(lambda module=module, x=x: run_module(module, x)[2:])
    module, x = make(RIN, 7, 200), draw(1, 16, 7)
    yield from over_threads(lambda: run_module(module, x))


@row("torch's")
def threads_reference() -> Pairs:
    case = problem(40, 9, 1, 70, torch.float32)
    yield from over_threads(lambda: run_recurrence(*case, backend="reference"))


# ---- the batch ----


def some(case: tuple[Tensor, ...], rows: slice, **options) -> list[Tensor]:
    """Of some sequences of a batch, put first: out, h_n, gradients of pre and h0."""
    pre, weight, h0 = case
    out, h_n, grad_pre, grad_h0, _ = run_recurrence(pre[:, rows], weight, h0[rows], **options)
    return [out.transpose(0, 1), h_n, grad_pre.transpose(0, 1), grad_h0]


def over_batches(call: Callable[[slice], list[Tensor]], parts: Sequence[slice]) -> Pairs:
    """A call on all sequences, and on some; tensors with the batch first."""
    whole = call(slice(None))
    for part in parts:
        yield from zip(call(part), (t[part] for t in whole), strict=True)


SOME = [slice(0, 2), slice(3, 9), slice(11, 13)]
ALONE = [slice(0, 1), slice(12, 13)]


@row("equal")
def batch_recurrence() -> Pairs:
    for dtype in every_set():
        for hidden in HIDDEN:
            case = problem(11, 13, 1, hidden, dtype)
            yield from over_batches(lambda part, case=case: some(case, part), SOME)
        # A matrix beyond the cache, whose blocks serve bands of rows.
        case = problem(3, 100, 1, 600, dtype)
        yield from over_batches(lambda part, case=case: some(case, part), SOME)


@row("equal")
def batch_of_one_below_128_units() -> Pairs:
    for dtype in every_set():
        for hidden in (1, 5, 40, 100, 127):
            case = problem(11, 13, 1, hidden, dtype)
            yield from over_batches(lambda part, case=case: some(case, part), ALONE)


@row("differ")
def batch_of_one_from_128_units() -> Pairs:
    for dtype in every_set(EXACT):
        for hidden in (128, 200):
            case = problem(11, 13, 1, hidden, dtype)
            yield from over_batches(lambda part, case=case: some(case, part), ALONE)


def some_of_module(module: RIN, x: Tensor, part: slice) -> list[Tensor]:
    """out, h_n and the gradient of x, the batch first."""
    return [t.transpose(0, 1) for t in run_module(module, x[:, part])[:3]]


@row("equal")
def batch_layer() -> Pairs:
    for dtype in every_set():
        for hidden in HIDDEN:
            for layers in (1, 2):
                module, x = make(RIN, 7, hidden, layers, dtype=dtype), draw(11, 13, 7, dtype=dtype)
                yield from over_batches(lambda part, module=module, x=x: some_of_module(module, x, part), SOME)
            # Rows and inputs that fill tiles of AMX: the input's product in the sums of its step, of parts beside them.
            module, x = make(RIN, 40, hidden, dtype=dtype), draw(11, 37, 40, dtype=dtype)
            yield from over_batches(lambda part, module=module, x=x: some_of_module(module, x, part), SOME)


@row("equal")
def batch_several_recurrences() -> Pairs:
    for dtype in every_set():
        for options in SEVERAL[:2]:
            module, x = make(RIN, 7, 70, dtype=dtype, **options), draw(11, 13, 7, dtype=dtype)
            yield from over_batches(lambda part, module=module, x=x: some_of_module(module, x, part)[:2], SOME)


@row("equal")
def batch_padding() -> Pairs:
    lengths = torch.tensor([11, 9, 9, 4, 1])
    for dtype in every_set():
        for hidden in HIDDEN:
            module, x = make(RIN, 7, hidden, dtype=dtype), draw(11, 5, 7, dtype=dtype)
            out, h_n, grad = run_module(module, x, lengths=lengths)[:3]
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
            packed_out, packed_h_n = module(packed)
            yield packed_h_n, h_n
            yield nn.utils.rnn.pad_packed_sequence(packed_out)[0], out
            # The same sequences to their own ends, in a batch of two: the second one is no padding to the first.
            for b, length in enumerate(lengths.tolist()):
                one = run_module(module, x[:length, [b, 0]])[:3] if length > 1 else None
                if one is not None:
                    yield one[0][:, 0], out[:length, b]
                    yield one[1][0, 0], h_n[0, b]
                    yield one[2][:, 0], grad[:length, b]


@row("equal")
def batch_a_few_steps() -> Pairs:
    for dtype in every_set():
        for hidden in HIDDEN:
            module, cell = make(RIN, 7, hidden, 2, dtype=dtype), make(RINCell, 7, hidden, dtype=dtype)
            x = draw(4, 4, 7, dtype=dtype)
            with torch.no_grad():
                for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
                    for one, whole in zip(module(x[:1, part].contiguous()), module(x[:1]), strict=True):
                        yield one, whole[:, part]
                    yield cell(x[0, part].contiguous()), cell(x[0])[part]
                    if dtype in EXACT:
                        yield module(x[:, part].contiguous())[0], module(x)[0][:, part]


@row("torch's")
def batch_products_of_torch() -> Pairs:
    x = draw(11, 13, 7)
    for module in (make(RIN, 7, 70), make(RIN, 7, 200)):  # one step under autograd
        yield from over_batches(lambda part, module=module: some_of_module(module, x[:1], part), [*SOME, *ALONE])
    for options in SEVERAL[:2]:  # the gradient of x
        module = make(RIN, 7, 70, **options)
        yield from over_batches(lambda part, module=module: some_of_module(module, x, part)[2:], [*SOME, *ALONE])


@row("torch's")
def batch_reference() -> Pairs:
    case = problem(11, 13, 1, 70, torch.float32)
    yield from over_batches(lambda part: some(case, part, backend="reference"), [*SOME, *ALONE])


@row("equal")
def recurrences_side_by_side() -> Pairs:
    for dtype in every_set():
        for batch, hidden in ((1, 200), (5, 40)):
            pre, weight, h0 = problem(11, batch, 3, hidden, dtype)
            whole = run_recurrence(pre, weight, h0, reverse=[False, True, True])[:4]
            for g in range(3):
                one = run_recurrence(pre[:, :, g : g + 1], weight[g : g + 1], h0[:, g : g + 1], reverse=g > 0)[:4]
                yield from zip(one, (t[..., g : g + 1, :] for t in whole), strict=True)


# ---- time ----

CUTS = [slice(0, 1), slice(1, 8), slice(8, 9), slice(9, 40)]


def cut_and_whole(case: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """out, h_n and the gradients of pre, h0 and U: of calls that hand the state on, and of one call."""
    pre, weight, h0 = leaves = [t.clone().requires_grad_() for t in case]
    state, outs = h0, []
    for cut in CUTS:
        out, state = recurrence(pre[cut], weight, state, skip=0.5)
        outs.append(out)
    parts = results((torch.cat(outs), state), (pre, h0, weight))
    return parts, run_recurrence(leaves[0].detach(), weight.detach(), h0.detach())


@row("equal")
def stream_recurrence() -> Pairs:
    for dtype in every_set(EXACT):
        for batch in (1, 2, 5):
            for hidden in HIDDEN:
                parts, whole = cut_and_whole(problem(40, batch, 1, hidden, dtype))
                yield from zip(parts[:4], whole[:4], strict=True)


@row("differ")
def stream_gradient_of_u() -> Pairs:
    for dtype in every_set(EXACT):
        parts, whole = cut_and_whole(problem(40, 5, 1, 40, dtype))
        yield parts[4], whole[4]


@row("differ")
def stream_in_16_bits() -> Pairs:
    for dtype in every_set(DTYPES[2:]):
        parts, whole = cut_and_whole(problem(40, 5, 1, 40, dtype))
        yield from zip(parts[:2], whole[:2], strict=True)


def stream(module: RIN, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """out and h_n of calls of some steps each."""
    h_n, outs = None, []
    for part in x.split(steps):
        out, h_n = module(part, h_n)
        outs.append(out)
    assert h_n is not None
    return torch.cat(outs), h_n


@row("equal")
def stream_layer() -> Pairs:
    for dtype in every_set(EXACT):
        for batch, steps in ((1, 20), (5, 4), (20, 2)):
            for options in ({}, *SEVERAL[1:]):
                for hidden in (40, 200):
                    module, x = make(RIN, 7, hidden, dtype=dtype, **options), draw(40, batch, 7, dtype=dtype)
                    with torch.no_grad():
                        yield from zip(stream(module, x, steps), module(x), strict=True)


@row("differ")
def stream_layer_by_a_few_steps() -> Pairs:
    for dtype in every_set(EXACT):
        for batch, steps in ((1, 1), (1, 8), (4, 4)):
            module, x = make(RIN, 7, 40, dtype=dtype), draw(40, batch, 7, dtype=dtype)
            with torch.no_grad():
                yield from zip(stream(module, x, steps), module(x), strict=True)


@row("equal")
def stream_a_few_steps_by_one() -> Pairs:
    for dtype in every_set():
        for hidden in HIDDEN:
            module, cell = make(RIN, 7, hidden, dtype=dtype), make(RINCell, 7, hidden, dtype=dtype)
            x = draw(5, 3, 7, dtype=dtype)
            with torch.no_grad():
                steps, h_n = stream(module, x, 1)
                if dtype in EXACT:
                    few, few_h_n = module(x)
                    yield steps, few
                    yield h_n, few_h_n
                h = None
                for t in range(5):
                    h = cell(x[t], h)
                    yield h, steps[t]


@row("equal")
def time_reversed() -> Pairs:
    for dtype in every_set():
        for batch, hidden in ((1, 200), (5, 40)):
            pre, weight, h0 = problem(11, batch, 1, hidden, dtype)
            back = run_recurrence(pre, weight, h0, reverse=True)
            flipped = run_recurrence(pre.flip(0), weight, h0)
            yield from ((a, b) for i, (a, b) in enumerate(zip(back[:4], flipped[:4], strict=True)) if i in (1, 3))
            for i in (0, 2):
                yield back[i], flipped[i].flip(0)


# ---- the form of a call ----


def elsewhere(tensor: Tensor) -> Tensor:
    """The same numbers, one place past where memory is aligned."""
    return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


@row("equal")
def form_memory() -> Pairs:
    for dtype in every_set():
        for batch, hidden in ((1, 200), (5, 40)):
            case = problem(11, batch, 1, hidden, dtype)
            want = run_recurrence(*case)[:4]
            yield from zip(run_recurrence(*map(elsewhere, case))[:4], want, strict=True)
            strided = (case[0].transpose(0, 1).contiguous().transpose(0, 1), *case[1:])
            yield from zip(run_recurrence(*strided)[:4], want, strict=True)
            module, x = make(RIN, 7, hidden, dtype=dtype), draw(20, batch, 7, dtype=dtype)
            first = make(RIN, 7, hidden, dtype=dtype, batch_first=True)
            out, h_n, grad, *rest = run_module(module, x)
            got = run_module(first, x.transpose(0, 1))
            yield from zip((got[0].transpose(0, 1), got[1], got[2].transpose(0, 1)), (out, h_n, grad), strict=True)
            yield from zip(got[3:], rest, strict=True)


@row("equal")
def form_gradients_asked_for() -> Pairs:
    for dtype in every_set():
        for options in ({}, *SEVERAL):
            module, x = make(RIN, 7, 40, dtype=dtype, **options), draw(20, 5, 7, dtype=dtype)
            trained = run_module(module, x)[:2]
            with torch.no_grad():
                yield from zip(module(x), trained, strict=True)


@row("differ")
def form_gradients_asked_for_of_a_few_steps() -> Pairs:
    for dtype in every_set(EXACT):
        module, x = make(RIN, 7, 40, dtype=dtype), draw(4, 2, 7, dtype=dtype)
        trained = run_module(module, x)[:2]
        with torch.no_grad():
            yield from zip(module(x), trained, strict=True)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@row("equal")
def form_operators_recurrence() -> Pairs:
    for dtype in every_set():
        for batch, hidden in ((1, 200), (5, 40)):
            case = problem(11, batch, 2, hidden, dtype)
            with Watching():
                watched = run_recurrence(*case)
            yield from zip(watched, run_recurrence(*case), strict=True)


@row("torch's")
def form_operators_layer() -> Pairs:
    module, x = make(RIN, 7, 40), draw(20, 5, 7)
    with Watching():
        watched = run_module(module, x)
    yield from zip(watched, run_module(module, x), strict=True)


# ---- the machine ----


@row("differ")
def instruction_sets() -> Pairs:
    if len(SETS) < 2:
        pytest.skip("one instruction set here")
    found = []
    for name in SETS:
        with cpu.use_instruction_set(name):
            found.append(run_recurrence(*problem(11, 5, 1, 70, torch.float32)))
    for other in found[1:]:
        yield from zip(other, found[0], strict=True)


# ---- the tests ----


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table(name):
    bits, pairs = ROWS[name]
    same, rough = [], []
    for got, want in pairs():
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert not got.is_floating_point() or got.isfinite().all()
        same.append(torch.equal(got, want))
        if not same[-1]:
            error = (got.double() - want.double()).abs().max().item()
            rough.append(error / (torch.finfo(got.dtype).eps * max(1.0, want.abs().max().item())))
    assert same
    if bits == "equal":
        assert all(same), f"{same.count(False)} of {len(same)} differ, by up to {max(rough)} last places"
    else:
        # In last places of the largest value; measured: at most 5, for a sum of 1,800 rows.
        assert max(rough, default=0.0) <= 16
        assert bits == "torch's" or not all(same)


LINE = re.compile(r"^\| `([a-z0-9-]+)` \| .* \| (equal|differ|torch's) \|", re.MULTILINE)


def test_the_table_has_a_row_for_each_test():
    text = (ROOT / "docs" / "determinism.md").read_text()
    assert LINE.findall(text) == [(name, bits) for name, (bits, _) in ROWS.items()]


def test_tests_that_the_text_names_are_there():
    """Those of other rooms, GPU ones among them, by file and function."""
    text = (ROOT / "docs" / "determinism.md").read_text()
    named = re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", text)
    assert named
    for file, function in named:
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), f"{file}::{function}"
