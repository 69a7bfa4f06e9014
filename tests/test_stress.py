"""Numbers under stress: long, growing, vanishing and many; against closed forms, float64 and torch.nn.RNN."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator

import pytest
import torch
from fused_rin import RIN, RINCell, cpu, explain, recurrence, reference
from fused_rin.problem import ALL_ROWS, Rule
from torch import Tensor, nn

from tests.conftest import assert_within, check_sweeps, make_case, use_threads

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# ---- a million steps ----

MILLION = 1_000_000


def shift(hidden: int) -> Tensor:
    """U of h_t[i] = act(h_{t-1}[i - 1] + pre_t[i]) with skip = 1: a cyclic shift less the identity."""
    return (torch.eye(hidden).roll(1, 0) - torch.eye(hidden))[None]


def reflected_walk(pre: Tensor, shifted: bool = True) -> tuple[Tensor, Tensor]:
    """(states, gradient of pre from ones) of that recurrence, or of U = 0, with ReLU, T x D, without a loop.

    In axes that are shifted along a unit meets itself: a random walk that is kept from falling below 0 is the walk less
    its lowest value so far, and the gradient counts the steps until the next 0. Integers, exact in every order of sums.
    """
    steps, hidden = pre.shape
    index = (torch.arange(hidden) + torch.arange(steps)[:, None] * shifted) % hidden
    walk = pre.double().gather(1, index).cumsum(0)
    walk -= walk.cummin(0).values.clamp(max=0)
    time = torch.arange(steps)[:, None]
    stops = torch.where(walk == 0, time, steps).flip(0).cummin(0).values.flip(0)
    grads = (stops - time).double()
    return torch.empty_like(walk).scatter_(1, index, walk), torch.empty_like(grads).scatter_(1, index, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_million_steps_of_a_walk_are_exact(dtype):
    """A carried state rounded to 16 bits, or a sum that drifts, would be off by far more than nothing.

    Where a product takes pairs of bfloat16 it takes the state rounded, and U is 0: the skip alone carries it.
    """
    shifted = "pairs of bfloat16" not in cpu.describe(MILLION, 1, 1, 5, dtype)
    pre = torch.randint(-1, 2, (MILLION, 5)).to(dtype)
    exact, exact_grad = reflected_walk(pre, shifted)
    assert exact.max() > 512  # past what bfloat16 counts to
    assert (exact == 0).any()
    leaves = [t.requires_grad_() for t in (pre[:, None, None].clone(), shift(5).to(dtype) * shifted)]
    out, h_n = recurrence(*leaves)
    assert torch.equal(out[:, 0, 0], exact.to(dtype))
    assert torch.equal(h_n[0, 0], exact[-1].to(dtype))
    grad_pre, grad_weight = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert torch.equal(grad_pre[:, 0, 0], exact_grad.to(dtype))
    entered, moved = out.detach()[:-1, 0, 0], grad_pre[1:, 0, 0]
    assert_within("dU", grad_weight[0], moved.T @ entered, moved.double().T @ entered.double(), 3, MILLION)


def test_a_million_steps_of_a_layer_are_exact():
    """The same walk, its steps fed in as the input of a layer: chunks of steps, each way."""
    x = torch.randint(-1, 2, (MILLION, 5)).float()
    exact, exact_grad = reflected_walk(x)
    module = RIN(5, 5)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(5))
        module.weight_hh_l0.copy_(shift(5)[0])
    x.requires_grad_()
    out, h_n = module(x)
    assert torch.equal(out.double(), exact)
    assert torch.equal(h_n[0], out[-1])
    grads = torch.autograd.grad(out, [x, *module.parameters()], torch.ones_like(out))
    assert torch.equal(grads[0].double(), exact_grad)
    moved, entered = exact_grad.float(), torch.cat([torch.zeros(1, 5), exact.float()[:-1]])
    for name, got, left in (("dU", grads[2], entered), ("dW", grads[1], x.detach())):
        assert_within(name, got, moved.T @ left, moved.double().T @ left.double(), 3, MILLION)
    assert_within("db", grads[3], moved.sum(0), moved.double().sum(0), 3, MILLION)


def loop_of_two(pre: list[list[float]], u: list[list[float]], skip: float) -> tuple[list, list]:
    """(states, gradient of pre from ones) of two units with tanh, in Python's own float64."""
    (a, b), (c, d) = u
    h, k = 0.0, 0.0
    states = []
    for p, q in pre:
        h, k = math.tanh(p + a * h + b * k + skip * h), math.tanh(q + c * h + d * k + skip * k)
        states.append((h, k))
    e, f = 0.0, 0.0
    grads = []
    for h, k in reversed(states):
        x, y = (1 + e) * (1 - h * h), (1 + f) * (1 - k * k)
        e, f = a * x + c * y + skip * x, b * x + d * y + skip * y
        grads.append((x, y))
    return states, grads[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_million_steps_do_not_add_up_errors(dtype):
    """Against a loop in Python, not in this package; a few last places at step 1 and at step 1,000,000."""
    pre = torch.randn(MILLION, 2).to(dtype)
    u = torch.tensor([[0.25, -0.5], [0.375, -0.125]], dtype=dtype)
    states, grads = loop_of_two(pre.tolist(), u.tolist(), 0.5)
    leaf = pre[:, None, None].clone().requires_grad_()
    out, _ = recurrence(leaf, u[None], skip=0.5, activation="tanh")
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    eps = torch.finfo(dtype).eps
    assert (out[:, 0, 0].double() - torch.tensor(states, dtype=torch.float64)).abs().max() <= 16 * eps
    exact = torch.tensor(grads, dtype=torch.float64)
    assert (grad[:, 0, 0].double() - exact).abs().max() <= 64 * eps * exact.abs().max()


# ---- growth to Inf and to NaN ----


def growing(steps: int, batch: int, hidden: int, dtype: torch.dtype, activation: str):
    """Positive states that grow some 30-fold a step, and a last unit with a sum of both signs.

    Below the largest number no order of a sum overflows and another does not. Above it all units are Inf at once, the
    last one Inf - Inf a step later, and then all are NaN.
    """
    case = make_case(steps, batch, hidden, dtype=torch.float64, skip=0.5, activation=activation)
    weight = case.weight.abs() * 60 / case.weight.abs().sum(-1, keepdim=True)
    weight[0, -1] = torch.linspace(-0.5, 0.5, hidden) / hidden
    case.weight, case.pre, case.h0 = weight, case.pre.abs(), case.h0.abs() + 1
    return case.to(dtype)


def kinds(tensor: Tensor) -> Tensor:
    """0 for finite, 1 for Inf, -1 for -Inf, 2 for NaN."""
    return torch.where(tensor.isnan(), 2, torch.where(tensor.isinf(), tensor.sign(), 0)).int()


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "hidden"), [(3, 5), (1, 40), (7, 40), (1, 160), (2, 160)])
def test_growth_ends_at_the_step_of_the_reference(isa, batch, hidden, dtype, activation):
    steps = 200 if dtype == torch.float64 else 30
    case = growing(steps, batch, hidden, dtype, activation)
    got, want = cpu.forward(*case.arguments), reference.forward(*case.arguments)
    assert [int(n) for n in kinds(want[0]).unique()] == [0, 1, 2]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(kinds(a), kinds(b))
    # On the way back the states are ones and the gradient grows.
    out, grad = torch.ones_like(case.pre), torch.ones_like(case.pre)
    got, want = (f(grad, None, case.weight, out, case.rows, case.rule) for f in (cpu.backward, reference.backward))
    assert [int(n) for n in kinds(want[0]).unique()][-1] == 2
    for a, b in zip(got, want, strict=True):
        assert torch.equal(kinds(a), kinds(b))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch", [1, 9])
