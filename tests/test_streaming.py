"""One step at a time with the state carried by the caller: the way that reads the weights as they lie (step.py)."""

from __future__ import annotations

import os
import time

import pytest
import torch
from fused_rin import RIN, RINCell, cpu, step, use_backend
from torch import nn

from tests.conftest import use_threads

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _randomize(module, std=0.2, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.requires_grad_(False)


@pytest.fixture
def counted(monkeypatch):
    """How many native steps were taken: a test of the direct way must not pass by the general one."""
    calls = []

    class Counting:
        def __getattr__(self, name):
            return getattr(native, name)

        def step(self, *arguments):
            calls.append(arguments)
            return native.step(*arguments)

    native = cpu._native
    monkeypatch.setattr(cpu, "_native", Counting())
    return calls


def _formula(module, x, h, dtype):
    """One step in plain PyTorch in `dtype`: what torch.nn.RNNCell would do, plus the skip."""
    w_ih, w_hh, *biases = (p.to(dtype) for p in module.parameters())
    w_hh = torch.block_diag(*w_hh.chunk(getattr(module, "num_heads", 1)))
    x, h = x.to(dtype), h.to(dtype)
    a = x @ w_ih.T + h @ w_hh.T + sum(biases) + module.skip_factor * h
    return torch.relu(a) if module.nonlinearity == "relu" else torch.tanh(a)


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 17), (16, 8), (100, 100), (7, 129), (130, 33)])
def test_a_step_by_the_tolerance_rule(sizes, dtype, isa, counted):
    inputs, hidden = sizes
    for batch, nonlinearity, bias in ((1, "relu", True), (4, "tanh", True), (3, "relu", False)):
        module = _randomize(RINCell(inputs, hidden, bias, nonlinearity, dtype=dtype, skip=0.7))
        x, h = torch.randn(batch, inputs, dtype=dtype), torch.randn(batch, hidden, dtype=dtype)
        with cpu.use_instruction_set(isa):
            ours = module(x, h)
        exact = _formula(module, x, h, torch.float64)
        plain = (_formula(module, x, h, dtype).double() - exact).abs().max()
        # In float64 the formula is itself rounded: a sum of 260 terms.
        atol = (32 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps * exact.abs().max()
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().max() <= 2 * plain + atol
    assert len(counted) == 3


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_stream_equals_the_whole_sequence(batch, layers, heads, counted):
    module = _randomize(RIN(5, 8, layers, num_heads=heads, dtype=torch.float64))
    x = torch.randn(20, batch, 5, dtype=torch.float64)
    expected, expected_h = module(x)
    assert not counted
    out, h = [], None
    for t in range(20):
        step_out, h = module(x[t : t + 1], h)
        out.append(step_out)
    assert len(counted) == 20 * layers
    torch.testing.assert_close(torch.cat(out), expected)
    torch.testing.assert_close(h, expected_h)
    assert out[-1].untyped_storage().data_ptr() != h.untyped_storage().data_ptr()


def test_layouts_of_a_single_step(counted):
    ours = _randomize(RIN(5, 7, 2, skip=0, batch_first=True))
    theirs = nn.RNN(5, 7, 2, nonlinearity="relu", batch_first=True)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "skip"})
    for shape, state in (((3, 1, 5), (2, 3, 7)), ((1, 5), (2, 7))):
        x = torch.randn(shape)
        for hx in (None, torch.randn(state)):
            for a, b in zip(ours(x, hx), theirs(x, hx), strict=True):
                torch.testing.assert_close(a, b)
    assert len(counted) == 2 * 2 * 2


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_few_steps_in_one_call(dtype, layers, state, counted):
    """Against torch.nn.RNN, in every layout; where rows do not follow one another, by the general way."""
    for batch_first, shape, direct in (
        (False, (16, 1, 5), True), (False, (4, 4, 5), True), (False, (5, 2, 5), True), (False, (7, 5), True),
        (True, (1, 9, 5), True), (True, (2, 3, 5), False), (False, (17, 1, 5), False), (False, (5, 4, 5), False),
    ):  # fmt: skip
        ours = _randomize(RIN(5, 7, layers, batch_first=batch_first, skip=0.5, dtype=dtype))
        theirs = ours.to_rnn()
        x = torch.randn(shape, dtype=dtype)
        expected = theirs(x)
        hx = torch.randn_like(expected[1]) if state else None
        counted.clear()
        for a, b in zip(ours(x, hx), theirs(x, hx), strict=True):
            torch.testing.assert_close(a, b)
        assert len(counted) == (layers if direct else 0)


