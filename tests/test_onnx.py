"""torch.onnx.export of models with RINs, by both exporters, run by ONNX Runtime."""

from __future__ import annotations

import functools
import io
import warnings

import onnxruntime
import pytest
import torch
from fused_rin import RIN, RINCell
from fused_rin.onnx import export_onnx
from torch import nn
from torch.export import Dim

WIDE = {"num_layers": 2, "bidirectional": True, "batch_first": True, "num_heads": 2, "nonlinearity": "tanh"}
PLAIN = {"bias": False, "skip": 0.5}

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*deprecated", "ignore::UserWarning", "ignore:.*legacy TorchScript"
)


def _by_torch(model, args, *, kwargs=None, dynamic_shapes=None):
    return torch.onnx.export(
        model, args, kwargs=kwargs, dynamic_shapes=dynamic_shapes, dynamo=True, verbose=False
    ).model_proto


def _by_export_onnx(model, args, *, kwargs=None, dynamic_shapes=None):
    return export_onnx(model, args, kwargs=kwargs, dynamic_shapes=dynamic_shapes, verbose=False).model_proto


def _by_tracing(model, args, *, kwargs=None, dynamic_shapes=None):
    import onnx

    inputs = [*args, *(kwargs or {}).values()]
    names = [f"input{i}" for i in range(len(inputs))]
    axes = {}
    for name, dims in zip(names, dynamic_shapes or (), strict=False):
        axes[name] = {axis: dim.__name__ for axis, dim in dims.items()}
    file = io.BytesIO()
    given = (*args, kwargs) if kwargs else args
    torch.onnx.export(model, given, file, dynamo=False, input_names=names, dynamic_axes=axes)
    return onnx.load_from_string(file.getvalue())


DOORS = [
    pytest.param(_by_export_onnx, id="export_onnx"),
    pytest.param(
        _by_torch,
        id="torch",
        marks=pytest.mark.skipif(torch.__version__ < (2, 8), reason="torch.onnx.ops came with torch 2.8"),
    ),
    pytest.param(_by_tracing, id="tracing"),
]