def test_a_module_grows_to_inf_and_nan_as_nn_rnn(batch, layers):
    """Whole, and one step at a time."""
    case = growing(30, batch, 20, torch.float32, "relu")
    theirs = nn.RNN(20, 20, layers, nonlinearity="relu").requires_grad_(False)
    for name, weight in theirs.named_parameters():
        weight.copy_(case.weight[0] if "weight_hh" in name else 0.01 * torch.rand_like(weight))
    ours = RIN(20, 20, layers, skip=0.0).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    x, h = case.pre[:, :, 0], case.h0[None, :, 0].expand(layers, -1, -1).contiguous()
    want = theirs(x, h)
    assert [int(n) for n in kinds(want[0]).unique()] == [0, 1, 2]
    for a, b in zip(ours(x, h), want, strict=True):
        assert torch.equal(kinds(a), kinds(b))
    for t in range(30):
        out, h = ours(x[t : t + 1], h)
        assert torch.equal(kinds(out), kinds(want[0][t : t + 1]))


def test_the_gradient_of_a_finite_call_can_be_infinite():
    """Growth that ends just below the largest number; its gradient of the first step is beyond it, as in torch."""
    leaves = {}
    for backend in ("cpu", "reference"):
        pre = torch.zeros(60, 2, 1, 1).index_fill_(0, torch.tensor([0]), 1e-30).requires_grad_()
        weight = torch.full((1, 1, 1), 10.0).requires_grad_()
        out, _ = recurrence(pre, weight, skip=0.0, backend=backend)
        assert out.isfinite().all()
        leaves[backend] = torch.autograd.grad(out.sum(), (pre, weight))
    assert kinds(leaves["cpu"][0][0]).eq(1).all()
    for a, b in zip(leaves["cpu"], leaves["reference"], strict=True):
        assert torch.equal(kinds(a), kinds(b))


