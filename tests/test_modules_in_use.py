"""RIN and RINCell carried around: copies, casts, parametrizations, tied and shared weights, hooks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fused_rin import RIN, RINCell, replace_rnn

from tests.rnn_pairs import pair as _pair
from tests.rnn_pairs import same as _same


@pytest.mark.parametrize("module", [RIN(5, 6, 2, bidirectional=True, num_heads=2, skip=0.5), RINCell(5, 6, skip=0.5)])
def test_deepcopy_pickle_and_setstate(module):
    x = torch.randn(3, 5) if isinstance(module, RINCell) else torch.randn(4, 3, 5)
    expected = module(x)
    old = pickle.loads(pickle.dumps(module))
    state = module.__getstate__()
    state.pop("proj_size", None)  # RNNBase supplies what pickles of its early releases lack
    old.__setstate__(state)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), old):
        assert other.skip_factor == 0.5
        assert repr(other) == repr(module)
        for a, b in zip(_tuple(other(x)), _tuple(expected), strict=True):
            assert torch.equal(a, b)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_functional_call_uses_the_given_weights():
    torch.manual_seed(0)
    for module, x in (
        (RIN(5, 7), torch.randn(4, 3, 5)),
        (RIN(5, 7), torch.randn(1, 1, 5)),
        (RINCell(5, 7), torch.randn(1, 5)),
    ):
        other = {name: torch.randn_like(p) for name, p in module.named_parameters()}
        before = {name: p.clone() for name, p in module.named_parameters()}
        changed = copy.deepcopy(module)
        changed.load_state_dict({**module.state_dict(), **other})
        with torch.no_grad():
            _same(_tuple(torch.func.functional_call(module, other, (x,))), _tuple(changed(x)), rtol=0, atol=0)
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("steps", [1, 4])
def test_parametrizations_and_weight_norm(steps):
    x = torch.randn(steps, 1, 5)
    for normed in (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm):
        results = []
        for module in _pair():
            torch.manual_seed(1)
            normed(module, "weight_hh_l0").eval()
            loss = module(x)[0].square().sum()
            loss.backward()
            gradient = next(module.parametrizations.weight_hh_l0.parameters()).grad
            with torch.no_grad():
                results.append((*module(x), gradient))
        _same(*results)


def test_old_weight_norm():
    ours, theirs = (torch.nn.utils.weight_norm(module, "weight_hh_l0") for module in _pair())
    for steps in (1, 4):
        x = torch.randn(steps, 1, 5)
        with torch.no_grad():
            for module in (ours, theirs):
                module.weight_hh_l0_g.mul_(1.5)
            _same(ours(x), theirs(x))


@pytest.mark.parametrize("steps", [1, 4])
def test_tied_weights(steps):
    ours, theirs = _pair({"num_layers": 2})
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
    x = torch.randn(steps, 1, 5)
    results = []
    for module in (ours, theirs):
        out, h_n = module(x)
        results.append((out, h_n, torch.autograd.grad(out.square().sum(), module.weight_hh_l0)[0]))
    _same(*results)
    with torch.no_grad():
        _same(ours(x), theirs(x))
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 7


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("steps", [1, 4])
def test_casts(steps, cast):
    module = RIN(5, 7)
    cell = RINCell(5, 7)
    x = torch.randn(steps, 1, 5)
    expected, expected_cell = module(x)[0], cell(x[0])
    for move in (
        lambda m: m.to(cast),
        lambda m: getattr(m, {torch.float16: "half", torch.float64: "double"}.get(cast, "bfloat16"))(),
    ):
        cast_module, cast_cell = move(copy.deepcopy(module)), move(copy.deepcopy(cell))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                out, h_n = cast_module(x.to(cast))
                assert out.dtype == h_n.dtype == cast
                torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=1e-4)
                torch.testing.assert_close(cast_cell(x[0].to(cast)).float(), expected_cell, rtol=0.02, atol=1e-4)


def _add_one(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)


def test_shared_memory_and_data_parallel_replicas():
    """What another process does to shared weights is seen here by the next call, in the short way and the general."""
    module = RIN(5, 7).share_memory()
    assert all(p.is_shared() for p in module.parameters())
    expected = copy.deepcopy(module)
    _add_one(expected)
    inputs = torch.randn(1, 1, 5), torch.randn(4, 9, 5)
    with torch.no_grad():
        before = [module(x)[0] for x in inputs]
        child = torch.multiprocessing.get_context("fork").Process(target=_add_one, args=(module,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        for x, old in zip(inputs, before, strict=True):
            assert torch.equal(module(x)[0], expected(x)[0])
            assert not torch.equal(module(x)[0], old)
    x = torch.randn(1, 1, 5)
    with torch.no_grad():
        assert torch.equal(module(x)[0], copy.deepcopy(module)(x)[0])
    replica = module._replicate_for_data_parallel()
    for name in module._flat_weights_names:  # what torch.nn.parallel.replicate does
        setattr(replica, name, getattr(module, name).detach() * 2)
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
        torch.testing.assert_close(replica(x)[0], doubled(x)[0])


@pytest.mark.parametrize("swap", [False, True])
def test_conversion_by_swapping_parameters(swap):
    """torch.__future__ has a conversion that swaps parameters for converted ones under the same Python objects."""
    ours, theirs = _pair({"num_layers": 2})
    first = ours.weight_hh_l0
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for module in (ours, theirs):
            module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert first is ours.weight_hh_l0
    for steps in (1, 20):
        x = torch.randn(steps, 3, 5, dtype=torch.float64)
        with torch.no_grad():
            _same(ours(x), theirs(x))


def test_hooks_run_once():
    module, calls = RIN(5, 7), []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    with torch.no_grad():
        module(torch.randn(1, 1, 5))
    assert calls == ["before", "after"]


def test_deferred_initialisation_restores_the_mark():
    with torch.device("meta"):
        module = RIN(3, 4, skip=0.25)
        cell = RINCell(3, 4, skip=0.25)
    for made in (module, cell):
        made.to_empty(device="cpu")
        made.skip.fill_(float("nan"))
        made.reset_parameters()
        assert made.skip == 0.25


@pytest.mark.parametrize(
    "make", [lambda: RIN(3, 4, 2, dropout=0.1), lambda: RINCell(3, 4), lambda: replace_rnn(torch.nn.RNN(3, 4))]
)
def test_a_module_saved_whole_loads_with_weights_only(make, tmp_path):
    module = make().eval()
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=True)
    x = torch.randn(6, 3)
    for a, b in zip(module(x), loaded(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("module", [RIN(3, 4), RINCell(3, 4)])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripting_names_the_other_ways(module):
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile a RIN.*restore_rnn"):
        torch.jit.script(torch.nn.Sequential(module))