def _random(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def _run(proto, *inputs):
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return [torch.from_numpy(value) for value in outputs]


def _assert_runs_as(module, proto, *inputs, **tolerance):
    with torch.no_grad():
        expected = module(*inputs)
    expected = (expected,) if isinstance(expected, torch.Tensor) else expected
    for got, want in zip(_run(proto, *inputs), expected, strict=True):
        torch.testing.assert_close(got, want, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


def _kinds(proto):
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize("options", [{}, WIDE, PLAIN], ids=["plain", "wide", "no bias"])
@pytest.mark.parametrize("export", DOORS)
def test_a_layer_is_one_operator_of_equal_outputs_at_any_size(export, options):
    module = _random(RIN(5, 8, **options))
    time, batch = (1, 0) if module.batch_first else (0, 1)
    states = module.num_layers * (2 if module.bidirectional else 1)
    dim = {time: Dim("time"), batch: Dim("batch")}
    example = torch.randn(6, 4, 5), torch.zeros(states, 6 if module.batch_first else 4, 8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    proto = export(module, example, dynamic_shapes=(dim, {1: dim[batch]}))
    assert _kinds(proto).count("RNN") == module.num_layers
    assert not {"MatMul", "Gemm", "Loop", "Scan", "Einsum"} & set(_kinds(proto))
    for shape in ((9, 3), (2, 7)):
        _assert_runs_as(module, proto, torch.randn(*shape, 5), torch.randn(states, shape[batch], 8))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="torch.onnx.ops came with torch 2.8")
def test_the_sum_with_the_identity_is_folded_into_a_constant():
    module = _random(RIN(5, 8, skip=0.3, bidirectional=True, num_heads=2))
    program = torch.onnx.export(module, (torch.randn(6, 4, 5),), dynamo=True, verbose=False)
    (node,) = (node for node in program.model.graph if node.op_type == "RNN")
    for matrix, name in zip(node.inputs[2].const_value.numpy(), ("l0", "l0_reverse"), strict=True):
        u = getattr(module, f"weight_hh_{name}").detach()
        expected = torch.block_diag(*u.chunk(2)) + torch.tensor(0.3) * torch.eye(8)
        assert torch.equal(torch.from_numpy(matrix), expected)


class WithLengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.rin = RIN(5, 8, num_layers=2, bidirectional=True)

    def forward(self, x, h, lengths):
        return self.rin(x, h, lengths=lengths)


@pytest.mark.parametrize("export", DOORS)
def test_lengths_and_an_empty_sequence_that_keeps_its_state(export):
    model = _random(WithLengths())
    h = torch.randn(4, 3, 8)
    proto = export(model, (torch.randn(6, 3, 5), h, torch.tensor([6, 0, 4])))
    assert _kinds(proto).count("RNN") == 2
    for lengths in ([6, 0, 4], [1, 5, 0]):
        _assert_runs_as(model, proto, torch.randn(6, 3, 5), h, torch.tensor(lengths))


@pytest.mark.parametrize("export", DOORS)
def test_unbatched_input_and_a_cell(export):
    module, cell = _random(RIN(5, 8)), _random(RINCell(5, 8))
    proto = export(nn.Sequential(module), (torch.randn(6, 5),))
    assert _kinds(proto).count("RNN") == 1
    _assert_runs_as(module, proto, torch.randn(6, 5))
    proto = export(cell, (torch.randn(3, 5), torch.randn(3, 8)))
    _assert_runs_as(cell, proto, torch.randn(3, 5), torch.randn(3, 8))


@pytest.mark.parametrize("export", DOORS)
def test_float16_carries_its_state_in_float32(export):
    module = _random(RIN(5, 8)).half()
    proto = export(module, (torch.randn(6, 4, 5).half(),))
    assert _kinds(proto).count("RNN") == 1
    _assert_runs_as(module, proto, torch.randn(6, 4, 5).half(), rtol=2e-3, atol=2e-3)


class WithResets(nn.Module):
    def __init__(self):
        super().__init__()
        self.rin = RIN(5, 8, bidirectional=True, num_heads=2)

    def forward(self, x, resets):
        return self.rin(x, resets=resets)


@pytest.mark.parametrize("export", DOORS)
def test_what_the_operator_cannot_say_is_unrolled(export):
    model = _random(WithResets())
    proto = export(model, (torch.randn(6, 4, 5), torch.zeros(6, 4, dtype=torch.bool)))
    assert "RNN" not in _kinds(proto)
    _assert_runs_as(model, proto, torch.randn(6, 4, 5), torch.rand(6, 4) < 0.3)
    module = _random(RIN(5, 8)).double()
    proto = export(module, (torch.randn(6, 4, 5).double(),))
    _assert_runs_as(module, proto, torch.randn(6, 4, 5).double(), rtol=1e-12, atol=1e-12)


def test_the_operator_run_by_itself_is_nn_rnn():
    """The tracing exporter runs it for the values of the operators after it."""
    theirs = nn.RNN(5, 8, bidirectional=True, nonlinearity="relu")
    w, r, b_ih, b_hh = (
        torch.stack([getattr(theirs, f"{name}_l0{suffix}") for suffix in ("", "_reverse")])
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    x, h0, lengths = torch.randn(6, 3, 5), torch.randn(2, 3, 8), torch.tensor([6, 4, 1], dtype=torch.int32)
    run = functools.partial(torch.ops.fused_rin.onnx_rnn, x, w, r, torch.cat([b_ih, b_hh], 1))
    y, h_n = run(None, h0, "Relu")
    out, state = theirs(x, h0)
    torch.testing.assert_close(y.transpose(1, 2).flatten(2), out)
    torch.testing.assert_close(h_n, state)
    y, h_n = run(lengths, h0, "Relu")
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths.long())
    out, state = theirs(packed, h0)
    torch.testing.assert_close(y.transpose(1, 2).flatten(2), nn.utils.rnn.pad_packed_sequence(out)[0])
    torch.testing.assert_close(h_n, state)


def test_compiled_code_is_not_changed_by_an_export_beside_it():
    module = _random(RIN(5, 8))
    x = torch.randn(6, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_onnx(module, (x,), verbose=False)
    exported = torch.export.export(module, (x,))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "fused_rin.sweep_forward.default" in targets
    assert not any("onnx" in target for target in targets)
