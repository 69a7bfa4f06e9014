"""PyTorch's own module inputs for nn.RNN and nn.RNNCell (torch.testing._internal.common_modules), on our classes.

The checks are those of PyTorch's test_modules.py that mean something on a CPU; each runs over every input that the
installed release ships. Not run: `test_memory_format` (no 4-D tensors here), `test_check_inplace` (no such argument),
`test_if_train_and_eval_modes_differ` (asks only that others do not read `training`), device transfers, CUDA parity.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from fused_rin import RIN, RINCell
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db


class RNN(RIN):
    """torch.nn.RNN by way of RIN: its default nonlinearity, no skip."""

    def __init__(self, input_size, hidden_size, num_layers=1, nonlinearity="tanh", *args, **kwargs):
        super().__init__(input_size, hidden_size, num_layers, nonlinearity, *args, skip=0, **kwargs)


class RNNCell(RINCell):
    def __init__(self, input_size, hidden_size, bias=True, nonlinearity="tanh", *args, **kwargs):
        super().__init__(input_size, hidden_size, bias, nonlinearity, *args, skip=0, **kwargs)


OURS = {torch.nn.RNN: RNN, torch.nn.RNNCell: RNNCell}
INFOS = [info for info in module_db if info.module_cls in OURS]


def _inputs(info, dtype, requires_grad=False, training=True, **kwargs):
    torch.manual_seed(0)
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **kwargs
    )


def _with_packed(info):
    return {"with_packed_sequence": True} if info.module_cls is torch.nn.RNN else {}


def _all(dtypes=(torch.float32, torch.float64)):
    for info in INFOS:
        for dtype in dtypes:
            for index in range(len(_inputs(info, dtype, **_with_packed(info)))):
                yield pytest.param(info, dtype, index, id=f"{info.name}-{str(dtype)[6:]}-{index}")


def _pair(info, given, dtype, training):
    """Our module and torch's with the same weights."""
    args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
    theirs = info.module_cls(*args, **kwargs, dtype=dtype).train(training)
    ours = OURS[info.module_cls](*args, **kwargs, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _flat(value):
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, torch.Tensor) else [leaf for part in value for leaf in _flat(part)]


def _assert_same(ours, theirs, **tolerance):
    for a, b in zip(_flat(ours), _flat(theirs), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("info", "dtype", "index"), list(_all()))
def test_forward_backward_equal_torch(info, dtype, index, training):
    given = _inputs(info, dtype, requires_grad=True, training=training, **_with_packed(info))[index]
    ours, theirs = _pair(info, given, dtype, training)
    args, kwargs = given.forward_input.args, given.forward_input.kwargs
    out, expected = ours(*args, **kwargs), theirs(*args, **kwargs)
    assert type(out) is type(expected)
    _assert_same(out, expected)
    leaves = _flat(args)
    grads = torch.autograd.grad(sum(o.sin().sum() for o in _flat(out)), [*leaves, *ours.parameters()])
    wanted = torch.autograd.grad(sum(o.sin().sum() for o in _flat(expected)), [*leaves, *theirs.parameters()])
    _assert_same(grads, wanted)
    if given.reference_fn is not None and not isinstance(args[0], PackedSequence):
        _assert_same(ours(*args, **kwargs), given.reference_fn(ours, *args, **kwargs))


@pytest.mark.parametrize(("info", "dtype", "index"), list(_all((torch.float64,))))
def test_gradcheck_and_gradgradcheck(info, dtype, index):
    given = _inputs(info, dtype, requires_grad=True, **_with_packed(info))[index]
    ours, _ = _pair(info, given, dtype, True)
    args = given.forward_input.args
    packed = args[0] if isinstance(args[0], PackedSequence) else None
    leaves = tuple(_flat(args))
    parameters = dict(ours.named_parameters())

    def run(*tensors):
        inputs = list(tensors[: len(leaves)])
        if packed is not None:
            inputs[0] = PackedSequence(inputs[0], *packed[1:])
        weights = dict(zip(parameters, tensors[len(leaves) :], strict=True))
        return tuple(_flat(torch.func.functional_call(ours, weights, tuple(inputs))))

    tensors = (*leaves, *parameters.values())
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize(("info", "dtype", "index"), list(_all((torch.float32,))))
def test_non_contiguous_inputs(info, dtype, index):
    given = _inputs(info, dtype, **_with_packed(info))[index]
    ours, _ = _pair(info, given, dtype, True)
    args = given.forward_input.args

    def spread(value):
        if isinstance(value, PackedSequence):
            return PackedSequence(spread(value.data), *value[1:])
        wide = torch.full((*value.shape, 2), float("nan"), dtype=value.dtype)
        wide[..., 0] = value
        assert value.numel() < 2 or not wide[..., 0].is_contiguous()
        return wide[..., 0]

    _assert_same(ours(*map(spread, args)), ours(*args))


@pytest.mark.parametrize(("info", "dtype", "index"), list(_all((torch.float32,))))
def test_copies_give_the_same(info, dtype, index):
    """test_pickle, test_to, test_save_load_state_dict: whatever carries a module carries all of it."""
    given = _inputs(info, dtype, **_with_packed(info))[index]
    ours, _ = _pair(info, given, dtype, True)
    args = given.forward_input.args
    expected = ours(*args)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    fresh = OURS[info.module_cls](*given.constructor_input.args, **given.constructor_input.kwargs, dtype=dtype)
    fresh.load_state_dict(ours.state_dict())
    for other in (
        copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(saved, weights_only=False), fresh,
        copy.deepcopy(ours).double().to("cpu", dtype),
    ):  # fmt: skip
        assert repr(other) == repr(ours)
        _assert_same(other(*args), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("info", "dtype", "index"), list(_all()))
def test_factory_arguments(info, dtype, index):
    given = _inputs(info, dtype, **_with_packed(info))[index]
    args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
    cls, theirs = OURS[info.module_cls], info.module_cls
    on_meta = cls(*args, **kwargs, device="meta", dtype=dtype)
    shapes = {name: p.shape for name, p in theirs(*args, **kwargs).named_parameters()}
    assert {name: p.shape for name, p in on_meta.named_parameters()} == shapes
    assert {(p.device.type, p.dtype) for p in on_meta.parameters()} == {("meta", dtype)}
    module = on_meta.to_empty(device="cpu")
    module.reset_parameters()
    module.load_state_dict(theirs(*args, **kwargs, dtype=dtype).state_dict())
    assert all(o.isfinite().all() for o in _flat(module(*given.forward_input.args)))


def _errors():
    for info in INFOS:
        count = len(info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ))  # fmt: skip
        for index in range(count):
            yield pytest.param(info, index, id=f"{info.name}-{index}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("info", "index"), list(_errors()))
def test_errors(info, index, dtype):
    given = info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True)[index]
    constructor, forward = given.module_error_input.constructor_input, given.module_error_input.forward_input
    cls = OURS[info.module_cls]
    if given.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(given.error_type, match=given.error_regex):
            cls(*constructor.args, **constructor.kwargs)
    else:
        module = cls(*constructor.args, **constructor.kwargs)
        with pytest.raises(given.error_type, match=given.error_regex):
            module(*forward.args, **forward.kwargs)


def test_all_inputs_were_found():
    """A release that ships other lists must not make this file pass by being empty."""
    assert {info.module_cls for info in INFOS} == set(OURS)
    assert len(list(_all((torch.float32,)))) >= 3 + 32 + 32 - 1
    assert len(list(_errors())) >= 6
