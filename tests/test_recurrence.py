"""The public function: its gradient, what it keeps, what it refuses."""

from __future__ import annotations

import itertools
import math

import fused_rin
import pytest
import torch
from fused_rin import recurrence, reference
from fused_rin.gradients import weight_gradient
from fused_rin.problem import ALL_ROWS

from tests.conftest import assert_within, layouts, make_case, name_of

LAYOUTS = layouts((1, 0), (1, 1), (2, 1))


def public_arguments(case):
    """The arguments of `recurrence` for a case, whose offsets came from batch_sizes."""
    kept = {"skip": case.skip, "activation": case.activation, "resets": case.resets}
    groups = case.weight.shape[0]
    kept["reverse"] = [g >= groups - case.num_reversed for g in range(groups)]
    if case.offsets is not None:
        kept["batch_sizes"] = (case.lengths > torch.arange(case.offsets.numel())[:, None]).sum(1)
    else:
        kept["lengths"] = case.lengths
    return kept


def leaves(case):
    return [t.clone().requires_grad_() for t in (case.pre, case.weight, case.h0) if t is not None]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", LAYOUTS, ids=name_of)
def test_first_and_second_derivatives(options, backend):
    """gradcheck and gradgradcheck in float64; tanh, for its second derivative is not zero."""
    case = make_case(3, 2, 3, dtype=torch.float64, activation="tanh", skip=0.5, **options)
    kept = public_arguments(case)
    function = lambda *tensors: recurrence(*tensors, backend=backend, **kept)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves(case))
    assert torch.autograd.gradgradcheck(function, leaves(case))


@pytest.mark.parametrize("options", LAYOUTS, ids=name_of)
def test_gradients_are_those_of_the_reference(options):
    """Through everything, ReLU, against autograd over the reference's plain operations."""
    case = make_case(9, 5, 20, dtype=torch.float64, **options)
    got, want = leaves(case), leaves(case)
    out, h_n = recurrence(*got, **public_arguments(case))
    rest = (None,) * (3 - len(want))
    out_r, h_r = reference.forward(*want, *rest, case.rows, case.rule)
    torch.testing.assert_close(out, out_r)
    torch.testing.assert_close(h_n, h_r)
    (out.sin().sum() + h_n.cos().sum()).backward()
    (out_r.sin().sum() + h_r.cos().sum()).backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("activation", ["relu", "tanh", "none"])
@pytest.mark.parametrize("options", LAYOUTS, ids=name_of)
def test_the_backward_reference_is_the_derivative_of_the_forward_one(options, activation):
    case = make_case(5, 3, 4, dtype=torch.float64, activation=activation, **options)
    pre = case.pre.clone().requires_grad_()
    shape = (case.lengths.numel() if case.lengths is not None else 3, *case.pre.shape[-2:])
    h0 = (torch.zeros(shape, dtype=torch.float64) if case.h0 is None else case.h0).clone().requires_grad_()
    out, h_n = reference.forward(pre, case.weight, h0, case.rows, case.rule)
    grad_out, grad_h_n = torch.randn_like(out), torch.randn_like(h_n)
    want = torch.autograd.grad((out, h_n), (pre, h0), (grad_out, grad_h_n))
    got = reference.backward(grad_out, grad_h_n, case.weight, out, case.rows, case.rule)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_gradient_of_the_weight_by_the_tolerance_rule(dtype, groups):
    case = make_case(40, 7, 33, groups, dtype=dtype)
    out, _ = reference.forward(*case.arguments)
    grad = torch.randn_like(out)
    got = weight_gradient(grad, out, case.h0, ALL_ROWS, 0)
    states = torch.cat([case.h0[None], out[:-1]])
    plain = torch.einsum("tbgi,tbgj->gij", grad, states)
    exact = torch.einsum("tbgi,tbgj->gij", grad.double(), states.double())
    assert_within("dU", got, plain, exact, 3, 40 * 7)


def test_what_is_kept_for_backward_is_the_output_and_nothing_else():
    pre = torch.randn(50, 4, 1, 32)
    weight = torch.randn(1, 32, 32, requires_grad=True)
    h0 = torch.randn(4, 1, 32, requires_grad=True)
    kept = {}
    pack = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t)  # noqa: E731
    pre.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, _ = recurrence(pre, weight, h0)
    arguments = {t.untyped_storage().data_ptr() for t in (weight, h0)}
    storages = set(kept) - arguments
    assert storages == {out.untyped_storage().data_ptr()}
    assert pre.untyped_storage().data_ptr() not in kept


