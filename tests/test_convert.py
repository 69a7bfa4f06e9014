"""Conversion from and to torch.nn.RNN: modules, models, state dicts."""

from __future__ import annotations

import copy

import fused_rin
import pytest
import torch
from fused_rin import RIN, RINCell
from torch import nn

OPTIONS = [
    {},
    {"nonlinearity": "relu", "bias": False},
    {"num_layers": 3, "dropout": 0.5, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu"},
]


def _rnn(options, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.RNN(5, 7, **options, dtype=dtype).eval()


def _snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def _assert_untouched(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skip", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("options", OPTIONS)
def test_from_rnn_keeps_outputs(options, skip, dtype):
    rnn = _rnn(options, dtype)
    rnn.weight_hh_l0.requires_grad_(False)
    before = _snapshot(rnn)
    rin = RIN.from_rnn(rnn, skip=skip)
    x, h0 = torch.randn(4, 4, 5, dtype=dtype), torch.randn(rnn(torch.zeros(4, 4, 5, dtype=dtype))[1].shape, dtype=dtype)
    for ours, theirs in zip(rin(x, h0), rnn(x, h0), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not rin.weight_hh_l0.requires_grad
    assert rin.weight_ih_l0.requires_grad
    assert not rin.training
    torch.testing.assert_close(rin.weight_hh_l0, rnn.weight_hh_l0 - skip * torch.eye(7, dtype=dtype))
    _assert_untouched(rnn, before)


def test_from_rnn_forms_the_difference_in_float32():
    """1 + 2^-16 has no place in a bfloat16 V; off the diagonal nothing may be lost."""
    rnn = _rnn({"nonlinearity": "relu"}).bfloat16()
    rin = RIN.from_rnn(rnn)
    wanted = (rnn.weight_hh_l0.float() - torch.eye(7)).bfloat16()
    assert torch.equal(rin.weight_hh_l0, wanted)
    tiny = RIN(5, 7, dtype=torch.bfloat16)
    with torch.no_grad():
        tiny.weight_hh_l0.fill_(2.0**-16)
    off_diagonal = tiny.to_rnn().weight_hh_l0[0, 1]
    assert off_diagonal == 2.0**-16


@pytest.mark.parametrize("options", OPTIONS)
def test_there_and_back(options):
    rnn = _rnn(options)
    back = RIN.from_rnn(rnn).to_rnn()
    assert type(back) is nn.RNN
    assert repr(back) == repr(rnn)
    assert not back.training
    for name, value in rnn.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=1e-7)
    assert back.state_dict().keys() == rnn.state_dict().keys()


def test_to_rnn_of_heads_is_block_diagonal():
    torch.manual_seed(0)
    rin = RIN(5, 6, num_heads=3)
    nn.init.normal_(rin.weight_hh_l0, std=0.3)
    x = torch.randn(9, 2, 5)
    rnn = rin.to_rnn()
    torch.testing.assert_close(rnn(x)[0], rin(x)[0])
    assert torch.count_nonzero(rnn.weight_hh_l0) == 3 * 2 * 2


@pytest.mark.parametrize("bias", [True, False])
def test_cell_there_and_back(bias):
    torch.manual_seed(0)
    cell = nn.RNNCell(5, 7, bias=bias, nonlinearity="relu")
    before = _snapshot(cell)
    ours = RINCell.from_rnn(cell)
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    torch.testing.assert_close(ours(x, h), cell(x, h))
    torch.testing.assert_close(ours.to_rnn()(x, h), cell(x, h))
    assert type(ours.to_rnn()) is nn.RNNCell
    _assert_untouched(cell, before)


def test_from_rnn_refuses_other_modules():
    class MyRNN(nn.RNN):
        pass

    weight_normed = nn.RNN(2, 3)
    torch.nn.utils.parametrizations.weight_norm(weight_normed, "weight_hh_l0")
    for module, text in [
        (nn.LSTM(2, 3), "takes a torch.nn.RNN, got .*LSTM.*has gates"),
        (nn.GRU(2, 3), "has gates"),
        (nn.RNNCell(2, 3), "takes a torch.nn.RNN, got .*RNNCell"),
        (MyRNN(2, 3), "MyRNN is a subclass of torch.nn.RNN"),
        (weight_normed, "parametrizations"),
        (nn.Linear(2, 3), "Linear is not a torch.nn.RNN"),
    ]:
        before = _snapshot(module)
        with pytest.raises(TypeError, match=text):
            RIN.from_rnn(module)
        _assert_untouched(module, before)
    with pytest.raises(TypeError, match=r"RINCell.from_rnn takes a torch.nn.RNNCell, got .*nn.RNN"):
        RINCell.from_rnn(nn.RNN(2, 3))


class Model(nn.Module):
    """Everything a walk can meet: nesting, one module under two names, a tied matrix, cells, what must stay."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 5)
        self.encoder = nn.ModuleDict({"rnn": nn.RNN(5, 5, num_layers=2, batch_first=True)})
        self.again = self.encoder["rnn"]
        self.relu = nn.RNN(5, 5, nonlinearity="relu", bidirectional=True, batch_first=True)
        self.relu.weight_hh_l0_reverse = self.relu.weight_hh_l0
        self.cell = nn.RNNCell(10, 5)
        self.lstm = nn.LSTM(5, 5, batch_first=True)

    def forward(self, x):
        x, _ = self.encoder["rnn"](self.embed(x))
        x, _ = self.again(x)
        x, _ = self.relu(x)
        h = None
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.lstm(h[:, None])[0]


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_replace_rnn_keeps_the_model(skip):
    torch.manual_seed(0)
    model = Model()
    calls = []
    model.cell.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 6, 4)
    expected, before = model(x), copy.deepcopy(model)
    calls.clear()
    report = fused_rin.replace_rnn(model, skip=skip, report=True)
    assert report.model is model
    assert sorted(report.replaced) == ["again", "cell", "encoder.rnn", "relu"]
    assert list(report.left_alone) == ["lstm"]
    assert "has gates" in report.left_alone["lstm"]
    assert "left alone 'lstm'" in str(report)
    assert model.again is model.encoder["rnn"]
    assert model.relu.weight_hh_l0 is model.relu.weight_hh_l0_reverse
    assert not any(type(m) in (nn.RNN, nn.RNNCell) for m in model.modules())
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 6
    # A few steps of training with weights that differ by a constant matrix take the same path (no decay).
    losses = []
    for net in (model, before):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        run = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_replace_rnn_with_skip_0_keeps_the_parameters():
    """An optimizer and a checkpoint made before stay valid."""
    model = Model()
    before = dict(model.named_parameters())
    state = _snapshot(model)
    fused_rin.replace_rnn(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    model.load_state_dict(state)


def test_replace_rnn_of_a_bare_module_and_of_nothing():
    assert type(fused_rin.replace_rnn(nn.RNN(2, 3))) is RIN
    model = nn.Sequential(nn.RNN(2, 3))
    assert fused_rin.replace_rnn(model) is model
    assert type(model[0]) is RIN
    for without in (nn.Linear(2, 2), nn.Sequential(RIN(2, 3))):
        nothing = fused_rin.replace_rnn(without, report=True)
        assert (nothing.model, nothing.replaced, nothing.left_alone) == (without, [], {})
        assert "none" in str(nothing)


def test_replace_rnn_keeps_what_was_added():
    model = nn.ModuleDict({"rnn": nn.RNN(3, 4), "cell": nn.RNNCell(3, 4)})
    for old in list(model.values()):
        old.tag = ["encoder"]
        old.register_buffer("scale", torch.ones(4))
        old.register_buffer("cache", torch.ones(2), persistent=False)
        old.register_parameter("gain", nn.Parameter(torch.ones(4)))
        old.project = nn.Linear(4, 4)
    keys = list(model.state_dict())
    parts = {name: [old.tag, old.scale, old.gain, old.project] for name, old in model.items()}
    report = fused_rin.replace_rnn(model, report=True)
    assert sorted(report.replaced) == ["cell", "rnn"]
    for name, new in model.items():
        assert isinstance(new, (RIN, RINCell))
        assert all(a is b for a, b in zip([new.tag, new.scale, new.gain, new.project], parts[name], strict=True))
    assert sorted(model.state_dict()) == sorted(keys)
    model.load_state_dict(model.state_dict())


def test_replace_rnn_leaves_alone_what_it_cannot_carry_over():
    def patched(module):
        old = module.forward
        module.forward = lambda *arguments: (old(*arguments)[0] * 2, None)

    def renamed(module):
        module.num_heads = 3

    def of_its_own(module):
        module.register_buffer("skip", torch.ones(1))

    def compiled(module):
        module.compile(backend="eager")

    def without_input(module):
        module.cell = nn.RNNCell(0, 4)

    reasons = {
        patched: "its forward was replaced on the instance",
        renamed: "its num_heads was added",
        of_its_own: "its skip was added",
        compiled: "its _compiled_call_impl was replaced",
    }
    for change, reason in reasons.items():
        model = nn.Sequential(nn.RNN(3, 4), nn.RNN(4, 4))
        x = torch.randn(5, 2, 3)
        change(model[0])
        want = model[0](x)[0]
        report = fused_rin.replace_rnn(model, report=True)
        assert (report.replaced, type(model[0])) == (["1"], nn.RNN)
        assert reason in report.left_alone["0"]
        torch.testing.assert_close(model[0](x)[0], want)
    model = nn.Sequential(nn.RNN(3, 4))
    without_input(model)
    report = fused_rin.replace_rnn(model, report=True)
    assert report.replaced == ["0"]
    assert "input_size must be greater than zero, got 0" in report.left_alone["cell"]


def test_replace_rnn_replaces_all_or_nothing(monkeypatch):
    from fused_rin import convert

    model = nn.Sequential(nn.RNN(3, 4), nn.RNN(4, 4), nn.RNNCell(4, 4))
    real, made = convert.from_rnn, []

    def failing(*arguments, **options):
        made.append(real(*arguments, **options))
        if len(made) == 3:
            raise RuntimeError("out of memory")
        return made[-1]

    before = list(model)
    handle = model[0].register_load_state_dict_pre_hook(lambda module, *_: None)
    monkeypatch.setattr(convert, "from_rnn", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        fused_rin.replace_rnn(model)
    assert all(a is b for a, b in zip(model, before, strict=True))
    model.load_state_dict(model.state_dict())  # the hook still has its module
    handle.remove()


def test_replaced_modules_keep_their_state_dict_hooks():
    model, seen = nn.Sequential(nn.RNN(3, 4)), []
    handles = [
        model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module)),
        model[0].register_state_dict_post_hook(lambda module, *_: seen.append(module)),
        model[0].register_state_dict_pre_hook(lambda module, *_: seen.append(module)),
        model[0].register_load_state_dict_post_hook(lambda module, _: seen.append(module)),
    ]
    fused_rin.replace_rnn(model)
    model.load_state_dict(model.state_dict())
    assert len(seen) == 4
    assert all(module is model[0] for module in seen)
    for handle in handles:
        handle.remove()
    model.load_state_dict(model.state_dict())
    assert len(seen) == 4


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_restore_rnn_is_the_inverse(skip):
    torch.manual_seed(0)
    model = Model()
    before, x = dict(model.named_parameters()), torch.randn(3, 6, 4)
    want = model(x)
    assert fused_rin.restore_rnn(fused_rin.replace_rnn(model, skip=skip)) is model
    assert not any(isinstance(m, (RIN, RINCell)) for m in model.modules())
    assert model.again is model.encoder["rnn"]
    assert model.relu.weight_hh_l0 is model.relu.weight_hh_l0_reverse
    torch.testing.assert_close(model(x), want)
    if skip == 0:
        assert all(before[name] is value for name, value in model.named_parameters())
    assert type(fused_rin.restore_rnn(RIN(2, 4, num_heads=2))) is nn.RNN
    torch.jit.script(fused_rin.restore_rnn(nn.Sequential(RIN(3, 4))))

    class Own(RIN):
        pass

    model = nn.Sequential(RIN(2, 3), Own(3, 3))
    with pytest.raises(TypeError, match="1: Own is a subclass"):
        fused_rin.restore_rnn(model)
    assert type(model[0]) is RIN


@pytest.mark.parametrize("file", ["state_dict", "safetensors-like"])
def test_a_replaced_model_rolls_back(file):
    """Trained here, loaded by the service that still has nn.RNN; and the other way."""
    make = lambda: nn.ModuleDict({"rnn": nn.RNN(3, 4, 2), "cell": nn.RNNCell(4, 4), "head": nn.Linear(4, 2)})  # noqa: E731
    model, service = fused_rin.replace_rnn(make()), make()
    state = model.state_dict()
    assert list(state) == list(service.state_dict())
    service.load_state_dict(state)
    model.load_state_dict(service.state_dict())
    with torch.device("meta"):
        empty = fused_rin.replace_rnn(make())
    empty.load_state_dict(service.state_dict(), assign=True)
    empty.to("cpu").share_memory()
    assert not list(model.buffers())


def test_the_mark_is_no_buffer_and_guards_all_the_same():
    module = RIN(3, 4, skip=0.5)
    assert not list(module.buffers())
    state = module.state_dict()
    assert state["skip"] == 0.5
    assert module.skip == 0.5
    with pytest.raises(RuntimeError, match=r"has skip=0\.5, this RIN"):
        RIN(3, 4, skip=1.0).load_state_dict(state)
    assert RIN(3, 4, skip=0.5).load_state_dict(state).unexpected_keys == []
    nested = nn.Sequential(nn.Linear(2, 3), module)
    nested.load_state_dict(nested.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        nested.load_state_dict({**nested.state_dict(), "1.other": torch.ones(1)})


@pytest.mark.parametrize(("ours", "theirs"), [(RIN, nn.RNN), (RINCell, nn.RNNCell)])
def test_a_foreign_state_dict_is_refused_and_changes_nothing(ours, theirs):
    module, foreign = ours(5, 7), theirs(5, 7).state_dict()
    before = _snapshot(module)
    with pytest.raises(RuntimeError, match=r"state of a torch.nn.RNN.*V = U \+ 1 I.*load_rnn_state_dict.*from_rnn"):
        module.load_state_dict(foreign)
    _assert_untouched(module, before)
    plain = ours(5, 7, skip=0)
    plain.load_state_dict(foreign)
    _assert_untouched(plain, foreign)
    # With skip=0 a state dict is torch's in both directions; a mark of 0, as older checkpoints have it, is taken too.
    theirs(5, 7).load_state_dict(plain.state_dict())
    plain.load_state_dict({**foreign, "skip": torch.tensor(0.0)})
    for other in (plain.state_dict(), ours(5, 7, skip=0.5).state_dict()):
        with pytest.raises(
            RuntimeError, match=r"state of a torch.nn.RNN|has skip=0.5, this RIN.* was made with skip=1"
        ):
            module.load_state_dict(other)
    _assert_untouched(module, before)


@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16, torch.float16])
def test_own_state_dict_survives_a_cast(cast):
    module = RIN(2, 3, skip=0.1).to(cast)
    fresh = RIN(2, 3, skip=0.1)
    fresh.load_state_dict(module.state_dict())
    assert fresh.skip_factor == 0.1


def test_load_rnn_state_dict_converts_where_needed():
    torch.manual_seed(0)
    old = nn.ModuleDict(
        {"a": nn.RNN(3, 4, nonlinearity="relu", num_layers=2), "b": nn.RNNCell(3, 4), "c": nn.Linear(2, 2)}
    )
    new = nn.ModuleDict(
        {"a": RIN(3, 4, num_layers=2), "b": RINCell(3, 4, nonlinearity="tanh", skip=0.5), "c": nn.Linear(2, 2)}
    )
    state = old.state_dict()
    copied = {name: value.clone() for name, value in state.items()}
    result = fused_rin.load_rnn_state_dict(new, state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(state[name], copied[name]) for name in copied)
    x, h = torch.randn(5, 2, 3), torch.randn(2, 4)
    torch.testing.assert_close(new["a"](x)[0], old["a"](x)[0])
    torch.testing.assert_close(new["b"](x[0], h), old["b"](x[0], h))
    fused_rin.load_rnn_state_dict(new, new.state_dict())  # a checkpoint of RINs is loaded as it is
    torch.testing.assert_close(new["a"](x)[0], old["a"](x)[0])
    with pytest.raises(ValueError, match="num_heads=2"):
        fused_rin.load_rnn_state_dict(RIN(3, 4, num_heads=2), nn.RNN(3, 4).state_dict())


def test_the_migration_page_names_tests_that_exist():
    """A row of docs/migration.md is a promise; the test it names must be there."""
    import ast
    import re
    from pathlib import Path

    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "migration.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "test |" not in line]
    assert len(rows) > 35
    for row in rows:
        file = ""
        names = re.findall(r"`(test_\w+\.py)?::(\w+)`", row)
        assert names, row
        for new_file, name in names:
            file = new_file or file
            defined = {node.name for node in ast.parse((tests / file).read_text()).body if hasattr(node, "name")}
            assert name in defined, f"{file}::{name}"