# ---- float16 past 65,504 ----


def test_an_output_past_float16_does_not_end_the_sequence(isa):
    """The state is carried in float32: it shows as Inf while it is out of range, and comes back; so does its gradient.

    torch rounds every state to float16, and from an Inf there is no way back.
    """
    pre = torch.tensor([20000.0] * 5 + [-20000.0] * 4).half()[:, None, None, None].expand(9, 2, 1, 17)
    exact = pre.double().cumsum(0)
    leaf, weight = pre.clone().requires_grad_(), torch.zeros(1, 17, 17).half()
    out, h_n = recurrence(leaf, weight)
    assert torch.equal(out, exact.half())
    assert out[:, 0, 0, 0].isinf().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert torch.equal(h_n, exact[-1].half())
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert torch.equal(grad[:, 0, 0, 0], torch.arange(9.0, 0, -1).half())
    rounded, _ = recurrence(pre, weight, backend="reference")
    assert not rounded[3:].isfinite().any()


def test_a_state_handed_over_in_float16_does_not_come_back(isa):
    """Between calls there is nothing but float16: a stream of single steps overflows as torch does."""
    x = torch.tensor([20000.0] * 5 + [-20000.0] * 4).half()
    for module in (RIN(1, 9, dtype=torch.float16), RINCell(1, 9, dtype=torch.float16)):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.fill_(float("weight_ih" in name))
            h = torch.zeros(1, 9).half()
            seen = []
            for value in x:
                h = module(value.view(1, 1), h)
                h = h if isinstance(h, Tensor) else h[1]
                seen.append(h.isfinite().any().item())
        assert seen == [True] * 3 + [False] * 6


# ---- denormal numbers ----


