"""The fused layer on the CPU: input product, sweep and all gradients, against the float64 reference."""

from __future__ import annotations

import fused_rin
import pytest
import torch
from fused_rin import cpu, gradients, layer, reference
from fused_rin.problem import Weights
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import assert_within, layouts, make_case, name_of, use_threads

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned")


def make_layer(steps, batch, inputs, hidden, *, bias=True, **options):
    """A case, and x, W and biases whose product takes the place of its `pre`."""
    case = make_case(steps, batch, hidden, **options)
    dtype, draw = case.pre.dtype, torch.Generator().manual_seed(7)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    x = normal(*case.pre.shape[:-2], inputs)
    width = case.pre.shape[-2] * hidden
    w_ih = normal(width, inputs) / (max(inputs, 1) ** 0.5)
    biases = (normal(width), normal(width)) if bias else (None, None)
    return case, x, w_ih, *biases


def run(case, x, w_ih, b_ih, b_hh):
    weights, groups = Weights(w_ih, case.weight.flatten(0, 1), b_ih, b_hh), case.weight.shape[0]
    assert layer.is_fused(x, weights, case.h0, case.rows, groups, "auto"), "the fused way is not taken"
    out, h_n = layer.forward(x, weights, case.h0, case.rows, case.rule, groups, "auto")
    # As the module has it: the directions first.
    return out, h_n.transpose(0, 1).reshape(-1, *case.weight.shape[:2])


def double(tensor):
    return None if tensor is None else tensor.double()


def plain_forward(case, x, w_ih, b_ih, b_hh):
    pre = F.linear(x, w_ih, None if b_ih is None else b_ih + b_hh)
    pre = pre.view(*x.shape[:-1], *case.weight.shape[:2])
    out, h_n = reference.forward(pre, *case.arguments[1:])
    return out.view(*x.shape[:-1], w_ih.shape[0]), h_n


def plain_gradients(case, x, w_ih, out, grad_out, grad_h_n):
    """Gradients of x, W, U, b, h0 by PyTorch, from the states `out`."""
    split = (*x.shape[:-1], *case.weight.shape[:2])
    grads = None if grad_out is None else grad_out.view(split)
    grad_pre, grad_h0 = reference.backward(grads, grad_h_n, case.weight, out.view(split), case.rows, case.rule)
    grad_u = gradients.weight_gradient(grad_pre, out.view(split), case.h0, case.rows, case.num_reversed)
    rows = grad_pre.reshape(-1, w_ih.shape[0])
    return (rows @ w_ih).view(x.shape), rows.t() @ x.reshape(rows.shape[0], -1), grad_u, rows.sum(0), grad_h0


def check(steps, batch, inputs, hidden, *, threads=1, bias=True, **options):
    case, x, w_ih, b_ih, b_hh = make_layer(steps, batch, inputs, hidden, bias=bias, **options)
    leaves = [t for t in (x, w_ih, b_ih, b_hh, case.weight, case.h0) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    with use_threads(threads):
        out, h_n = run(case, x, w_ih, b_ih, b_hh)
    for leaf in leaves:
        leaf.requires_grad_(False)
    wide = case.to(torch.float64)
    terms = hidden + inputs + steps
    plain = plain_forward(case, x, w_ih, b_ih, b_hh)
    exact = plain_forward(wide, *map(double, (x, w_ih, b_ih, b_hh)))
    assert_within("out", out.detach(), plain[0], exact[0], 2, terms)
    assert_within("h_n", h_n.detach(), plain[1], exact[1], 2, terms)

    draw = torch.Generator().manual_seed(3)
    grad_out, grad_h_n = (
        torch.randn(t.shape, generator=draw, dtype=torch.float64).to(out.dtype) for t in (out.detach(), h_n)
    )
    for used, g, g_n in (((out, h_n), grad_out, grad_h_n), ((out,), grad_out, None), ((h_n,), None, grad_h_n)):
        given = [grad for grad in (g, g_n) if grad is not None]
        wanted = [x, w_ih, case.weight, *([b_ih, b_hh] if bias else []), *([] if case.h0 is None else [case.h0])]
        for leaf in wanted:
            leaf.requires_grad_()
        with use_threads(threads):
            got = torch.autograd.grad(used, wanted, given, retain_graph=True)
        states = out.detach()
        plain = plain_gradients(case, x, w_ih, states, g, g_n)
        exact = plain_gradients(wide, *map(double, (x, w_ih, states, g, g_n)))
        names = ["x", "W", "U", *(["b", "b"] if bias else []), *([] if case.h0 is None else ["h0"])]
        for name, value in zip(names, got, strict=True):
            at = ("x", "W", "U", "b", "h0").index(name)
            assert_within(f"gradient of {name}", value, plain[at].detach(), exact[at].detach(), 3, terms * batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("steps", "batch", "inputs", "hidden"),
    [(1, 1, 1, 1), (3, 2, 5, 7), (2, 33, 1, 100), (9, 3, 17, 64), (5, 1, 100, 129), (40, 7, 8, 8)],
)
def test_sizes(isa, dtype, steps, batch, inputs, hidden):
    check(steps, batch, inputs, hidden, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "hidden"), [(1, 33), (3, 17), (300, 5)])
def test_several_chunks(isa, dtype, batch, hidden):
    """More rows than are taken together: by steps, by rows, and more rows than a chunk has in a single step."""
    check(300 if batch < 300 else 3, batch, 6, hidden, dtype=dtype)


LAYOUTS = layouts((1, 0), (1, 1))


@pytest.mark.parametrize("options", LAYOUTS, ids=name_of)
def test_layouts(isa, options):
    for dtype in (torch.float32, torch.bfloat16):
        check(4, 7, 5, 18, dtype=dtype, **options)


