"""Muon: its steps against the singular value decomposition and against torch's own."""

import pytest
import torch
from fused_rin.experiments.training.muon import Muon, orthogonalize
from torch import nn

SHAPES = [(16, 16), (100, 100), (12, 40), (40, 12), (3, 8, 8)]


def matrices(shape, seed=0):
    """Random ones with singular values from 1 down to 0.01 of the largest."""
    source = torch.Generator().manual_seed(seed)
    u, s, vt = torch.linalg.svd(torch.randn(shape, generator=source, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -2, s.shape[-1], dtype=torch.float64).expand_as(s)
    return u @ torch.diag_embed(s) @ vt, u @ vt


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_come_near_1_and_the_singular_vectors_stay(shape, scale):
    matrix, polar = matrices(shape)
    found = orthogonalize(scale * matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.68
    assert values.max() < 1.21
    # With the same singular vectors, polar^T found is symmetric, and it is positive.
    product = polar.mT @ found
    torch.testing.assert_close(product, product.mT, rtol=0, atol=1e-9)
    assert torch.linalg.eigvalsh(product).min() > -1e-9
    torch.testing.assert_close(orthogonalize((scale * matrix).float()).double(), found, rtol=0, atol=1e-3)


def test_of_nothing_comes_nothing():
    assert torch.equal(orthogonalize(torch.zeros(4, 4)), torch.zeros(4, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (12, 40)], ids=str)
def test_the_steps_are_those_of_torch(shape):
    """Theirs are computed in bfloat16."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = Muon([ours], lr=0.01, momentum=0.9), torch.optim.Muon([theirs], lr=0.01, momentum=0.9, weight_decay=0)
    for step in range(5):
        before = ours.detach().clone(), theirs.detach().clone()
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = matrices(shape, seed=step)[0].float()
            optimizer.step()
        steps = [weight.detach() - old for weight, old in zip((ours, theirs), before, strict=True)]
        assert (steps[0] - steps[1]).norm() < 0.05 * steps[0].norm()
    assert (ours - start).norm() > 0.01


def test_a_step_has_the_spectral_norm_of_the_rate_whatever_the_gradient():
    for scale in (1e-8, 1.0, 1e8):
        weight = nn.Parameter(torch.zeros(20, 20))
        weight.grad = scale * torch.ones(20, 20)  # Adam's step with rate r has a spectral norm of 20 r here
        Muon([weight], lr=0.01).step()
        assert 0.0068 < torch.linalg.matrix_norm(weight.detach(), 2) < 0.0121


def test_a_rate_in_a_tensor_and_groups_of_their_own():
    a, b, idle = (nn.Parameter(torch.zeros(4, 4)) for _ in range(3))
    optimizer = Muon([{"params": [a, idle], "lr": torch.tensor(0.02)}, {"params": [b], "lr": 0.01}])
    a.grad, b.grad = torch.eye(4), torch.eye(4)
    assert optimizer.step(lambda: 7) == 7
    torch.testing.assert_close(a.detach(), 2 * b.detach())
    assert b.detach().norm() > 0.01
    assert torch.equal(idle.detach(), torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and less than 1, got 1.0"),
        ({"params": [nn.Parameter(torch.ones(3))]}, r"for matrices, got a parameter of shape \[3\]"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(**{"params": [nn.Parameter(torch.ones(2, 2))], **options})
