"""What RIN offers past torch.nn.RNN: lengths, resets, derivatives of every kind, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch
from fused_rin import RIN, RINCell
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.utils import rnn as rnn_utils

from tests.conftest import use_threads

MODES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "batch_first": True, "num_heads": 3, "nonlinearity": "tanh"},
]


def _rin(options, dtype=torch.float64, **extra):
    torch.manual_seed(0)
    module = RIN(4, 6, dtype=dtype, **options, **extra)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def _layout(module, x):
    return x.transpose(0, 1) if module.batch_first else x


@pytest.mark.parametrize("options", MODES)
def test_lengths_equal_single_sequences(options):
    module = _rin(options)
    lengths = [5, 0, 3, 1, 5]
    x = torch.randn(5, 5, 4, dtype=torch.float64)
    states = module.num_layers * (2 if module.bidirectional else 1)
    hx = torch.randn(states, 5, 6, dtype=torch.float64)
    for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        out, h_n = module(_layout(module, x), hx, lengths=given)
        out = _layout(module, out)
        for b, length in enumerate(lengths):
            assert torch.count_nonzero(out[length:, b]) == 0
            if length:
                alone, h_alone = module(x[:length, b], hx[:, b])
                torch.testing.assert_close(out[:length, b], alone)
                torch.testing.assert_close(h_n[:, b], h_alone)
            else:
                torch.testing.assert_close(h_n[:, b], hx[:, b])


def test_lengths_equal_packed():
    module = _rin({"num_layers": 2, "bidirectional": True})
    lengths = torch.tensor([2, 5, 3])
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    packed, h_packed = module(rnn_utils.pack_padded_sequence(x, lengths, enforce_sorted=False))
    out, h_n = module(x, lengths=lengths)
    torch.testing.assert_close(rnn_utils.pad_packed_sequence(packed)[0], out)
    torch.testing.assert_close(h_packed, h_n)


@pytest.mark.parametrize("options", MODES)
def test_resets_equal_separate_episodes(options):
    """An episode sees nothing of the one before it, in no layer; only the first one sees hx."""
    module = _rin(options)
    steps, batch = 7, 3
    x = torch.randn(steps, batch, 4, dtype=torch.float64)
    states = module.num_layers * (2 if module.bidirectional else 1)
    hx = torch.randn(states, batch, 6, dtype=torch.float64, requires_grad=True)
    starts = [[3], [0, 2, 6], []]
    resets = torch.zeros(steps, batch, dtype=torch.bool)
    for b, where in enumerate(starts):
        resets[where, b] = True
    out, _ = module(_layout(module, x), hx, resets=_layout(module, resets))
    out = _layout(module, out)
    one_way = not module.bidirectional and module.num_layers == 1
    for b, where in enumerate(starts):
        bounds = sorted({0, *where, steps})
        for begin, end in itertools.pairwise(bounds):
            keeps_hx = begin == 0 and 0 not in where
            state = hx[:, b] if keeps_hx else torch.zeros_like(hx[:, b])
            if not one_way and module.bidirectional and end == steps and begin > 0:
                continue  # its reversed layers start from hx; compared below without one
            if module.bidirectional and keeps_hx and end < steps:
                continue
            torch.testing.assert_close(out[begin:end, b], module(x[begin:end, b], state)[0])
    (gradient,) = torch.autograd.grad(out[3:, 0].sum(), hx)
    if not module.bidirectional:
        assert torch.count_nonzero(gradient) == 0
    without = _layout(module, module(_layout(module, x), resets=_layout(module, resets))[0])
    for b, where in enumerate(starts):
        bounds = sorted({0, *where, steps})
        for begin, end in itertools.pairwise(bounds):
            torch.testing.assert_close(without[begin:end, b], module(x[begin:end, b])[0])


def test_resets_of_unbatched_and_packed_input():
    module = _rin({})
    x = torch.randn(6, 4, dtype=torch.float64)
    resets = torch.tensor([False, False, True, False, False, True])
    out, _ = module(x, resets=resets)
    torch.testing.assert_close(out, torch.cat([module(part)[0] for part in x.split([2, 3, 1])]))
    packed = rnn_utils.pack_sequence([x, x[:2]])
    marks = rnn_utils.pack_sequence([resets, resets[:2]]).data
    again, _ = module(packed, resets=marks)
    torch.testing.assert_close(rnn_utils.unpack_sequence(again)[0], out)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"lengths": [1, 2]}, RuntimeError, r"Expected lengths size \(3,\), got \[2\]"),
        ({"lengths": [1, 2, 6]}, ValueError, r"lengths must be in \[0, 5\], got values from 1 to 6"),
        ({"lengths": [1, -2, 5]}, ValueError, r"lengths must be in \[0, 5\], got values from -2 to 5"),
        ({"lengths": torch.tensor([1.0, 2, 3])}, ValueError, "lengths must be integers"),
        (
            {"resets": torch.zeros(3, 5, dtype=torch.bool)},
            RuntimeError,
            r"resets must have shape \(5, 3\), got \(3, 5\)",
        ),
        ({"resets": torch.zeros(5, 3)}, ValueError, r"resets must have dtype torch.bool, got torch.float32"),
        ({"resets": torch.zeros(5, 3, dtype=torch.bool, device="meta")}, RuntimeError, "resets must be on the device"),
    ],
)
def test_bad_lengths_and_resets(arguments, error, text):
    with pytest.raises(error, match=text):
        _rin({})(torch.randn(5, 3, 4, dtype=torch.float64), **arguments)


def test_resets_are_named_in_the_callers_layout():
    module = _rin({"batch_first": True})
    with pytest.raises(RuntimeError, match=r"resets must have shape \(3, 5\), got \(5, 3\)"):
        module(torch.randn(3, 5, 4, dtype=torch.float64), resets=torch.zeros(5, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="lengths is for batched 3-D input"):
        _rin({})(torch.randn(5, 4, dtype=torch.float64), lengths=[5])


# ---- derivatives ----


def _functional(module, x, hx, **arguments):
    names = [name for name, _ in module.named_parameters()]

    def call(x, hx, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, hx), arguments)

    inputs = (x.requires_grad_(), hx.requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters()))
    return call, inputs


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("extra", ["", "lengths", "resets"])
def test_first_and_second_derivatives(options, extra, train):
    module = _rin(options).train(train)
    x, arguments = torch.randn(4, 3, 4, dtype=torch.float64), {}
    if extra == "lengths":
        arguments["lengths"] = torch.tensor([4, 1, 2])
    if extra == "resets":
        arguments["resets"] = _layout(module, torch.rand(4, 3) < 0.4)
    states = module.num_layers * (2 if module.bidirectional else 1)
    call, inputs = _functional(module, _layout(module, x), torch.randn(states, 3, 6, dtype=torch.float64), **arguments)
    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("options", MODES)
def test_forward_mode(options):
    module = _rin(options)
    states = module.num_layers * (2 if module.bidirectional else 1)
    x, hx = torch.randn(4, 3, 4, dtype=torch.float64), torch.randn(states, 3, 6, dtype=torch.float64)
    call, inputs = _functional(module, _layout(module, x), hx)
    assert gradcheck(call, inputs, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    with torch.no_grad(), forward_ad.dual_level():
        out, _ = module(forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])), inputs[1])
        assert forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.parametrize("options", MODES)
def test_vmap_over_inputs_and_over_models(options):
    module = _rin(options)
    x = torch.randn(5, 4, 3, 4, dtype=torch.float64)
    expected = torch.stack([module(part)[0] for part in x])
    torch.testing.assert_close(torch.func.vmap(lambda part: module(part)[0])(x), expected)
    models = [_rin(options), _rin(options)]
    for parameter in models[1].parameters():
        nn.init.normal_(parameter, std=0.2)
    weights, buffers = torch.func.stack_module_state(models)
    ensemble = torch.func.vmap(lambda w, b: torch.func.functional_call(module, (w, b), (x[0],))[0])(weights, buffers)
    torch.testing.assert_close(ensemble, torch.stack([model(x[0])[0] for model in models]))


@pytest.mark.parametrize("steps", [1, 4])
def test_per_sample_gradients(steps):
    module = _rin({"num_layers": 2})
    x = torch.randn(3, steps, 4, dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights, sample):
        return torch.func.functional_call(module, weights, (sample,))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(3):
        wanted = torch.autograd.grad(loss(dict(module.named_parameters()), x[i]), list(module.parameters()))
        for name, gradient in zip(weights, wanted, strict=True):
            torch.testing.assert_close(each[name][i], gradient)


def test_cell_derivatives_of_every_kind():
    torch.manual_seed(0)
    cell = RINCell(4, 6, nonlinearity="tanh", dtype=torch.float64, skip=0.5)
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.3)
    call, inputs = _functional(cell, torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64))
    assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)
    torch.testing.assert_close(torch.func.vmap(cell)(inputs[0], inputs[1]), cell(inputs[0], inputs[1]))


# ---- determinism ----


def _training_run(threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = RIN(9, 70, num_layers=2, bidirectional=True, dropout=0.3)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        out, h_n = module(torch.randn(23, 11, 9), lengths=torch.randint(0, 24, (11,)))
        (out.square().sum() + h_n.sum()).backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


def test_bitwise_determinism_under_the_strict_switch():
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = _training_run(threads), _training_run(threads)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_sweep_gives_the_same_bits_on_any_number_of_threads():
    """The sweep alone: the matrix products around it are the vendor's."""
    torch.manual_seed(0)
    module = RIN(70, 70, bias=False)
    nn.init.normal_(module.weight_hh_l0, std=0.1)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(70))  # a product with I is exact in any order
    x, results = torch.randn(50, 5, 70), []
    for count in (1, 2, 3):
        with use_threads(count):
            results.append(module(x)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