def test_a_few_steps_in_16_bits_carry_the_state_in_float32(counted):
    """So does the sweep; a step of its own has to round the state to hand it over."""
    module = _randomize(RIN(5, 7, dtype=torch.bfloat16))
    module(torch.randn(1, 1, 5, dtype=torch.bfloat16))
    assert len(counted) == 1
    module(torch.randn(2, 1, 5, dtype=torch.bfloat16))
    assert len(counted) == 1


def test_nan_and_inf_pass_as_in_torch(counted):
    ours = _randomize(RINCell(20, 20, skip=0))
    theirs = nn.RNNCell(20, 20, nonlinearity="relu")
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "skip"})
    for bad in (float("nan"), float("inf"), -float("inf")):
        for position in (0, 16, 19):
            x, h = torch.rand(2, 20), torch.rand(2, 20)
            h[0, position] = bad
            torch.testing.assert_close(ours(x, h), theirs(x, h), equal_nan=True)
            ours.weight_hh[3, position] = theirs.weight_hh.data[3, position] = bad
            torch.testing.assert_close(ours(x, h), theirs(x, h), equal_nan=True)
            ours.weight_hh[3, position] = theirs.weight_hh.data[3, position] = 0.1
    assert len(counted) == 18


def _edit_data(module):
    module.weight_hh_l0.data.copy_(torch.randn_like(module.weight_hh_l0))


def _edit_in_place(module):
    module.weight_hh_l0.add_(1)


def _replace_data(module):
    module.weight_hh_l0.data = torch.randn_like(module.weight_hh_l0)


def _replace_parameter(module):
    module.weight_hh_l0 = nn.Parameter(torch.randn(7, 7), requires_grad=False)


def _load(module):
    module.load_state_dict(_randomize(RIN(5, 7), seed=9).state_dict())


def _optimize(module):
    module.requires_grad_(True)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    module(torch.randn(3, 1, 5))[0].sum().backward()
    optimizer.step()
    module.requires_grad_(False)


def _transpose(module):
    """The same memory read otherwise: whoever trusted an address would compute with V^T."""
    module.weight_hh_l0.data = module.weight_hh_l0.data.t()


def _through_numpy(module):
    module.weight_hh_l0.numpy()[...] = 0.25


@pytest.mark.parametrize(
    "change",
    [_edit_data, _edit_in_place, _replace_data, _replace_parameter, _load, _optimize, _transpose, _through_numpy],
)
def test_a_change_of_the_weights_is_seen_at_once(change):
    module = _randomize(RIN(5, 7))
    x, h = torch.rand(1, 1, 5), torch.rand(1, 1, 7)
    before = module(x, h)[0]
    change(module)
    out = module(x, h)[0]
    assert not torch.equal(out, before)
    u, b = module.weight_hh_l0, module.bias_ih_l0 + module.bias_hh_l0
    torch.testing.assert_close(out, torch.relu(x @ module.weight_ih_l0.T + b + h @ u.T + h))


def test_a_forked_child_streams_too():
    module = _randomize(RIN(5, 700))
    x, h = torch.rand(1, 1, 5), torch.rand(1, 1, 700)
    expected = module(x, h)[0]
    pid = os.fork()
    if not pid:
        os._exit(0 if torch.equal(module(x, h)[0], expected) else 1)
    for _ in range(300):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        pytest.fail("the child hung")
    assert os.waitstatus_to_exitcode(status) == 0


