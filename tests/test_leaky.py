"""LeakyRNN, PLRNN and their cells: equations, shapes and habits of torch.nn.RNN, and the networks of public code."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from fused_rin import PLRNN, LeakyRNN, LeakyRNNCell, PLRNNCell, explain, parametrize
from fused_rin.problem import ACTIVATIONS
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.rnn_pairs import MODES

ALPHA = torch.linspace(0.1, 0.9, 6)
KINDS = [
    pytest.param(lambda **o: LeakyRNN(4, 6, alpha=0.3, **o), id="rate"),
    pytest.param(lambda **o: LeakyRNN(4, 6, alpha=ALPHA, train_alpha=True, **o), id="rate-trained"),
    pytest.param(lambda **o: LeakyRNN(4, 6, alpha=ALPHA, form="current", **o), id="current"),
    pytest.param(lambda **o: LeakyRNN(4, 6, alpha=0.3, train_alpha=True, form="current", **o), id="current-trained"),
    pytest.param(lambda **o: PLRNN(4, 6, **o), id="plrnn"),
]


def one_step(module, number, reverse=False):
    """The step of a layer by the equation in the docstring, as a function of (x, h)."""
    suffix = f"l{number}{'_reverse' if reverse else ''}"
    w, u = (getattr(module, f"weight_{kind}_{suffix}") for kind in ("ih", "hh"))
    b = 0
    if module.bias:
        b = getattr(module, f"bias_ih_{suffix}") + getattr(module, f"bias_hh_{suffix}")
    act = {**vars(torch.nn.functional), "none": lambda a: a}[module.nonlinearity]
    if isinstance(module, PLRNN):
        return lambda x, h: getattr(module, f"skip_{suffix}") * h + act(h) @ u.T + x @ w.T + b
    alpha = torch.sigmoid(getattr(module, f"logit_alpha_{suffix}")) if module.train_alpha else module.alpha
    if module.form == "rate":
        return lambda x, h: (1 - alpha) * h + alpha * act(x @ w.T + h @ u.T + b)
    return lambda x, h: (1 - alpha) * h + alpha * (x @ w.T + act(h) @ u.T + b)


def by_loop(module, x, hx):
    """All layers, x [T, B, I], hx [layers * directions, B, D]."""
    act = {**vars(torch.nn.functional), "none": lambda a: a}[module.nonlinearity]
    rates = isinstance(module, LeakyRNN) and module.form == "rate"
    last, index = [], 0
    for number in range(module.num_layers):
        x, outs = x if rates or not number else act(x), []
        for reverse in (False, True)[: 2 if module.bidirectional else 1]:
            step, h, states = one_step(module, number, reverse), hx[index], []
            for t in range(len(x) - 1, -1, -1) if reverse else range(len(x)):
                h = step(x[t], h)
                states.append(h)
            outs.append(torch.stack(states[::-1] if reverse else states))
            last.append(h)
            index += 1
        x = torch.cat(outs, -1)
    return x, torch.stack(last)


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("make", KINDS)
def test_modules_are_their_equations(make, options):
    """Outputs and the gradients of all parameters, in float64, fused and by operators."""
    module = make(nonlinearity="tanh", dtype=torch.float64, **options)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(module.num_layers * (2 if module.bidirectional else 1), 3, 6, dtype=torch.float64)
    want = by_loop(module, x, hx)
    given = [x, *module.parameters()]
    wanted = torch.autograd.grad(want[0].square().sum() + want[1].sum(), given)
    for backend in ("auto", "reference"):
        module.backend = backend
        out, h_n = module(x.transpose(0, 1) if module.batch_first else x, hx)
        out = out.transpose(0, 1) if module.batch_first else out
        torch.testing.assert_close((out, h_n), want)
        for a, b in zip(torch.autograd.grad(out.square().sum() + h_n.sum(), given), wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
@pytest.mark.parametrize("make", KINDS)
def test_a_cell_takes_the_same_steps(make, nonlinearity):
    module = make(nonlinearity=nonlinearity)
    if isinstance(module, PLRNN):
        cell = PLRNNCell(4, 6, nonlinearity=nonlinearity)
    else:
        alpha = module.alphas()[0].detach()
        cell = LeakyRNNCell(
            4, 6, nonlinearity=nonlinearity, alpha=alpha, train_alpha=module.train_alpha, form=module.form
        )
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()}, strict=True)
    x, h = torch.randn(5, 3, 4), None
    out, h_n = module(x)
    for t in range(5):
        h = cell(x[t], h)
        torch.testing.assert_close(h, out[t])
    torch.testing.assert_close(h, h_n[0])
    torch.testing.assert_close(cell(x[0, 0]), cell(x[0])[0])
    torch.testing.assert_close(cell(x[0, 0], h[0]), cell(x[0], h)[0])


@pytest.mark.parametrize("make", KINDS)
def test_packed_lengths_resets_and_unbatched(make):
    module = make(bidirectional=True, nonlinearity="softplus")
    x, lengths = torch.randn(6, 3, 4), torch.tensor([6, 2, 4])
    out, h_n = module(x, lengths=lengths)
    packed, packed_h = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], out)
    torch.testing.assert_close(packed_h, h_n)
    for b, length in enumerate(lengths):
        alone, alone_h = module(x[:length, b])
        torch.testing.assert_close(out[:length, b], alone)
        assert not out[length:, b].any()
        torch.testing.assert_close(h_n[:, b], alone_h)
    resets = torch.zeros(6, 3, dtype=torch.bool)
    resets[2] = True
    cut, _ = module(x, resets=resets)
    torch.testing.assert_close(cut, torch.cat([module(x[:2])[0], module(x[2:])[0]]))


def test_heads_do_not_see_each_other():
    module = LeakyRNN(4, 6, alpha=ALPHA, num_heads=2, nonlinearity="tanh", form="current")
    assert module.weight_hh_l0.shape == (6, 3)
    x = torch.randn(5, 2, 4)
    out, _ = module(x)
    with torch.no_grad():
        module.weight_hh_l0[3:] += 1
    changed, _ = module(x)
    torch.testing.assert_close(changed[..., :3], out[..., :3])
    assert not torch.allclose(changed[..., 3:], out[..., 3:])


@pytest.mark.parametrize("make", KINDS)
def test_modules_are_saved_copied_and_drawn_anew(make):
    module, x = make(), torch.randn(5, 2, 4)
    want = module(x)[0]
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    other = make()
    other.load_state_dict(module.state_dict())
    for copied in (torch.load(saved, weights_only=True), copy.deepcopy(module), other):
        assert torch.equal(copied(x)[0], want)
    started = {name: value.clone() for name, value in module.named_parameters() if "weight" not in name}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    module.reset_parameters()
    for name, value in module.named_parameters():
        if "alpha" in name or "skip" in name:
            assert torch.equal(value, started[name])
        else:
            assert value.abs().max() <= 1 / math.sqrt(6)


def test_time_constants_and_what_is_trained():
    a = LeakyRNN(4, 6, tau=torch.linspace(10, 60, 6), dt=5)
    torch.testing.assert_close(a.alpha, 5 / torch.linspace(10, 60, 6))
    assert [name for name, _ in a.named_parameters()] == [name for name, _ in torch.nn.RNN(4, 6).named_parameters()]
    b = LeakyRNN(4, 6, 2, alpha=0.25, train_alpha=True)
    torch.testing.assert_close(b.alphas(1)[0].item(), 0.25)
    optimizer = torch.optim.SGD(b.parameters(), lr=100.0)
    for _ in range(3):
        optimizer.zero_grad()
        b(torch.randn(5, 2, 4))[0].square().sum().backward()
        optimizer.step()
    assert b.logit_alpha_l0 != b.logit_alpha_l1
    assert 0 < b.alphas()[0] < 1
    assert "alpha=0.25" in repr(LeakyRNN(4, 6, alpha=0.25))
    assert "train_alpha=True, form=current" in repr(LeakyRNN(4, 6, alpha=0.25, train_alpha=True, form="current"))
    assert "nonlinearity=softplus" in repr(PLRNNCell(4, 6, nonlinearity="softplus"))


@pytest.mark.parametrize("kind", [LeakyRNN, LeakyRNNCell])
@pytest.mark.parametrize("options", [{}, {"noise_after": True}, {"form": "current"}], ids=str)
def test_noise_moves_a_unit_by_its_standard_deviation(kind, options):
    """sqrt(2 alpha) sigma, per unit; the mean stays. 20,000 rows: the deviation is known to half a percent."""
    alpha = torch.tensor([0.1, 0.5, 1.0])
    module = kind(1, 3, alpha=alpha, nonlinearity="none", noise=0.3, **options)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    module.eval()  # it is no regularisation: it stays
    x, h = torch.zeros(20_000, 1), torch.ones(20_000, 3)

    def step():
        return module(x, h) if kind is LeakyRNNCell else module(x[None], h[None])[1][0]

    torch.manual_seed(5)
    moved = step()
    torch.testing.assert_close(moved.std(0), torch.sqrt(2 * alpha) * 0.3, rtol=0.02, atol=0)
    torch.testing.assert_close(moved.mean(0), 1 - alpha, rtol=0, atol=0.02)
    torch.manual_seed(5)
    assert torch.equal(step(), moved)
    assert not torch.equal(step(), moved)
    module.noise = 0.0
    torch.testing.assert_close(step(), (1 - alpha).expand(20_000, 3))


def test_noise_within_the_activation_passes_through_it_and_gradients_pass_by_it():
    torch.manual_seed(1)
    module = LeakyRNN(4, 6, alpha=0.5, noise=0.2, dtype=torch.float64, nonlinearity="tanh")
    x, hx = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(1, 2, 6, dtype=torch.float64)
    torch.manual_seed(2)
    out, _ = module(x, hx)
    torch.manual_seed(2)
    xi = torch.randn(3, 2, 6, dtype=torch.float64) * 0.2 * math.sqrt(2 / 0.5)
    h, states = hx[0], []
    for t in range(3):
        pre = x[t] @ module.weight_ih_l0.T + h @ module.weight_hh_l0.T + module.bias_ih_l0 + module.bias_hh_l0
        h = 0.5 * h + 0.5 * torch.tanh(pre + xi[t])
        states.append(h)
    want = torch.stack(states)
    torch.testing.assert_close(out, want)
    parameters = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(out.sum(), parameters), torch.autograd.grad(want.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"noise_after": True}, {"form": "current"}], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_noise_under_autocast_has_the_dtype_of_the_sum(backend, options):
    """Drawn as the input, float32, while the product it is added to is bfloat16."""
    module = LeakyRNN(4, 16, alpha=0.5, noise=0.3, nonlinearity="tanh", backend=backend, **options)
    x = torch.randn(6, 3, 4)
    torch.manual_seed(1)
    want, want_h = module(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        out, h_n = module(x)
    assert out.dtype == h_n.dtype == torch.bfloat16
    torch.testing.assert_close((out.float(), h_n.float()), (want, want_h), rtol=0, atol=3e-2)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", KINDS)
def test_16_bits(make, dtype):
    module, x = make(nonlinearity="tanh"), torch.randn(9, 3, 4)
    want, _ = module(x)
    module.to(dtype)
    out, _ = module(x.to(dtype))
    assert out.dtype == dtype
    size = max(1.0, want.abs().max().item())  # a PLRNN's values are not between -1 and 1
    torch.testing.assert_close(out.float(), want, rtol=0, atol=2.5 * torch.finfo(dtype).eps * size)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda: LeakyRNN(40, 50, alpha=0.3), lambda: LeakyRNN(40, 50, alpha=0.3, form="current"), lambda: PLRNN(40, 50)],
)
def test_bfloat16_where_rows_and_inputs_fill_tiles(make, start):
    module, x = make(), torch.randn(9, 21, 40)
    hx = torch.randn(1, 21, 50) if start else None
    want = module(x, hx)
    module.bfloat16()
    out, h_n = module(x.bfloat16(), hx.bfloat16() if start else None)
    size = float(want[0].detach().abs().max())
    torch.testing.assert_close((out.float(), h_n.float()), want, rtol=0, atol=2e-2 * size)


def test_explain_tells_which_kernel_runs():
    module = LeakyRNN(4, 6, alpha=0.5, nonlinearity="softplus")
    choice = explain(module, (5, 2, 4))
    assert (choice.backend, choice.kernel) == ("cpu", "layer")
    assert explain(PLRNN(4, 6, backend="reference"), (5, 2, 4)).backend == "reference"


def test_export_and_compile_give_the_same_numbers():
    module, x = LeakyRNN(4, 6, 2, alpha=ALPHA, train_alpha=True, nonlinearity="tanh"), torch.randn(5, 2, 4)
    want, want_h = module(x)
    out, h_n = torch.export.export(module, (x,)).module()(x)
    torch.testing.assert_close((out, h_n), (want, want_h))
    out, h_n = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close((out, h_n), (want, want_h))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "expected either alpha or both tau and dt, got none of them"),
        ({"alpha": 0.5, "tau": 10, "dt": 1}, "expected either alpha or both tau and dt, got alpha and tau and dt"),
        ({"tau": 10}, "expected either alpha or both tau and dt, got tau"),
        ({"alpha": 0.5, "dt": 1}, "got alpha and dt"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got 0.0"),
        ({"alpha": 1.5}, r"alpha must be in \(0, 1\], got 1.5"),
        ({"alpha": math.nan}, r"alpha must be in \(0, 1\], got nan"),
        ({"alpha": torch.ones(5)}, r"alpha must be a number or have shape \(6,\), got \(5,\)"),
        ({"tau": 0, "dt": 1}, "tau must be greater than zero, got 0"),
        ({"tau": 10, "dt": -1}, "dt must be greater than zero, got -1"),
        ({"tau": 1, "dt": 2}, r"alpha = dt / tau must be in \(0, 1\], got 2.0"),
        ({"alpha": 1, "train_alpha": True}, "an alpha that is trained must be below 1, got 1"),
        ({"alpha": 0.5, "form": "voltage"}, "form must be 'rate' or 'current', got 'voltage'"),
        ({"alpha": 0.5, "noise": -1}, "noise must be a finite number and not negative, got -1"),
        ({"alpha": 0.5, "noise_after": True, "form": "current"}, "noise_after is for form='rate'"),
        ({"alpha": 0.5, "nonlinearity": "gelu"}, "Unknown nonlinearity 'gelu'. Select from 'none', 'relu'"),
    ],
)
@pytest.mark.parametrize("kind", [LeakyRNN, LeakyRNNCell])
def test_what_is_wrong_is_said(kind, options, text):
    with pytest.raises(ValueError, match=text):
        kind(4, 6, **options)


def test_a_call_with_wrong_shapes_says_what_torch_says():
    module, cell = LeakyRNN(4, 6, alpha=0.5), LeakyRNNCell(4, 6, alpha=0.5)
    with pytest.raises(RuntimeError, match="Expected 4, got 5"):
        module(torch.zeros(3, 2, 5))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 6\)"):
        module(torch.zeros(3, 2, 4), torch.zeros(1, 2, 7))
    with pytest.raises(RuntimeError, match="got 5 expected 4"):
        cell(torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match="doesn't match hidden0 batch size 3"):
        cell(torch.zeros(2, 4), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="skip must be finite"):
        PLRNN(4, 6, skip=math.inf)


# ---- networks of public code, whose loops the modules take the place of; docs/migration.md shows them ----


def test_nn4n():
    """NN4Neurosim/nn4n, LeakyLinearLayer: v' = (1 - alpha) v + alpha (W f(v) + b + W_in u + b_in), rates f(v)."""
    module = LeakyRNN(4, 6, alpha=ALPHA, form="current", nonlinearity="sigmoid", dtype=torch.float64)
    u = torch.randn(7, 3, 4, dtype=torch.float64)
    inner, outer = torch.nn.Linear(6, 6, dtype=torch.float64), torch.nn.Linear(4, 6, dtype=torch.float64)
    module.load_state_dict(
        {
            "weight_ih_l0": outer.weight, "bias_ih_l0": outer.bias, "weight_hh_l0": inner.weight,
            "bias_hh_l0": inner.bias, "alpha": ALPHA.double(),
        }
    )  # fmt: skip
    v, rate, rates = torch.zeros(3, 6, dtype=torch.float64), torch.full((3, 6), 0.5, dtype=torch.float64), []
    for t in range(7):
        v = (1 - module.alpha) * v + module.alpha * (inner(rate) + outer(u[t]))
        rate = torch.sigmoid(v)
        rates.append(rate)
    torch.testing.assert_close(torch.sigmoid(module(u)[0]), torch.stack(rates))


