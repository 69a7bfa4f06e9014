"""Calls that cannot be: an error of torch's own type before a kernel runs, nothing written, and the next call as ever.

As mistakes.py, whose list is of a RIN's arguments; here are those of recurrence, of packed batches, of cells, of
weights that were exchanged, and of constructors.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fused_rin import RIN, RINCell, cpu, recurrence
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tests.fuzz.cases import DTYPES, Choose
from tests.fuzz.mistakes import WORDS
from tests.fuzz.twisting import same_bits

ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class Refused:
    kind: str  # "rin", "cell", "recurrence", "packed", "weights", "new"
    seed: int
    what: str
    dtype: str = "float32"
    steps: int = 1
    batch: int = 2
    inputs: int = 3
    hidden: int = 4
    layers: int = 1
    directions: int = 1
    bias: bool = True
    batch_first: bool = False
    skip: float = 1.0
    activation: str = "relu"
    grad: bool = True
    state: bool = True


def draw(choose: Choose) -> Refused:
    kind = choose(tuple(WHAT))
    return Refused(
        kind, choose(range(1 << 16)), choose(WHAT[kind]), choose(tuple(DTYPES)), choose((1, 2, 3, 9, 20)),
        choose((2, 3, 5, 9)), choose((2, 3, 8)), choose((4, 6, 16, 33)), choose((1, 2)), choose((1, 2)),
        choose((True, True, False)), choose((False, True)), choose((0.0, 0.0, 1.0, 0.3)), choose(("relu", "tanh")),
        choose((True, False)), choose((True, True, False)),
    )  # fmt: skip


# What a tensor is put in place of: of any argument.
OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda t: None,
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 1.0,
    "an array": lambda t: t.float().numpy(),
    "a tuple": lambda t: (t, t),
    "integers": lambda t: t.to(torch.int64),
    "bools": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "on meta": lambda t: t.to("meta"),
    "freed": lambda t: (t, t.untyped_storage().resize_(0))[0],
    "freed slice": lambda t: _freed_slice(t),
    "another float": lambda t: t.to(torch.float64 if t.dtype is not torch.float64 else torch.float32),
    "no axes": lambda t: t.flatten()[0],
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t[0],
    "two axes more": lambda t: t[None, None],
    "one wider": lambda t: torch.cat([t, t[..., :1]], -1),
    "one narrower": lambda t: t[..., 1:],
    "no width": lambda t: t[..., :0],
    "one longer": lambda t: torch.cat([t, t[:1]]),
    "one shorter": lambda t: t[1:],
    "nothing": lambda t: t[:0],
}
# Of which torch says what it comes to first.
NOT_TENSORS = ("None", "a list", "a number", "an array", "a tuple", "sparse")
WHAT = {
    "rin": tuple(f"{who}: {how}" for who in ("input", "state") for how in OTHERS),
    "cell": tuple(f"{who}: {how}" for who in ("input", "state") for how in OTHERS),
    "recurrence": (
        *(f"{who}: {how}" for who in ("pre", "weight", "state", "resets", "lengths") for how in OTHERS),
        "lengths too long", "lengths negative", "lengths and batch sizes", "batch sizes rising", "batch sizes zero",
        "batch sizes empty", "batch sizes negative", "batch sizes int32", "batch sizes floats", "batch sizes of other",
        "reverse of another", "activation", "skip nan", "skip inf", "backend", "backend not here",
    ),
    "packed": (
        *(f"{who}: {how}" for who in ("data", "state", "resets") for how in OTHERS),
        "lengths too", "batch sizes rising", "batch sizes zero", "batch sizes empty", "batch sizes of other",
        "batch sizes int32",
    ),
    "weights": tuple(f"{who}: {how}" for who in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for how in OTHERS),
    "new": (
        "hidden_size=0", "hidden_size=-1", "num_layers=0", "num_layers=-1", "dropout=1.5", "dropout=-0.1",
        "dropout='a'", "dropout=True", "nonlinearity='gelu'", "nonlinearity=None", "hidden_size=2.5",
        "input_size=2.5", "input_size=-1", "dtype='float'", "dtype=torch.int64", "device='nowhere'", "bias_=1",
        "hidden_size=None", "proj_size=2", "num_heads=0", "num_heads=5", "num_heads=1.5", "skip='1'", "skip=None",
        "backend='gpu'",
    ),
}  # fmt: skip


def _freed_slice(tensor: Tensor) -> Tensor:
    whole = torch.cat([tensor[:1], tensor])
    part = whole[1:]
    whole.untyped_storage().resize_(0)
    return part


# Not refused by torch or by us, or refused where nothing can be compared.
def _is_valid(case: Refused) -> bool:
    who, _, how = case.what.partition(": ")
    if who in ("state", "resets", "lengths") and how == "None":
        return True
    if case.kind == "recurrence" and who == "lengths" and how in ("a list", "an array", "integers", "a tuple"):
        return True
    if who in ("resets", "lengths") and how == "bools":
        return who == "resets"
    return who.startswith("bias") and (how == "None" or not case.bias)


def how_of(case: Refused) -> str:
    return case.what.partition(": ")[2]


class Counting:
    """The native module, counting its calls."""

    def __init__(self, native: Any) -> None:
        self.native, self.calls = native, 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.native, name)
        if name not in ("sweep", "layer_forward", "layer_backward", "step"):
            return value

        def call(*arguments: Any) -> Any:
            self.calls += 1
            return value(*arguments)

        return call


def check(case: Refused) -> str:
    if _is_valid(case):
        return "valid"
    random.seed(case.seed)
    torch.manual_seed(case.seed)
    if case.kind == "new":
        return _check_new(case)
    right, wrong, theirs, tensors = _CALLS[case.kind](case)
    with torch.set_grad_enabled(case.grad):
        want = [t.detach().clone() for t in right()] if right is not None else []
        before = [t.detach().clone() for t in tensors]
        counting = Counting(cpu._native)
        cpu._native = counting
        try:
            error = _raised(wrong)
        finally:
            cpu._native = counting.native
        if "freed" in case.what:  # torch's own products read it all the same
            theirs = None
        expected = None if theirs is None else _raised(theirs)
        for t, old in zip(tensors, before, strict=True):
            assert same_bits(t, old), "an argument was written"
        again = [t.detach() for t in right()] if right is not None else []
        assert all(same_bits(a, b) for a, b in zip(again, want, strict=True)), "the next call is another"
    if expected is None and theirs is not None:
        # Torch takes it: then so may we, and if we do not, we say why.
        if error is not None:
            assert isinstance(error, ERRORS), repr(error)
            assert how_of(case) in NOT_TENSORS or WORDS.search(str(error)), f"torch takes it; {error!r}"
        return "taken"
    if error is None and how_of(case) == "sparse":  # some products take it
        return "taken"
    assert error is not None, f"no error; torch: {expected!r}"
    assert isinstance(error, ERRORS), repr(error)
    later = case.kind == "weights" and case.layers > 1  # layers before it are not wrong
    assert later or not counting.calls, f"a kernel ran before {error!r}"
    if expected is not None and how_of(case) not in NOT_TENSORS:
        assert type(error) is type(expected), f"{error!r}, torch {expected!r}"
    return "error"


def _raised(function: Callable[[], Any]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def _tensor(*shape: int, dtype: str) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DTYPES[dtype])


def _made(case: Refused) -> tuple[Any, Any]:
    """A module and torch's with its weights."""
    options = {"bias": case.bias, "nonlinearity": case.activation, "dtype": DTYPES[case.dtype]}
    if case.kind == "cell" or (case.kind == "weights" and case.seed % 2):
        module: Any = RINCell(case.inputs, case.hidden, skip=case.skip, **options)
    else:
        module = RIN(
            case.inputs, case.hidden, case.layers, batch_first=case.batch_first and case.kind != "packed",
            bidirectional=case.directions == 2, skip=case.skip, **options,
        )  # fmt: skip
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return module, module.to_rnn()