def test_results_do_not_depend_on_threads(counted):
    module = _randomize(RIN(300, 1100))
    x, h = torch.rand(1, 1, 300), torch.rand(1, 1, 1100)
    results = []
    for count in (1, 2, 3):
        with use_threads(count):
            results.append(module(x, h)[0])
    assert len(counted) == 3
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_general_way_is_taken_where_operators_must_be_seen(counted):
    module = _randomize(RIN(5, 7))
    x = torch.randn(1, 1, 5)
    module(x)
    assert len(counted) == 1
    counted.clear()
    with use_backend("reference"):
        module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype == torch.bfloat16
    module(x, resets=torch.ones(1, 1, dtype=torch.bool))
    module(x, lengths=[1])
    module(x.clone().requires_grad_())[0].sum().backward()
    torch.func.vmap(module)(x.expand(3, 1, 1, 5))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(module(dual)[0]).tangent is not None
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(module(x)[0], torch._subclasses.FakeTensor)
    module(torch.randn(1, step.MAX_ROWS + 1, 5))
    module(torch.randn(1, 2, 10)[..., ::2])
    module.to("meta")(x.to("meta"))
    assert not counted


@pytest.mark.parametrize("which", ["input", "hx"])
def test_a_negated_view_is_not_read_as_it_lies(which, counted):
    """The imaginary part of a conjugate keeps the sign in a flag of the tensor, not in memory."""
    cell = _randomize(RINCell(1, 1))
    cell.weight_ih.fill_(0.5), cell.weight_hh.fill_(0.5)
    negated = torch.full((1, 1), complex(0, -2.0)).conj().imag
    assert negated.is_neg()
    plain = negated.clone()
    x, h = (negated, torch.ones(1, 1)) if which == "input" else (torch.ones(1, 1), negated)
    out = cell(x, h)
    assert not counted
    assert torch.equal(out, cell(*(plain if t is negated else t for t in (x, h))))
    assert len(counted) == 1
    assert out > 0


def test_a_weight_of_a_wrong_shape_is_refused_not_read():
    module = _randomize(RIN(5, 7))
    module.weight_hh_l0.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="shape"):
        module(torch.randn(1, 1, 5), torch.zeros(1, 1, 7))


def test_a_step_is_one_native_call_and_two_tensors(counted):
    """What `make bench-cpu` times: a slow path would allocate more, or call an operator."""
    x, h = torch.randn(1, 1, 128), torch.rand(1, 1, 128)
    for module, arguments, tensors in (
        (RIN(128, 128), (x, h), ["aten::new_empty"] * 2),
        (RIN(128, 128), (x,), ["aten::new_empty"] * 2),
        (RINCell(128, 128), (x[0], h[0]), ["aten::new_empty"]),
        (RINCell(128, 128), (x[0],), ["aten::new_empty"]),
    ):
        with torch.inference_mode():
            module(*arguments)
            counted.clear()
            with torch.profiler.profile() as profile:
                module(*arguments)
        assert len(counted) == 1
        assert [e.name for e in profile.events() if e.cpu_parent is None and e.name.startswith("aten")] == tensors
        counted.clear()


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_a_step_under_autograd_packs_nothing(counted, monkeypatch, skip):
    """A decoder's loop: torch's products, no sweep that packs U for a single step."""
    calls = []
    for name in ("sweep_cpu", "layer_forward", "sweep"):
        monkeypatch.setattr(cpu._native, name, lambda *a, name=name: calls.append(name), raising=False)
    for layers, batch in ((1, 1), (2, 3), (1, 40)):
        module = RIN(5, 7, layers, skip=skip)
        out, h_n = module(torch.randn(1, batch, 5), torch.rand(layers, batch, 7))
        torch.autograd.grad(out.sum() + h_n.sum(), list(module.parameters()))
    assert not calls
    assert not counted