def test_trainrnnbrain():
    """engellab/trainRNNbrain, RNN_torch: s' = (1 - a) s + a (f(W s + W_in u) + sqrt(2 / a) sigma xi), Dale's law."""
    signs = torch.tensor([1.0, 1, 1, 1, -1, -1])
    module = LeakyRNN(
        4, 6, tau=10, dt=1, bias=False, noise=0.05, noise_after=True, batch_first=True, dtype=torch.float64
    )
    register_parametrization(module, "weight_hh_l0", parametrize.NoSelfConnection())
    register_parametrization(module, "weight_hh_l0", parametrize.DaleLaw(signs))
    u, state, states = torch.randn(3, 7, 4, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64), []
    w_rec = module.weight_hh_l0
    assert not w_rec.diagonal().any()
    assert ((w_rec * signs) >= 0).all()
    torch.manual_seed(3)
    noise = torch.randn(7, 3, 6, dtype=torch.float64) * math.sqrt(2 / 0.1) * 0.05
    for t in range(7):
        state = 0.9 * state + 0.1 * (torch.relu(state @ w_rec.T + u[:, t] @ module.weight_ih_l0.T) + noise[t])
        states.append(state)
    torch.manual_seed(3)
    torch.testing.assert_close(module(u)[0], torch.stack(states, 1))


