"""Constraints on recurrent weights: kept in training, alone and together, with the values that formulas give."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_rin import RIN, RINCell, parametrize, recurrence
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached, register_parametrization

SIGNS = torch.tensor([1, 1, -1, 1, -1, -1])
MASK = (torch.arange(36).view(6, 6) % 3 > 0).int()


def constrained(*constraints: nn.Module, kind: type = RIN, **options) -> tuple[nn.Module, str]:
    module, name = kind(4, 6, **options), "weight_hh_l0" if kind is RIN else "weight_hh"
    with torch.no_grad():
        module.get_parameter(name).normal_(std=0.3)
    for constraint in constraints:
        register_parametrization(module, name, constraint)
    return module, name


def obeys_dale(weight: Tensor) -> bool:
    return bool((weight * SIGNS >= 0).all())


def obeys_mask(weight: Tensor) -> bool:
    return not weight[MASK == 0].any()


def has_no_self(weight: Tensor) -> bool:
    return not weight.diagonal().any()


def has_rank_2(weight: Tensor) -> bool:
    values = torch.linalg.svdvals(weight)
    return bool(values[1] > 1e-4) and bool(values[2] < 1e-6 * values[0])


def is_bounded(weight: Tensor) -> bool:
    return bool(torch.linalg.matrix_norm(weight, 2) < 0.7 * 1.01)


CONSTRAINTS = {
    "dale": (lambda: [parametrize.DaleLaw(SIGNS)], [obeys_dale]),
    "sparsity": (lambda: [parametrize.Sparsity(MASK)], [obeys_mask]),
    "no self": (lambda: [parametrize.NoSelfConnection()], [has_no_self]),
    "low rank": (lambda: [parametrize.LowRank(2)], [has_rank_2]),
    "bound": (lambda: [parametrize.SpectralNormBound(0.7, 3)], [is_bounded]),
    "all but one": (
        lambda: [
            parametrize.LowRank(2), parametrize.NoSelfConnection(), parametrize.Sparsity(MASK),
            parametrize.DaleLaw(SIGNS), parametrize.SpectralNormBound(0.7, 3),
        ],
        [obeys_dale, obeys_mask, has_no_self, is_bounded],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", [RIN, RINCell])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_holds_before_and_after_training(name, kind):
    make, checks = CONSTRAINTS[name]
    module, weight_name = constrained(*make(), kind=kind)
    assert all(check(getattr(module, weight_name)) for check in checks)
    before = getattr(module, weight_name).detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), 0.02)
    x = torch.randn(5, 3, 4) if kind is RIN else torch.randn(3, 4)
    for _ in range(5):
        optimizer.zero_grad()
        out = module(x, torch.rand(1, 3, 6) if kind is RIN else torch.rand(3, 6))
        (out[0] if kind is RIN else out).square().mean().backward()
        optimizer.step()
    after = getattr(module, weight_name)
    assert not torch.equal(before, after)
    assert all(check(after) for check in checks)


@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_module_computes_with_the_constrained_weight_and_its_gradients_arrive(name, skip):
    make, _ = CONSTRAINTS[name]
    module, _ = constrained(*make(), skip=skip)
    module.eval()  # the bound's vectors stay
    x = torch.randn(9, 3, 4)
    module(x)[0].sum().backward()
    chain = module.parametrizations.weight_hh_l0
    originals = [p for key, p in chain.named_parameters() if key.startswith("original")]
    leaves = [p.detach().clone().requires_grad_() for p in originals]
    weight = chain[0](*leaves)
    for constraint in list(chain)[1:]:
        weight = constraint(weight)
    pre = x @ module.weight_ih_l0.detach().T + module.bias_ih_l0.detach() + module.bias_hh_l0.detach()
    out, _ = recurrence(pre[:, :, None], weight[None], skip=skip, backend="reference")
    torch.testing.assert_close(module(x)[0], out[:, :, 0])
    out.sum().backward()
    for got, want in zip(originals, leaves, strict=True):
        assert want.grad.any()
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


def test_values():
    x = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    assert torch.equal(parametrize.DaleLaw(torch.tensor([-1, 1]))(x), torch.tensor([[-1.0, 2.0], [-3.0, 4.0]]))
    assert torch.equal(parametrize.Sparsity(torch.tensor([[1, 0], [1, 1]]))(x), torch.tensor([[1.0, 0.0], [-3.0, 4.0]]))
    assert torch.equal(parametrize.NoSelfConnection()(x), torch.tensor([[0.0, -2.0], [-3.0, 0.0]]))
    low = parametrize.LowRank(1)
    m, n = low.right_inverse(x)
    left, values, right = torch.linalg.svd(x)
    torch.testing.assert_close(low(m, n), values[0] * left[:, :1] * right[:1])
    torch.testing.assert_close(m.norm(), n.norm())
    bound = parametrize.SpectralNormBound(2.0)
    torch.testing.assert_close(bound(bound.right_inverse(x)), x * 2 / values[0])
    loose = parametrize.SpectralNormBound(100.0)
    assert torch.equal(loose(loose.right_inverse(x)), x)


def test_an_inf_or_nan_under_a_mask_is_no_connection():
    weight = torch.full((6, 6), torch.inf)
    assert obeys_mask(parametrize.Sparsity(MASK)(weight))
    assert has_no_self(parametrize.NoSelfConnection()(weight))


def test_every_head_is_a_matrix_of_its_own():
    heads = torch.randn(3, 4, 4)
    weight, signs = heads.view(12, 4), torch.randint(0, 2, (12,)) * 2 - 1
    for make in (
        lambda h: parametrize.DaleLaw(signs.view(3, 4)[h] if h is not None else signs),
        lambda h: parametrize.NoSelfConnection(),
        lambda h: parametrize.LowRank(2),
        lambda h: parametrize.SpectralNormBound(0.5),
    ):
        together = make(None)
        parts = together.right_inverse(weight)
        got = together(*parts) if isinstance(parts, tuple) else together(parts)
        assert got.shape == weight.shape
        for h in range(3):
            alone = make(h)
            parts = alone.right_inverse(heads[h])
            want = alone(*parts) if isinstance(parts, tuple) else alone(parts)
            torch.testing.assert_close(got.view(3, 4, 4)[h], want, rtol=1e-3, atol=1e-4)
    module = RIN(3, 12, num_heads=3)
    register_parametrization(module, "weight_hh_l0", parametrize.DaleLaw(signs))
    assert (module.weight_hh_l0.view(3, 4, 4) * signs.view(3, 1, 4) >= 0).all()
    module(torch.randn(4, 2, 3))[0].sum().backward()


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_state_dicts_copies_and_caching(name):
    make, _ = CONSTRAINTS[name]
    module, _ = constrained(*make())
    other, _ = constrained(*make())
    other.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, 4)
    module.eval(), other.eval()
    want = module(x)[0]
    assert torch.equal(other(x)[0], want)
    assert torch.equal(copy.deepcopy(module)(x)[0], want)
    with cached():
        assert torch.equal(module(x)[0], want)
        assert torch.equal(module(x)[0], want)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_export(name):
    make, _ = CONSTRAINTS[name]
    module, _ = constrained(*make())
    module.eval()
    x = torch.randn(5, 3, 4)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x)[0], module(x)[0])


def test_two_evaluations_before_a_backward():
    """Each with the vectors that it had, though the second one moved them."""
    module, _ = constrained(parametrize.SpectralNormBound(0.7))
    x = torch.randn(5, 3, 4)
    first = module(x)[0].sum()
    module(x)
    first.backward()
    assert module.parametrizations.weight_hh_l0.original.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: parametrize.DaleLaw(torch.tensor([1, 0])), r"signs: expected 1 or -1 for every unit, got \[0, 1\]"),
        (lambda: parametrize.DaleLaw(torch.ones(2, 2)), r"signs: expected one dimension, got shape \(2, 2\)"),
        (lambda: constrained(parametrize.DaleLaw(torch.ones(5))), "signs: expected 6 of them, .*, got 5"),
        (lambda: parametrize.Sparsity(torch.tensor([[0.5, 1.0]])), r"mask: expected 0 and 1, got \[0.5, 1.0\]"),
        (lambda: constrained(parametrize.Sparsity(torch.ones(6, 5))), r"mask: expected shape \(6, 6\), got \(6, 5\)"),
        (lambda: parametrize.LowRank(0), "rank: expected 1 or more, got 0"),
        (lambda: constrained(parametrize.LowRank(7)), "rank: expected at most the 6 units of a head, got 7"),
        (lambda: parametrize.LowRank(1).right_inverse(torch.zeros(3, 3)), "expected a weight other than 0"),
        (lambda: parametrize.SpectralNormBound(0.0), "bound: expected a positive number, got 0.0"),
        (lambda: parametrize.SpectralNormBound(float("inf")), "bound: expected a positive number, got inf"),
        (lambda: parametrize.SpectralNormBound(1.0, 0), "n_power_iterations: expected 1 or more, got 0"),
        (lambda: parametrize.NoSelfConnection()(torch.ones(3, 4)), r"a recurrent weight .* got shape \(3, 4\)"),
    ],
)  # fmt: skip
def test_bad_input_names_what_was_expected(make, text):
    with pytest.raises(ValueError, match=text):
        make()