@contextlib.contextmanager
def flushed(flush: bool) -> Iterator[None]:
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor has no such mode")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def halving(module: nn.Module, start: float) -> None:
    """Makes h_t = h_{t-1} / 2 + start * x_t of an RNN."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.zero_()
            if "weight" in name:
                parameter.fill_diagonal_(start if "ih" in name else 0.5)


@pytest.mark.parametrize("flush", [False, True], ids=["kept", "flushed"])
@pytest.mark.parametrize(("batch", "hidden"), [(1, 5), (1, 200), (9, 40)])
def test_denormal_states_are_torchs(isa, batch, hidden, flush):
    """From 2^-120 down, one bit a step: to 2^-149 and then 0, or with denormals flushed to 2^-126 and then 0."""
    x = torch.zeros(40, batch, hidden)
    x[0] = 1
    ours, theirs = RIN(hidden, hidden, skip=0.0), nn.RNN(hidden, hidden, nonlinearity="relu")
    for module in (ours, theirs):
        halving(module, 2.0**-120)
    ours.requires_grad_(False)
    powers = [2.0 ** -(120 + t) if t <= (6 if flush else 29) else 0.0 for t in range(40)]
    bits = torch.tensor(powers).view(torch.int32)  # read as numbers, denormals would be 0 where they are flushed
    with flushed(flush):
        whole, want = ours(x)[0], theirs(x)[0]
        h, steps = None, []
        for t in range(40):
            out, h = ours(x[t : t + 1], h)
            steps.append(out)
        pre = (x * 2.0**-120)[:, :, None].requires_grad_()
        swept, _ = recurrence(pre, ours.weight_hh_l0[None], skip=0.0)
        # Backwards likewise, from the last step: the units of the first 30 steps run, the others stopped.
        ones = torch.zeros_like(swept)
        ones[-1] = 2.0**-120
        grad, _ = cpu.backward(ones, None, ours.weight_hh_l0[None], torch.ones_like(swept), ALL_ROWS, Rule(0.0))
    for got in (whole, want, torch.cat(steps), swept[:, :, 0].detach(), grad[:, :, 0].flip(0)):
        assert torch.equal(got.view(torch.int32), bits[:, None, None].expand(40, batch, hidden))


@pytest.mark.parametrize("flush", [False, True], ids=["kept", "flushed"])
def test_a_skip_down_to_denormal_numbers(isa, flush):
    """The state times the skip, past U, with units that a vector does not fill."""
    h0 = torch.full((3, 1, 19), 2.0**-120)
    pre, weight = torch.zeros(40, 3, 1, 19), torch.zeros(1, 19, 19)
    with flushed(flush):
        out, _ = recurrence(pre, weight, h0, skip=0.5)
    powers = [2.0 ** -(121 + t) if t < (6 if flush else 29) else 0.0 for t in range(40)]
    bits = torch.tensor(powers).view(torch.int32)
    assert torch.equal(out[:, :, 0].view(torch.int32), bits[:, None, None].expand(40, 3, 19))


@pytest.mark.parametrize("flush", [False, True], ids=["kept", "flushed"])
def test_denormal_float16_numbers_are_no_denormal_sums(isa, flush):
    """2^-24, the least of float16, is an ordinary number of the float32 that sums are made in: never flushed."""
    h0 = torch.full((3, 1, 19), 2.0**-10).half()
    pre, weight = torch.zeros(20, 3, 1, 19).half(), torch.zeros(1, 19, 19).half()
    with flushed(flush):
        out, _ = recurrence(pre, weight, h0, skip=0.5)
        again, _ = recurrence(out, weight, skip=0.0)
    powers = torch.tensor([2.0 ** -(11 + t) if t < 14 else 0.0 for t in range(20)]).half()
    for got in (out, again):
        assert torch.equal(got[:, :, 0], powers[:, None, None].expand(20, 3, 19))


@pytest.mark.parametrize("flush", [False, True], ids=["kept", "flushed"])
@pytest.mark.parametrize(("batch", "hidden"), [(1, 520), (9, 70)])
def test_every_thread_treats_denormal_numbers_as_the_caller_does(batch, hidden, flush):
    """The mode is a thread's own; torch sets the caller's, and threads that are there already keep theirs.

    Before they took it over for the time of a call, half of the rows of a flushed batch were not flushed.
    """
    case = make_case(60, batch, hidden, skip=0.5, h0=False)
    case.pre *= 1e-39
    cell = RINCell(hidden, 2600, skip=0.5).requires_grad_(False)  # a step that two threads share: 2^21 weights each
    cell.weight_ih.fill_(2.0**-20)
    x = torch.full((1, hidden), 2.0**-110)
    results = []
    for threads in (1, 2, 1, 2):
        with use_threads(threads):
            if threads == 2:
                assert "one thread" not in cpu.describe(60, batch, 1, hidden, torch.float32)
                cpu.forward(*case.arguments)  # now the second thread is there
            with flushed(flush):
                out, h_n = cpu.forward(*case.arguments)
                results.append((out, h_n, *cpu.backward(out, h_n, case.weight, out, case.rows, case.rule), cell(x)))
    tiny = torch.finfo(torch.float32).tiny
    out = results[0][0]
    assert ((out != 0) & (out.abs() < tiny)).any() == (not flush)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first.view(torch.int32), other.view(torch.int32)) for other in others)


# ---- one unit, and 4,096 ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (300, 1), (40, 33)])
def test_one_unit(isa, steps, batch, dtype):
    check_sweeps(cpu.forward, cpu.backward, make_case(steps, batch, 1, dtype=dtype, seed=batch))


@pytest.mark.parametrize("batch", [2047, 2048])
def test_one_unit_of_many_sequences(batch):
    """On both sides of where PyTorch's operations over all sequences are faster: the same walks, exact."""
    pre = torch.randint(-1, 2, (100, batch)).float()
    assert explain(pre[:, :, None, None]).backend == ("cpu" if batch == 2047 else "reference")
    walk = pre.cumsum(0)
    walk -= walk.cummin(0).values.clamp(max=0)
    time = torch.arange(100)[:, None]
    stops = torch.where(walk == 0, time, 100).flip(0).cummin(0).values.flip(0)
    leaf = pre[:, :, None, None].clone().requires_grad_()
    out, _ = recurrence(leaf, torch.zeros(1, 1, 1))
    assert torch.equal(out[:, :, 0, 0], walk)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert torch.equal(grad[:, :, 0, 0], (stops - time).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_4096_units(batch, dtype):
    check_sweeps(cpu.forward, cpu.backward, make_case(3, batch, 4096, dtype=dtype))


def test_a_layer_of_4096_units():
    module = RIN(3, 4096)
    with torch.no_grad():
        module.weight_ih_l0.normal_(std=0.5)
        module.weight_hh_l0.normal_(std=0.5 / 64)
    x, grad = torch.randn(9, 2, 3), torch.randn(9, 2, 4096)
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float32, "reference"), (torch.float64, "reference")):
        module.to(dtype).backend = backend
        out, _ = module(x.to(dtype))
        results.append([out.detach(), *torch.autograd.grad(out, list(module.parameters()), grad.to(dtype))])
    for name, *tensors in zip(("out", "dW", "dU", "db", "db"), *results, strict=True):
        assert_within(name, *tensors, 2 if name == "out" else 3, 4096)