def test_smc_rnns():
    """mackelab/smc_rnns, Transition_LowRank: latents z' = d z + n f(m z + W_u v - h), inputs v' = d v + (1 - d) u.

    With currents y = m z + W_u v - h of the units that is y' = d y + m n f(y) + (1 - d) (W_u u - h): PLRNN's form with
    a low-rank matrix.
    """
    draw = {"dtype": torch.float64}
    m, n = torch.randn(6, 2, **draw), torch.randn(2, 6, **draw) / 6
    w_u, bias = torch.randn(6, 4, **draw), torch.randn(6, **draw)
    decay, u = 0.8, torch.randn(7, 3, 4, **draw)
    z, v, currents = torch.randn(3, 2, **draw), torch.zeros(3, 4, **draw), []
    module = PLRNN(4, 6, skip=decay, **draw)
    register_parametrization(module, "weight_hh_l0", parametrize.LowRank(2))
    with torch.no_grad():
        module.weight_hh_l0 = m @ n
        module.weight_ih_l0.copy_((1 - decay) * w_u)
        module.bias_ih_l0.copy_(-(1 - decay) * bias)
        module.bias_hh_l0.zero_()
    first = z @ m.T - bias
    for t in range(7):
        z = decay * z + torch.relu(z @ m.T + v @ w_u.T - bias) @ n.T
        v = decay * v + (1 - decay) * u[t]
        currents.append(z @ m.T + v @ w_u.T - bias)
    torch.testing.assert_close(module(u, first[None])[0], torch.stack(currents))