def test_a_training_step_of_the_module_keeps_the_input_and_one_output_per_layer():
    rin = fused_rin.RIN(16, 32, 2)
    x = torch.randn(50, 4, 16)
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in rin.parameters()}
    pack = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t)  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, _ = rin(x)
    elements = sum(t.numel() for pointer, t in kept.items() if pointer not in parameters)
    assert elements <= x.numel() + 2 * out.numel()


def test_operators_pass_opcheck():
    for options in ({}, {"layout": "lengths", "resets": True}, {"layout": "packed", "groups": 2, "num_reversed": 1}):
        case = make_case(4, 3, 5, **options)
        constants = (case.skip, case.activation, case.num_reversed, "auto")
        torch.library.opcheck(torch.ops.fused_rin.sweep_forward, (*case.tensors, *constants))
        differentiable = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in case.tensors]
        torch.library.opcheck(torch.ops.fused_rin.sweep_forward, (*differentiable, *constants))
        out = torch.randn_like(case.pre).detach()
        arguments = (torch.randn_like(out), None, case.weight.detach(), out, *case.tensors[3:])
        torch.library.opcheck(torch.ops.fused_rin.sweep_backward, (*arguments, *constants))


@pytest.mark.parametrize("flags", [[False, True, False], [True, True, False], [True, False, True]])
def test_any_recurrence_can_be_reversed(flags):
    case = make_case(6, 2, 4, 3, dtype=torch.float64)
    pre, weight, h0 = leaves(case)
    out, h_n = recurrence(pre, weight, h0, reverse=flags)
    for g, flag in enumerate(flags):
        one, h = recurrence(pre[:, :, g : g + 1], weight[g : g + 1], h0[:, g : g + 1], reverse=flag)
        torch.testing.assert_close(out[:, :, g : g + 1], one)
        torch.testing.assert_close(h_n[:, g : g + 1], h)
        flipped, _ = recurrence(pre.flip(0)[:, :, g : g + 1], weight[g : g + 1], h0[:, g : g + 1])
        torch.testing.assert_close(one, flipped.flip(0) if flag else one)


def test_resets_run_episodes_as_if_each_stood_alone():
    case = make_case(10, 1, 6, 2, dtype=torch.float64)
    starts = [0, 3, 4, 9, 10]
    resets = torch.zeros(10, 1, dtype=torch.bool)
    resets[starts[1:-1]] = True
    out, _ = recurrence(case.pre, case.weight, resets=resets, reverse=[False, True])
    for first, last in itertools.pairwise(starts):
        alone, _ = recurrence(case.pre[first:last], case.weight, reverse=[False, True])
        torch.testing.assert_close(out[first:last], alone)


def test_lengths_run_each_sequence_as_if_it_stood_alone():
    case = make_case(8, 4, 6, 2, dtype=torch.float64, layout="lengths")
    out, h_n = recurrence(case.pre, case.weight, case.h0, lengths=case.lengths.tolist(), reverse=[False, True])
    for b, length in enumerate(case.lengths.tolist()):
        alone, h = recurrence(case.pre[:length, b : b + 1], case.weight, case.h0[b : b + 1], reverse=[False, True])
        torch.testing.assert_close(out[:length, b : b + 1], alone)
        torch.testing.assert_close(h_n[b : b + 1], h)
        assert (out[length:, b] == 0).all()


def test_only_the_last_state_can_be_trained_on():
    """The gradient of `out` is then absent, not a tensor of zeros."""
    case = make_case(12, 3, 5, dtype=torch.float64)
    got, want = leaves(case), leaves(case)
    recurrence(*got)[1].square().sum().backward()
    recurrence(*want)[0][-1].square().sum().backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_strided_arguments_give_what_contiguous_ones_give():
    case = make_case(5, 3, 8, 2)
    want = recurrence(case.pre, case.weight, case.h0)
    pre = case.pre.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    weight = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert not pre.is_contiguous()
    for a, b in zip(recurrence(pre, weight, case.h0.clone()), want, strict=True):
        assert torch.equal(a, b)


