"""Gradients as users of autograd meet them: each a tensor of its own, of every order, with hooks on saved tensors."""

from __future__ import annotations

import warnings

import pytest
import torch
from fused_rin import RIN, RINCell, recurrence
from torch import nn

from tests.conftest import assert_within

MODULES = {
    "RIN": lambda **o: RIN(3, 4, **o),
    "two layers": lambda **o: RIN(3, 4, 2, **o),
    "bidirectional": lambda **o: RIN(3, 4, bidirectional=True, **o),
    "heads": lambda **o: RIN(3, 4, num_heads=2, **o),
    "RINCell": lambda **o: RINCell(3, 4, **o),
}


def randomize(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def run(module, x, h=None):
    out = module(x[0] if isinstance(module, RINCell) else x, h)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("name", MODULES)
def test_no_two_gradients_share_memory(name, batch, steps, dtype):
    """Who scales gradients in place, after autograd.grad or in a hook, scales each once."""
    module = randomize(MODULES[name](dtype=dtype))
    x = torch.randn(steps, batch, 3, dtype=dtype)
    parameters = list(module.parameters())
    want = torch.autograd.grad(run(module, x).sum(), parameters)
    got = torch.autograd.grad(run(module, x).sum(), parameters)
    for grad in got:
        grad.mul_(0.5)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b * 0.5)
    hooked = randomize(MODULES[name](dtype=dtype))
    for parameter in hooked.parameters():
        parameter.register_hook(lambda grad: grad.mul_(0.5))
    run(hooked, x).sum().backward()
    for parameter, b in zip(hooked.parameters(), want, strict=True):
        assert torch.equal(parameter.grad, b * 0.5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_biases_under_operators_have_gradients_of_their_own(backend):
    module = randomize(RIN(3, 4, backend=backend))
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)[0]
    grads = torch.autograd.grad(out.sum(), [module.bias_ih_l0, module.bias_hh_l0])
    assert grads[0].data_ptr() != grads[1].data_ptr()
    assert torch.equal(*grads)


# ---- hooks on saved tensors ----


def _transposed(t):
    return t.t().contiguous().t() if t.dim() == 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)


CHANGES = {
    "other strides": lambda t: _transposed(t) if t.dim() >= 2 else t,
    "float64": lambda t: t.double() if t.is_floating_point() else t,
    "negated twice": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "a subclass": lambda t: torch.Tensor._make_subclass(Subclass, t.detach()),
}


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["RIN", "bidirectional", "recurrence"])
def test_saved_tensors_that_come_back_changed(name, change):
    """Same numbers in another form: the same gradients."""
    x = torch.randn(20, 2, 3, requires_grad=True)
    if name == "recurrence":
        pre, weight = torch.randn(20, 2, 1, 4, requires_grad=True), (torch.randn(1, 4, 4) / 4).requires_grad_()
        leaves, function = [pre, weight], lambda: recurrence(pre, weight)[0]
    else:
        module = randomize(MODULES[name]())
        leaves, function = [x, *module.parameters()], lambda: module(x)[0]
    want = torch.autograd.grad(function().square().sum(), leaves)
    out = None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), CHANGES[change]):
        out = function()
    got = torch.autograd.grad((out * 2 * out.detach()).sum() / 1, leaves)
    for a, b in zip(got, want, strict=True):  # by another order of sums, of gradients that grow to 3e8
        assert (torch.Tensor(a) - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize(
    "rows", [{"resets": torch.rand(20, 3) < 0.3}, {"lengths": torch.tensor([20, 3, 11])}], ids=["resets", "lengths"]
)
@pytest.mark.parametrize("name", ["RIN", "recurrence"])
def test_saved_rows_that_come_back_with_other_strides(name, rows):
    """Which rows run is saved for backward too, and a kernel reads it by address."""
    if name == "recurrence":
        pre, weight = torch.randn(20, 3, 1, 4, requires_grad=True), (torch.randn(1, 4, 4) / 4).requires_grad_()
        leaves, function = [pre, weight], lambda: recurrence(pre, weight, activation="tanh", **rows)[0]
    else:
        module, x = RIN(2, 4, nonlinearity="tanh"), torch.randn(20, 3, 2, requires_grad=True)
        leaves, function = [x, *module.parameters()], lambda: module(x, **rows)[0]
    want = torch.autograd.grad(function().sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack([t, t], -1), lambda t: t[..., 0]):
        out = function()
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), want, strict=True):
        torch.testing.assert_close(a, b)


def test_saved_tensors_of_another_shape_are_refused():
    module, x = RIN(3, 4), torch.randn(20, 2, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:1]):
        out, _ = module(x)
    with pytest.raises(RuntimeError, match=r"saved for backward came back .* with shape \(1, 2, 3\)"):
        out.sum().backward()


# ---- batched gradients of the older kind ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_vectorized_jacobians_and_hessians(name):
    module = randomize(MODULES[name](dtype=torch.float64, nonlinearity="tanh"))
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    functions = {
        torch.autograd.functional.jacobian: lambda t: run(module, t).sum(-1),
        torch.autograd.functional.hessian: lambda t: run(module, t).square().sum(),
    }
    for transform, function in functions.items():
        torch.testing.assert_close(transform(function, x, vectorize=True), transform(function, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("extra", [{}, {"lengths": [4, 2]}, {"resets": torch.rand(4, 2) < 0.5}])
def test_batched_gradients_of_everything(name, extra):
    module = randomize(MODULES[name]())
    if isinstance(module, RINCell):
        extra = {}
    x = torch.randn(4, 2, 3, requires_grad=True)
    out = module(x[0]) if isinstance(module, RINCell) else module(x, **extra)[0]
    leaves, grads = [x, *module.parameters()], torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        for a, b in zip(batched, torch.autograd.grad(out, leaves, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.filterwarnings("ignore")
def test_gradcheck_with_batched_gradients():
    pre = torch.randn(3, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    weight = (torch.randn(1, 3, 3, dtype=torch.float64) / 2).requires_grad_()
    for options in ({}, {"reverse": True}):
        assert torch.autograd.gradcheck(
            lambda p, w, options=options: recurrence(p, w, activation="tanh", **options), (pre, weight),
            check_batched_grad=True,
        )  # fmt: skip


def test_a_compiled_gradient_transform():
    module, x = randomize(RIN(3, 4)), torch.randn(4, 2, 3)

    def loss(t):
        return module(t)[0].square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.compile(torch.func.grad(loss), backend="aot_eager")(x)
    torch.testing.assert_close(got, torch.func.grad(loss)(x))


# ---- the error of a sum over all rows ----


@pytest.mark.parametrize("rows", [160, 4096, 300_000])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_bias_gradient_is_as_exact_as_torchs_sum(rows, threads):
    """Blocks of sums; one sum after the other was off by 10 to 48 times torch's error at 10^6 rows."""
    from tests.conftest import use_threads

    torch.manual_seed(0)
    module, steps = RIN(2, 5, nonlinearity="relu", skip=0.0), max(8, rows // 4000)
    with torch.no_grad():
        module.weight_hh_l0.zero_()  # then the gradient of pre is that of the output
        module.bias_ih_l0.fill_(9.0)
    x = torch.randn(steps, rows // steps, 2)
    grad = torch.rand(steps, rows // steps, 5)
    with use_threads(threads):
        out, _ = module(x)
        (got,) = torch.autograd.grad(out, [module.bias_hh_l0], grad)
    assert (out > 0).all()
    flat = grad.flatten(0, 1)
    assert_within("bias", got, flat.sum(0), flat.double().sum(0), 3, 1)
