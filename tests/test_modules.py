"""RIN and RINCell as modules: construction, attributes, the forward call and its errors, beside torch.nn.RNN."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from fused_rin import RIN, RINCell, recurrence
from torch import nn
from torch.nn.utils import rnn as rnn_utils

from tests.rnn_pairs import MODES
from tests.rnn_pairs import pair as _pair
from tests.rnn_pairs import same as _same

# ---- construction, attributes ----


def test_signature_extends_torchs():
    ours = list(inspect.signature(RIN.__init__).parameters)
    documented = ["self", "input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first", "dropout"]
    assert ours[:8] == documented
    assert ours[8:11] == ["bidirectional", "device", "dtype"]
    kinds = inspect.signature(RIN.__init__).parameters
    assert all(kinds[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours[11:])
    torch_cell = list(inspect.signature(nn.RNNCell.__init__).parameters)
    assert list(inspect.signature(RINCell.__init__).parameters)[: len(torch_cell)] == torch_cell


@pytest.mark.parametrize("options", MODES)
def test_attributes_and_parameters_are_torchs(options):
    ours, theirs = _pair(options)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    for name in (*nn.RNNBase.__constants__, "nonlinearity"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [[w.shape for w in ws] for ws in theirs.all_weights]
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert ours.flatten_parameters() is None
    assert repr(ours) == repr(theirs).replace("RNN(", "RIN(").replace(")", ", nonlinearity=?, skip=0)").replace(
        ", nonlinearity=?", ""
    )
    assert isinstance(ours, nn.RNNBase)


def test_repr_names_what_differs():
    module = RIN(2, 4, nonlinearity="tanh", skip=0.5, num_heads=2, backend="reference")
    assert repr(module) == "RIN(2, 4, nonlinearity=tanh, skip=0.5, num_heads=2, backend=reference)"
    assert repr(RINCell(2, 4, bias=False)) == "RINCell(2, 4, bias=False)"
    assert repr(RINCell(2, 4, backend="cpu")) == "RINCell(2, 4, backend=cpu)"


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    for module in (RIN(300, 400), RINCell(300, 400)):
        for name, parameter in module.state_dict().items():
            if name == "skip":
                continue
            if name.startswith("bias"):
                assert torch.count_nonzero(parameter) == 0
            else:
                assert parameter.mean().abs() < 1e-5
                assert parameter.std() == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"nonlinearity": "gelu"}, ValueError, "Unknown nonlinearity 'gelu'. Select from 'tanh' or 'relu'."),
        ({"dropout": 1.5}, ValueError, r"dropout should be a number in range \[0, 1\]"),
        ({"dropout": True}, ValueError, r"dropout should be a number in range \[0, 1\]"),
        ({"skip": "1"}, TypeError, "skip should be a number, got: str"),
        ({"num_heads": 2}, ValueError, "hidden_size must be divisible by num_heads, got 7 and 2"),
        ({"num_heads": 0}, ValueError, "num_heads must be greater than zero, got 0"),
        ({"num_heads": 1.0}, TypeError, "num_heads should be of type int, got: float"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .* got 'gpu'"),
    ],
)
def test_bad_construction(arguments, error, text):
    with pytest.raises(error, match=text):
        RIN(5, 7, **arguments)


@pytest.mark.parametrize(("sizes", "name"), [((0, 3), "input_size"), ((3, -1), "hidden_size")])
def test_bad_cell_sizes(sizes, name):
    with pytest.raises(ValueError, match=f"{name} must be greater than zero"):
        RINCell(*sizes)


# ---- forward ----


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (1, 1), (4, 0)])
@pytest.mark.parametrize("options", MODES)
def test_forward_is_torchs(options, shape, nonlinearity):
    ours, theirs = _pair(options, nonlinearity=nonlinearity)
    steps, batch = shape
    x = torch.randn(batch, steps, 5) if ours.batch_first else torch.randn(steps, batch, 5)
    expected = theirs(x)
    h0 = torch.randn_like(expected[1])
    for hx in (None, h0):
        out, wanted = ours(x, hx), theirs(x, hx)
        _same(out, wanted)
        assert out[1].is_contiguous()
        with torch.no_grad():
            _same(ours(x, hx), wanted)


@pytest.mark.parametrize("options", MODES)
def test_unbatched_is_torchs(options):
    ours, theirs = _pair(options)
    for steps in (1, 4):
        x = torch.randn(steps, 5)
        h0 = torch.randn(theirs(x)[1].shape)
        for hx in (None, h0):
            _same(ours(x, hx), theirs(x, hx))
            with torch.no_grad():
                _same(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("with_hx", [True, False])
@pytest.mark.parametrize("options", MODES)
def test_packed_is_torchs(options, with_hx, enforce_sorted):
    ours, theirs = _pair(options, torch.float64)
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4]
    rows = [torch.randn(n, 5, dtype=torch.float64) for n in lengths]
    states = ours.num_layers * (2 if ours.bidirectional else 1)
    hx = torch.randn(states, 4, 7, dtype=torch.float64) if with_hx else None
    results = []
    for module in (ours, theirs):
        leaves = [row.clone().requires_grad_() for row in rows]
        state = None if hx is None else hx.clone().requires_grad_()
        packed = rnn_utils.pack_sequence(leaves, enforce_sorted=enforce_sorted)
        out, h_n = module(packed, state)
        (out.data.sin().sum() + h_n.cos().sum()).backward()
        grads = [leaf.grad for leaf in leaves] + ([] if state is None else [state.grad])
        results.append([out, h_n, *grads, *(p.grad for p in module.parameters())])
    _same(*results)


def test_packed_computes_no_padding(monkeypatch):
    """One sequence of 1,000 steps and 63 of one: 1,063 rows reach the kernels, not 64,000."""
    from fused_rin import cpu, ops

    seen = []

    def spy(original):
        return lambda x, *rest, **options: (seen.append(tuple(x.shape)), original(x, *rest, **options))[1]

    for module, name in ((cpu, "layer_forward"), (ops, "_direct_forward")):
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    packed = rnn_utils.pack_sequence([torch.randn(n, 3) for n in [1000] + [1] * 63])
    for backend, shapes in (("auto", [(1063, 3), (1063, 4)]), ("reference", [(1063, 4)] * 2)):
        seen.clear()
        with torch.no_grad():
            RIN(3, 4, num_layers=2, backend=backend)(packed)
        assert seen == shapes


def test_packed_with_wrong_arguments():
    ours, theirs = _pair()
    packed = rnn_utils.pack_sequence([torch.randn(3, 5), torch.randn(2, 5)])
    for hx in (torch.zeros(1, 3, 7), torch.zeros(2, 7), torch.zeros(1, 2, 6)):
        messages = []
        for module in (ours, theirs):
            with pytest.raises(RuntimeError, match="Expected hidden size") as caught:
                module(packed, hx)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="lengths cannot be given with a PackedSequence"):
        ours(packed, lengths=[3, 2])
    with pytest.raises(RuntimeError, match=r"resets must have shape \(5,\), got \(3, 2\)"):
        ours(packed, resets=torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="Expected 5, got 4"):
        ours(rnn_utils.pack_sequence([torch.randn(3, 4)]))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        ours(rnn_utils.pack_sequence([torch.randn(3, 5).double()]))


@pytest.mark.parametrize("options", MODES)
def test_gradients_accumulate(options):
    """Two batches before a step of the optimizer: no two gradients may be the same memory."""
    results = []
    for module in _pair(options):
        torch.manual_seed(1)
        for _ in range(3):
            module(torch.randn(4, 3, 5))[0].square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    _same(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("options", MODES)
def test_carried_state_may_be_detached_in_place(options, steps):
    """Truncated backpropagation as it is often written."""
    losses = []
    for module in _pair(options):
        x, h, run = torch.randn(3, steps, 2, 5, generator=torch.Generator().manual_seed(0)), None, []
        for part in x:
            out, h = module(part.transpose(0, 1) if module.batch_first else part, h)
            loss = out.square().mean()
            loss.backward()
            h.detach_()
            run.append(loss.detach())
        losses.append(run + [p.grad for p in module.parameters()])
    _same(*losses)


def test_the_output_is_kept_for_backward():
    """As by torch.nn.RNN on cuDNN: whoever changes it in place before backward is told, not given wrong gradients."""
    out, _ = RIN(5, 7)(torch.randn(4, 3, 5))
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with torch.no_grad():
        out, _ = RIN(5, 7)(torch.randn(4, 3, 5))
        out.mul_(2)


def test_dropout_draws_torchs_masks():
    ours, theirs = _pair({"num_layers": 3, "dropout": 0.5})
    x = torch.randn(6, 4, 5)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        results.append(module(x))
    _same(*results)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    _same(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours(x)[0], ours(x)[0])
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        RIN(2, 3, dropout=0.5)


@pytest.mark.parametrize("bad", ["rank", "features", "dtype", "hx rank", "hx size", "hx unbatched", "steps"])
def test_errors_are_torchs(bad):
    ours, theirs = _pair()
    x, hx = torch.randn(4, 3, 5), torch.zeros(1, 3, 7)
    if bad == "rank":
        x = x[None]
    elif bad == "features":
        x = torch.randn(4, 3, 6)
    elif bad == "dtype":
        x = x.double()
    elif bad == "hx rank":
        hx = hx[0]
    elif bad == "hx size":
        hx = torch.zeros(1, 2, 7)
    elif bad == "hx unbatched":
        x = x[:, 0]
    elif bad == "steps":
        x = x[:0]
    caught = []
    for module in (theirs, ours):
        with pytest.raises((RuntimeError, ValueError)) as info:
            module(x, hx)
        caught.append((info.type, str(info.value)))
    if bad == "dtype":  # torch reworded this one after 2.6; both sides are named in any case
        assert caught[0][0] is caught[1][0]
        assert all("torch.float32" in text and "torch.float64" in text for _, text in caught)
    else:
        assert caught[0] == caught[1]


def test_mixed_dtypes_and_devices_are_named():
    module, x = RIN(5, 7), torch.randn(4, 3, 5)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"hx must have the dtype of input, torch.float32, got torch.float64"):
        module(x, torch.zeros(1, 3, 7).double())
    with pytest.raises(RuntimeError, match="input must be on the device of the weights, cpu, got meta"):
        module(x.to("meta"))
    with pytest.raises(RuntimeError, match="hx must be on the device of input, cpu, got meta"):
        module(x, torch.zeros(1, 3, 7, device="meta"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.weight_hh_l0.data = module.weight_hh_l0.data.double()
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 must have dtype torch.float32, got torch.float64"):
        module(x)
    cell = RINCell(5, 7)
    cell.weight_hh.data = cell.weight_hh.data.double()
    with pytest.raises(RuntimeError, match=r"weight_hh must have dtype torch.float32, got torch.float64"):
        cell(x[0], torch.zeros(3, 7))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match=f"hx must have the dtype of input, {dtype}, got torch.float64"):
            RINCell(5, 7, dtype=dtype)(x[0].to(dtype), torch.zeros(3, 7).double())


def test_skip_and_heads_against_the_formula():
    torch.manual_seed(0)
    module = RIN(5, 6, num_heads=2, skip=0.7, nonlinearity="tanh", dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, h = torch.randn(5, 3, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    u = torch.block_diag(*module.weight_hh_l0.chunk(2))
    expected, state = [], h
    for t in range(5):
        state = torch.tanh(
            x[t] @ module.weight_ih_l0.T + module.bias_ih_l0 + state @ u.T + module.bias_hh_l0 + 0.7 * state
        )
        expected.append(state)
    torch.testing.assert_close(module(x, h[None])[0], torch.stack(expected))
    with torch.no_grad():
        torch.testing.assert_close(module(x[:1], h[None])[0][0], expected[0])


def test_module_and_function_agree():
    """RIN is recurrence() over W x + b, whatever the layout."""
    torch.manual_seed(0)
    module = RIN(5, 7, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    pre = nn.functional.linear(x, module.weight_ih_l0, module.bias_ih_l0 + module.bias_hh_l0)
    out, h_n = recurrence(pre[:, :, None], module.weight_hh_l0[None])
    torch.testing.assert_close(module(x)[0], out[:, :, 0])
    torch.testing.assert_close(module(x)[1][0], h_n[:, 0])


@pytest.mark.parametrize(
    ("bias", "nonlinearity", "batched"), list(itertools.product([True, False], ["relu", "tanh"], [True, False]))
)
def test_cell_is_torchs(bias, nonlinearity, batched):
    torch.manual_seed(0)
    theirs = nn.RNNCell(5, 7, bias=bias, nonlinearity=nonlinearity)
    ours = RINCell(5, 7, bias=bias, nonlinearity=nonlinearity, skip=0)
    ours.load_state_dict(theirs.state_dict())
    for batch in (1, 3, 9):
        x, h = torch.randn(batch, 5), torch.randn(batch, 7)
        if not batched:
            x, h = x[0], h[0]
        for state in (h, None):
            torch.testing.assert_close(ours(x, state), theirs(x, state))
            with torch.no_grad():
                torch.testing.assert_close(ours(x, state), theirs(x, state))


# ---- what code around nn.RNN does to it ----


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_write_to_flat_weights_is_computed_with(options, steps):
    """Dropout of weights writes there; a later write to the attribute counts again, as in torch."""
    ours, theirs = _pair(options)
    x = torch.randn(3, steps, 5) if options.get("batch_first") else torch.randn(steps, 3, 5)
    other = [torch.randn_like(p) * 0.3 for p in theirs.parameters()]
    for module in (ours, theirs):
        module._flat_weights = [w.clone() for w in other]
    _same(ours(x)[0], theirs(x)[0])
    for module in (ours, theirs):
        module._flat_weights[0] = torch.zeros_like(module._flat_weights[0])
    _same(ours(x)[0], theirs(x)[0])
    for module in (ours, theirs):
        for name, value in zip(module._flat_weights_names, other, strict=True):
            setattr(module, name, nn.Parameter(value * 2))
    _same(ours(x)[0], theirs(x)[0])
    assert ours._written_weights is None


@pytest.mark.parametrize("options", [*MODES, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "batch_first": True}])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize("where", ["", "autocast", "reference"])
def test_results_may_be_detached_in_place(options, shape, where):
    """No views: truncated backpropagation calls detach_() on what comes back."""
    module = RIN(5, 7, **options, backend=where if where == "reference" else "auto")
    x = torch.randn(*shape, 5, dtype=options.get("dtype", torch.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
        for result in module(x):
            result.detach_()
    cell = RINCell(5, 7, dtype=x.dtype, backend=where if where == "reference" else "auto")
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
        cell(x[0]).detach_()
        cell(x[0], torch.rand(shape[1], 7, dtype=x.dtype)).detach_()


def test_batch_first_output_is_kept_for_backward():
    module = RIN(3, 4, batch_first=True)
    out, _ = module(torch.randn(2, 9, 3))
    assert not out._is_view()
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_a_cell_without_state_has_all_its_weights_in_the_graph(skip, dtype):
    """Their gradient is zero, as nn.RNNCell's: wrappers that wait for every gradient would else wait for ever."""
    cell = RINCell(3, 4, skip=skip, dtype=dtype)
    grads = torch.autograd.grad(cell(torch.randn(2, 3, dtype=dtype)).sum(), list(cell.parameters()))
    assert torch.equal(grads[1], torch.zeros_like(cell.weight_hh))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_an_infinity_in_u_reaches_the_first_step(nonlinearity, value):
    """From no state too, since 0 * inf is NaN; but for short calls without gradients, as the migration page says."""
    ours, theirs = _pair(nonlinearity=nonlinearity)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight_hh_l0[2, 3] = value
    x = torch.randn(20, 3, 5)
    got, want = ours(x)[0], theirs(x)[0]
    assert want[0].isnan().any()
    assert torch.equal(got.isnan(), want.isnan())
    ours_cell = RINCell(5, 7, nonlinearity=nonlinearity, skip=0.0)
    with torch.no_grad():
        ours_cell.weight_hh[2, 3] = value
    assert ours_cell(x[0])[:, 2].isnan().all()


@pytest.mark.parametrize("options", MODES)
def test_with_skip_0_it_is_initialised_as_torch(options):
    """The same numbers from the same seed, in the constructor and in reset_parameters()."""
    made = []
    for make in (lambda: RIN(5, 7, skip=0.0, **options), lambda: nn.RNN(5, 7, **options)):
        torch.manual_seed(3)
        module = make()
        first = [p.detach().clone() for p in module.parameters()]
        torch.manual_seed(4)
        module.reset_parameters()
        made.append([*first, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    torch.manual_seed(3)
    cell = RINCell(5, 7, skip=0.0)
    torch.manual_seed(3)
    assert torch.equal(cell.weight_hh, nn.RNNCell(5, 7).weight_hh)