# ---- more than 2^31 numbers ----


def available_memory() -> int:
    """Bytes that can be had without swapping, 0 where it cannot be told."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return 0


needs_8_gb = pytest.mark.skipif(available_memory() < 8 << 30, reason="needs 8 GB of free memory")
PAST_32_BITS = 2**31


@needs_8_gb
def test_an_output_of_more_than_two_to_the_31_numbers():
    """4.3 GB of bfloat16. Sequences do not depend on those beside them, so the last ones of the batch, whose numbers
    lie past 2^31 in the last steps, must come out as they do alone; the others end after a few steps, for speed."""
    batch, hidden = 64, 64
    steps = PAST_32_BITS // (batch * hidden) + 3
    module = RIN(1, hidden, dtype=torch.bfloat16, skip=0.5).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.05)
    x = torch.randn(steps, batch, 1).bfloat16().requires_grad_()
    lengths = torch.full((batch,), 5)
    lengths[-2:] = steps
    out, h_n = module(x, lengths=lengths)
    assert out.numel() > PAST_32_BITS
    assert not out[-1, :-2].any()
    (grad,) = torch.autograd.grad(h_n, x, torch.ones_like(h_n))  # and not of `out`: a gradient of 4.3 GB more
    part = x[:, -2:].detach().contiguous().requires_grad_()
    part_out, part_h_n = module(part)
    assert part_out[-1].isfinite().all()
    assert torch.equal(part_out, out[:, -2:])
    assert torch.equal(part_h_n, h_n[:, -2:])
    (part_grad,) = torch.autograd.grad(part_h_n, part, torch.ones_like(part_h_n))
    assert part_grad[-5:].all()
    assert torch.equal(part_grad, grad[:, -2:])


@needs_8_gb
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts on zeros that take no memory until written")
def test_an_input_of_more_than_two_to_the_31_numbers():
    """Zeros that the system never had to provide, but for the last steps."""
    batch, inputs = 1024, 64
    steps = PAST_32_BITS // (batch * inputs) + 3
    module = RIN(inputs, 2, dtype=torch.bfloat16, skip=0.5).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.1)
    module.weight_hh_l0.zero_()  # in a rounded product the start would leave a trace for ever
    module.bias_ih_l0.fill_(1.0)
    x = torch.zeros(steps, batch, inputs, dtype=torch.bfloat16)
    x[-5:] = torch.randn(5, batch, inputs)
    assert x.numel() > PAST_32_BITS
    out, h_n = module(x)
    tail, tail_h_n = module(x[-300:].contiguous())  # a skip of 0.5 has forgotten the start after some 30 steps
    assert torch.equal(out[-100:], tail[-100:])
    assert torch.equal(h_n, tail_h_n)
    assert not torch.equal(out[-1], out[-6])


# ---- huge and tiny skips ----

SKIPS = [1e30, -1e30, 1e-30, -1e-30, 2.0**-149]


@pytest.mark.parametrize("skip", SKIPS)
def test_a_skip_alone_is_a_power(isa, skip):
    """U = 0: h_t = s^t h0, to Inf, to -Inf or to 0 where float32 ends; its gradient is the same power."""
    h0 = torch.randn(3, 1, 19, requires_grad=True)
    out, h_n = recurrence(torch.zeros(2, 3, 1, 19), torch.zeros(1, 19, 19), h0, skip=skip, activation="none")
    powers = torch.tensor([skip, skip**2], dtype=torch.float64)
    exact = (powers[:, None, None, None] * h0.detach()).float()
    torch.testing.assert_close(out.detach(), exact, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(h_n, h0, torch.ones_like(h_n))
    torch.testing.assert_close(grad, powers[1].float().expand_as(grad), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skip", [1e12, -1e12, 1e-12, 1e-30])
@pytest.mark.parametrize(("batch", "hidden"), [(3, 17), (1, 160)])
def test_huge_and_tiny_skips_by_the_tolerance_rule(isa, batch, hidden, skip, dtype):
    for activation in ("relu", "tanh", "none"):
        check_sweeps(
            cpu.forward, cpu.backward, make_case(3, batch, hidden, dtype=dtype, skip=skip, activation=activation)
        )


@pytest.mark.parametrize("skip", [1e300, -1e300, 1e-300])
@pytest.mark.parametrize("value", [0.0, 1.0, math.inf])
def test_a_skip_past_float32_is_what_a_tensor_makes_of_it(isa, value, skip):
    """Inf or 0 to a float32 state, so NaN for 0 * Inf; to a float64 state a number."""
    for dtype in (torch.float32, torch.float64):
        pre, weight = torch.ones(2, 3, 1, 19, dtype=dtype), torch.full((1, 19, 19), 0.5, dtype=dtype)
        h0 = torch.full((3, 1, 19), value, dtype=dtype)
        for activation in ("relu", "tanh", "none"):
            got = recurrence(pre, weight, h0, skip=skip, activation=activation)
            want = recurrence(pre, weight, h0, skip=skip, activation=activation, backend="reference")
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("skip", [1e300, 1e-300, 1e39, 1e-45, math.inf, math.nan])
def test_a_module_refuses_a_skip_that_its_state_dict_cannot_hold(skip):
    for make in (RIN, RINCell):
        with pytest.raises(ValueError, match=re.escape(f"skip must be a finite number of float32's range, got {skip}")):
            make(3, 4, skip=skip)


@pytest.mark.parametrize("skip", [3e38, -3e38, 1e-30, -(2.0**-126)])
def test_a_module_loads_the_state_of_one_with_its_skip(skip):
    module = RIN(3, 4, skip=skip)
    RIN(3, 4, skip=skip).load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="the checkpoint has skip"):
        RIN(3, 4).load_state_dict(module.state_dict())