def _given(case: Refused, module: Any) -> tuple[Tensor, Tensor]:
    if isinstance(module, RINCell):
        shapes: Any = (case.batch, case.inputs), (case.batch, case.hidden)
    else:
        rows = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
        shapes = (*rows, case.inputs), (case.layers * case.directions, case.batch, case.hidden)
    x, h = (_tensor(*shape, dtype=case.dtype) for shape in shapes)
    return x, h


def _results(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [out[0].data if isinstance(out[0], PackedSequence) else out[0], out[1]]


def _of_module(case: Refused) -> Any:
    module, theirs = _made(case)
    x, h = _given(case, module)
    who, _, how = case.what.partition(": ")
    bad_x, bad_h = x.clone(), h.clone() if case.state or who == "state" else None
    if who == "input":
        bad_x = OTHERS[how](bad_x)
    else:
        bad_h = OTHERS[how](bad_h)
    return (
        lambda: _results(module(x, h)), lambda: module(bad_x, bad_h), lambda: theirs(bad_x, bad_h),
        [x, h, *module.parameters()],
    )  # fmt: skip


def _of_weights(case: Refused) -> Any:
    module, _ = _made(case)
    x, h = _given(case, module)
    h = h if case.state else None
    who, _, how = case.what.partition(": ")
    broken, theirs = copy.deepcopy(module), module.to_rnn()
    names = [name for name in broken._parameters if name.startswith(who)]
    name = names[case.seed // 2 % len(names)]
    for one in (broken, theirs):
        value = OTHERS[how](getattr(one, name).data.clone())
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            setattr(one, name, nn.Parameter(value))
        else:
            del one._parameters[name]
            one.__dict__[name] = value
        if isinstance(one, nn.RNN) and isinstance(value, Tensor):
            one._flat_weights[one._flat_weights_names.index(name)] = getattr(one, name)
    return (
        lambda: _results(module(x, h)), lambda: broken(x, h), lambda: theirs(x, h),
        [x, *([] if h is None else [h]), *module.parameters()],
    )  # fmt: skip


def _sizes(case: Refused) -> Tensor:
    return torch.randint(1, case.batch + 1, (case.steps,)).sort(descending=True)[0]


def _bad_sizes(what: str, sizes: Tensor) -> Tensor:
    return {
        "batch sizes rising": torch.cat([sizes, sizes[-1:] + 1]),
        "batch sizes zero": torch.cat([sizes, sizes.new_zeros(1)]),
        "batch sizes negative": torch.cat([sizes + 1, sizes.new_full((1,), -len(sizes))]),
        "batch sizes empty": sizes[:0],
        "batch sizes int32": sizes.int(),
        "batch sizes floats": sizes.double(),
        "batch sizes of other": torch.cat([sizes[:1] + 1, sizes[1:]]),
    }[what]


def _of_packed(case: Refused) -> Any:
    module, theirs = _made(case)
    sizes = _sizes(case)
    data = _tensor(int(sizes.sum()), case.inputs, dtype=case.dtype)
    h = _tensor(case.layers * case.directions, int(sizes[0]), case.hidden, dtype=case.dtype)
    who, _, how = case.what.partition(": ")
    bad = {"data": data.clone(), "state": h.clone(), "sizes": sizes}
    options: dict[str, Any] = {}
    if who in bad:
        bad[who] = OTHERS[how](bad[who])
    elif who == "resets":
        options["resets"] = OTHERS[how](torch.rand(len(data)) < 0.3)
    elif who == "lengths too":
        options["lengths"] = [1] * int(sizes[0])
    else:
        bad["sizes"] = _bad_sizes(case.what, sizes)
    packed = PackedSequence(data, sizes)

    def call(module: Any, **options: Any) -> Any:
        return module(PackedSequence(bad["data"], bad["sizes"]), bad["state"], **options)

    compared = who in ("data", "state")
    return (
        lambda: _results(module(packed, h)), lambda: call(module, **options),
        (lambda: call(theirs)) if compared else None, [data, h, sizes, *module.parameters()],
    )  # fmt: skip


def _of_recurrence(case: Refused) -> Any:
    groups, side = case.directions, case.hidden
    packed = case.what.startswith("batch sizes")
    sizes = _sizes(case)
    batch = int(sizes[0]) if packed else case.batch
    rows = (int(sizes.sum()),) if packed else (case.steps, batch)
    right: dict[str, Any] = {
        "pre": _tensor(*rows, groups, side, dtype=case.dtype),
        "weight": _tensor(groups, side, side, dtype=case.dtype) * 0.1,
        "h0": _tensor(batch, groups, side, dtype=case.dtype),
        "skip": case.skip, "activation": case.activation, "resets": torch.rand(rows) < 0.3,
    }  # fmt: skip
    if packed:
        right["batch_sizes"] = sizes
    else:
        right["lengths"] = torch.randint(0, case.steps + 1, (batch,))
    wrong = dict(right)
    who, _, how = case.what.partition(": ")
    who = {"state": "h0"}.get(who, who)
    if how:
        wrong[who] = OTHERS[how](right[who].clone())
    elif packed:
        wrong["batch_sizes"] = _bad_sizes(case.what, sizes)
    else:
        wrong.update(
            {
                "lengths too long": {"lengths": right["lengths"] + case.steps + 1},
                "lengths negative": {"lengths": right["lengths"] - case.steps - 1},
                "lengths and batch sizes": {"batch_sizes": sizes, "pre": right["pre"][:, 0]},
                "reverse of another": {"reverse": [True] * (groups + 1)},
                "activation": {"activation": "gelu"}, "skip nan": {"skip": float("nan")},
                "skip inf": {"skip": float("inf")}, "backend": {"backend": "gpu"},
                "backend not here": {"backend": "triton"},
            }[case.what]
        )  # fmt: skip
    tensors = [t for t in right.values() if isinstance(t, Tensor)]
    return lambda: list(recurrence(**right)), lambda: recurrence(**wrong), None, tensors


_CALLS = {
    "rin": _of_module, "cell": _of_module, "packed": _of_packed, "weights": _of_weights, "recurrence": _of_recurrence,
}  # fmt: skip


def _check_new(case: Refused) -> str:
    """Constructors, against torch's where the argument is torch's."""
    text = case.what
    name = text.split("=")[0]
    options: dict[str, Any] = eval(f"dict({text})", {"torch": torch})
    cell = bool(case.seed % 2)
    own, torchs = (RINCell, nn.RNNCell) if cell else (RIN, nn.RNN)
    if cell and name in ("num_layers", "dropout", "num_heads", "proj_size"):
        return "valid"
    arguments = {"input_size": 3, "hidden_size": 4, **options}
    error = _raised(lambda: own(**arguments))
    if name in ("num_heads", "skip", "backend"):
        assert isinstance(error, (ValueError, TypeError)), repr(error)
        return "error"
    theirs = _raised(lambda: torchs(**arguments))
    if cell and name in ("hidden_size", "input_size") and isinstance(error, ValueError):
        return "error"  # as RNN's; of RNNCell's negative sizes the allocator complains
    if theirs is None:  # torch takes a negative input_size
        assert error is None or isinstance(error, ValueError), repr(error)
        return "taken"
    assert type(error) is type(theirs), f"{error!r}, torch {theirs!r}"
    return "error"