def test_higher_transforms_go_through_the_reference():
    case = make_case(4, 3, 5, dtype=torch.float64, activation="tanh")
    weights = torch.stack([case.weight, 2 * case.weight])
    many = torch.func.vmap(lambda w: recurrence(case.pre, w)[0])(weights)
    torch.testing.assert_close(many[1], recurrence(case.pre, weights[1])[0])
    loss = lambda w, x: recurrence(x[:, None], w)[0].square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(case.weight, case.pre)
    torch.testing.assert_close(
        per_sample.sum(0), torch.func.grad(lambda w: recurrence(case.pre, w)[0].square().sum())(case.weight)
    )
    assert torch.autograd.gradcheck(
        lambda w: recurrence(case.pre, w)[0], case.weight.clone().requires_grad_(), check_forward_ad=True
    )


@pytest.mark.filterwarnings("error")
def test_deterministic_mode_changes_nothing():
    case = make_case(20, 3, 40)
    grads = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            tensors = leaves(case)
            recurrence(*tensors)[0].square().sum().backward()
            grads.append([t.grad for t in tensors])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def good():
    return {"pre": torch.randn(5, 3, 2, 4), "weight": torch.randn(2, 4, 4)}


PACKED = torch.randn(7, 2, 4)
BAD = [
    ({"pre": torch.randn(5, 3, 4)}, RuntimeError, r"pre must have 4 dimensions \[T, B, G, D\], got 3"),
    (
        {"pre": torch.zeros(5, 3, 2, 4, dtype=torch.int64)},
        ValueError,
        "pre must have a floating point dtype, got torch.int64",
    ),
    ({"weight": torch.randn(4, 4)}, RuntimeError, "weight must have 3 dimensions, got 2"),
    ({"weight": torch.randn(2, 4, 5)}, RuntimeError, r"Expected weight size \(2, 4, 4\), got \[2, 4, 5\]"),
    (
        {"weight": torch.randn(2, 4, 4).double()},
        ValueError,
        "weight must have the dtype of pre, torch.float32, got torch.float64",
    ),
    (
        {"weight": torch.empty(2, 4, 4, device="meta")},
        RuntimeError,
        "weight must be on the device of pre, cpu, got meta",
    ),
    ({"h0": torch.randn(2, 2, 4)}, RuntimeError, r"Expected h0 size \(3, 2, 4\), got \[2, 2, 4\]"),
    (
        {"activation": "gelu"},
        ValueError,
        "activation must be one of 'none', 'relu', 'tanh', 'sigmoid', 'softplus', 'leaky_relu', got 'gelu'",
    ),
    ({"backend": "tpu"}, ValueError, "backend must be one of 'auto', .*, got 'tpu'"),
    ({"lengths": [1, 2]}, RuntimeError, r"Expected lengths size \(3,\), got \[2\]"),
    ({"lengths": [1, 2, 6]}, ValueError, r"lengths must be in \[0, 5\], got values from 1 to 6"),
    ({"lengths": [-1, 2, 3]}, ValueError, r"lengths must be in \[0, 5\], got values from -1 to 3"),
    ({"lengths": torch.tensor([1.0, 2, 3])}, ValueError, "lengths must be integers .*, got torch.float32"),
    ({"resets": torch.zeros(5, 3)}, ValueError, "resets must have dtype torch.bool, got torch.float32"),
    ({"resets": torch.zeros(3, 5, dtype=torch.bool)}, RuntimeError, r"resets must have shape \(5, 3\), got \(3, 5\)"),
    ({"reverse": [True]}, RuntimeError, "reverse must have one bool per recurrence, 2, got 1"),
    ({"skip": math.nan}, ValueError, "skip must be finite, got nan"),
    (
        {"pre": PACKED, "batch_sizes": torch.tensor([3, 4])},
        ValueError,
        r"batch_sizes must be positive and not increase, got \[3, 4\]",
    ),
    (
        {"pre": PACKED, "batch_sizes": torch.tensor([4, 2])},
        RuntimeError,
        r"pre must have sum\(batch_sizes\) = 6 rows, got 7",
    ),
    ({"pre": PACKED, "batch_sizes": torch.tensor([4, 3]), "lengths": [1]}, ValueError, "exclude each other"),
    (
        {"pre": PACKED, "batch_sizes": torch.tensor([4.0, 3.0])},
        RuntimeError,
        "batch_sizes must be a 1-D int64 tensor on the CPU, got 1-D torch.float32",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[bad[2][:40] for bad in BAD])
def test_bad_arguments_are_named(change, error, text):
    with pytest.raises(error, match=text):
        recurrence(**{**good(), **change})