@pytest.mark.parametrize("options", LAYOUTS, ids=name_of)
def test_layouts_of_whole_tiles(options):
    """Where AMX is, the input's product is made in the sums of its step, of sequences that begin there on its own."""
    check(4, 21, 40, 50, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("options", LAYOUTS, ids=name_of)
def test_layouts_over_threads(threads, options):
    check(65, 9, 5, 18, threads=threads, seed=threads, **options)


@pytest.mark.parametrize("options", LAYOUTS[::3], ids=name_of)
def test_several_recurrences(isa, options):
    """Heads and directions: their gradients go by products over all steps."""
    check(5, 4, 6, 9, **{**options, "groups": 4, "num_reversed": 2 * options["num_reversed"]})


@pytest.mark.parametrize("layout", ["full", "lengths"])
@pytest.mark.parametrize("num_reversed", [0, 1])
def test_outputs_shared_by_threads(layout, num_reversed):
    with use_threads(2):
        assert "share the outputs" in cpu.describe(300, 1, 1, 400, torch.float32, input_size=30)
    check(300, 1, 30, 400, threads=2, layout=layout, resets=True, num_reversed=num_reversed)


@pytest.mark.parametrize("activation", ["relu", "tanh", "none"])
@pytest.mark.parametrize("skip", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_activations_skips_and_biases(activation, skip, bias):
    check(9, 4, 3, 37, activation=activation, skip=skip, bias=bias)


def test_results_do_not_depend_on_threads_or_repetition(isa):
    for steps, batch, inputs, hidden, layout in (
        (300, 1, 20, 300, "full"), (70, 7, 5, 48, "lengths"), (30, 16, 9, 100, "packed"), (9, 300, 4, 20, "full"),
    ):  # fmt: skip
        case, *arguments = make_layer(steps, batch, inputs, hidden, layout=layout)
        tensors = [*arguments, case.weight, case.h0]
        for tensor in tensors:
            tensor.requires_grad_()
        results = []
        for threads in (1, 2, 3, 1, 2):
            with use_threads(threads):
                out, h_n = run(case, *arguments)
                results.append([out, h_n, *torch.autograd.grad((out.sin().sum() + h_n.sum()), tensors)])
        assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_only_what_is_needed_is_computed():
    case, x, w_ih, b_ih, b_hh = make_layer(6, 3, 4, 5)
    w_ih.requires_grad_()
    out, _ = run(case, x, w_ih, b_ih, b_hh)
    out.sum().backward()
    assert w_ih.grad.isfinite().all()
    w_ih.requires_grad_(False)
    x.requires_grad_()
    out, _ = run(case, x, w_ih, b_ih, b_hh)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.isfinite().all()
    assert not run(case, x.detach(), w_ih, b_ih, b_hh)[0].requires_grad


def test_a_training_step_allocates_one_tensor_of_all_steps():
    """The output: no input product and no gradient of it, neither kept nor for a while."""
    rin, x = fused_rin.RIN(1, 64), torch.randn(200, 32, 1)
    step = lambda: rin(x)[1].sum().backward()  # noqa: E731
    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    allocated = sum(max(0, event.cpu_memory_usage) for event in profile.events() if event.cpu_parent is None)
    output = 200 * 32 * 64 * 4
    assert output <= allocated < 1.2 * output


def test_where_it_does_not_fit():
    case, x, w_ih, b_ih, b_hh = make_layer(4, 3, 5, 6)

    def is_fused(x, *weights, backend="auto"):
        return layer.is_fused(x, Weights(*weights), case.h0, case.rows, 1, backend)

    good = (x, w_ih, case.weight[0], b_ih, b_hh)
    assert is_fused(*good)
    assert is_fused(*good, backend="cpu")
    assert not is_fused(*good, backend="reference")
    for place in range(5):
        for change in (
            lambda t: t.double(),
            lambda t: t[..., :-1],
            lambda t: t.to("meta"),
            lambda t: torch._neg_view(t),
            lambda t: torch._efficientzerotensor(t.shape),
            lambda t: torch.Tensor._make_subclass(Subclass, t),
            freed,
        ):
            bad = list(good)
            bad[place] = change(good[place])
            assert not is_fused(*bad), (place, bad[place])
    with torch.autocast("cpu"):
        assert not is_fused(*good)
    with FlopCounterMode(display=False) as flops:
        assert not is_fused(*good)
        fused_rin.RIN(5, 6)(x)
    assert flops.get_total_flops() >= 2 * x.numel() * 6


class Subclass(torch.Tensor):
    pass


def freed(tensor):
    """As sharding leaves a tensor between its uses: all but its memory."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def test_second_derivatives():
    case, x, w_ih, b_ih, b_hh = make_layer(3, 2, 2, 3, dtype=torch.float64, activation="tanh", layout="lengths")
    inputs = [t.requires_grad_() for t in (x, w_ih, b_ih, b_hh, case.weight, case.h0)]

    def function(x, w_ih, b_ih, b_hh, weight, h0):
        case.weight, case.h0 = weight, h0
        return run(case, x, w_ih, b_ih, b_hh)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_batched_gradients(bidirectional):
    """torch.vmap over the backward alone, as the documentation of torch.vmap computes a Jacobian."""
    rin, x = fused_rin.RIN(3, 4, bidirectional=bidirectional), torch.randn(5, 2, 3)
    out, _ = rin(x)
    grads, parameters = torch.randn(6, *out.shape), list(rin.parameters())
    batched = torch.vmap(lambda grad: torch.autograd.grad(out, parameters, grad, retain_graph=True))(grads)
    for i, grad in enumerate(grads):
        single = torch.autograd.grad(out, parameters, grad, retain_graph=True)
        for a, b in zip(batched, single, strict=True):
            torch.testing.assert_close(a[i], b)