def test_dendritic_plrnn():
    """DurstewitzLab/dendPLRNN, PLRNN_Basis_Step: z' = A z + W sum_b alpha_b relu(z + theta_b) + h.

    With z_b = z + theta_b for each basis b it is a PLRNN of bases x units (Brenner et al. 2022, arXiv 2207.02542).
    """
    draw, bases = {"dtype": torch.float64}, 3
    a, w, h = torch.rand(4, **draw), torch.randn(4, 4, **draw) / 4, torch.randn(4, **draw)
    alphas, thetas = torch.randn(bases, **draw), torch.randn(4, bases, **draw)
    z, states = torch.randn(3, 4, **draw), []
    module = PLRNN(1, 4 * bases, bias=True, **draw)
    shift = thetas.T.flatten()  # of unit i in basis b, at place 4 b + i
    with torch.no_grad():
        module.skip_l0.copy_(a.repeat(bases))
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.copy_(torch.cat([alpha * w for alpha in alphas], 1).repeat(bases, 1))
        module.bias_ih_l0.copy_(h.repeat(bases) + shift - a.repeat(bases) * shift)
        module.bias_hh_l0.zero_()
    first = z.repeat(1, bases) + shift
    for _ in range(7):
        z = a * z + torch.relu(z[..., None] + thetas).mul(alphas).sum(-1) @ w.T + h
        states.append(z)
    out, _ = module(torch.zeros(7, 3, 1, **draw), first[None])
    torch.testing.assert_close(out[..., :4] - shift[:4], torch.stack(states))


@pytest.mark.parametrize("form", ["rate", "current"])
def test_batched_gradients(form):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    net = LeakyRNN(3, 5, alpha=0.3, train_alpha=True, form=form, dtype=torch.float64)
    logit = net.logit_alpha_l0.detach()
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def states(x, logit):
        return torch.func.functional_call(net, {"logit_alpha_l0": logit}, (x,))[0]

    by_row = torch.autograd.functional.jacobian(states, (x, logit))
    at_once = torch.autograd.functional.jacobian(states, (x, logit), vectorize=True)
    for a, b in zip(at_once, by_row, strict=True):
        torch.testing.assert_close(a, b)
