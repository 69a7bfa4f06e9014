"""Calls with one wrong argument: a clear error before a kernel runs, nothing written, no state lost."""

from __future__ import annotations

import re
from typing import Any

import torch
from fused_rin import BackendError
from torch import Tensor, nn

from tests.fuzz.cases import Case

# One of these is in a text that says what was expected.
WORDS = re.compile(
    "[Ee]xpected|must|does(n't| not) match|no memory|inconsistent|should|can only|need|is for|cannot run|storage"
)


def _freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def check_mistake(case: Case) -> None:
    from tests.fuzz.checks import Checked

    checked = Checked(case)
    module, given = checked.module, checked.arguments
    name = case.mistake.removeprefix("cell:")
    in_torch, name = name.startswith("torch:"), name.removeprefix("torch:")
    before = [p.detach().clone() for p in module.parameters()]
    want = [t.detach().clone() for t in checked.call(module, given.x, given.h)]

    x, h, options = _wrong(case, name, given.x.clone(), given.h.clone())
    broken = module
    if name == "freed weight":
        broken = _copy(module)
        first = next(iter(broken.parameters()))
        first.data = first.data.clone()
        _freed(first.data)
    elif name == "no such backend":
        broken = _copy(module)
        broken.backend = "gpu"
    elif name == "backend that is not here":
        broken = _copy(module)
        broken.backend = "triton"
    error = _raised(broken, x, h, options)
    assert error is not None, f"{case.mistake}: no error"
    assert isinstance(error, (RuntimeError, ValueError, TypeError, AttributeError)), repr(error)
    if in_torch and case.heads == 1:
        theirs = _raised(module.to_rnn(), x, h, {})
        assert theirs is not None, f"{case.mistake}: torch raises nothing"
        assert type(error) is type(theirs), f"{case.mistake}: {error!r}, torch {theirs!r}"
    elif not in_torch:
        assert isinstance(error, (RuntimeError, ValueError, BackendError)), repr(error)
        assert WORDS.search(str(error)), f"{case.mistake}: {error}"

    for parameter, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    for t, old in zip(checked.call(module, given.x, given.h), want, strict=True):
        assert torch.equal(t, old)


def _copy(module: nn.Module) -> Any:
    import copy

    return copy.deepcopy(module)


def _raised(module: Any, x: Any, h: Any, options: dict[str, Any]) -> Exception | None:
    try:
        module(x, h, **options)
    except Exception as error:
        return error
    return None


def _wrong(case: Case, name: str, x: Tensor, h: Tensor) -> tuple[Any, Any, dict[str, Any]]:
    """Input, state and keyword arguments with the mistake in them."""
    batch, steps, time = case.batch, case.steps, 1 if case.batch_first else 0
    rows = (batch, steps) if case.batch_first else (steps, batch)
    if case.kind == "cell":
        made = {
            "input too wide": (torch.cat([x, x], -1), h),
            "input of three axes": (x[None], h),
            "state of another batch": (x, torch.cat([h, h])),
            "state too wide": (x, torch.cat([h, h], -1)),
        }
        if name in made:
            return *made[name], {}
        return (_freed(x) if name == "freed input" else x), h, {}
    made = {
        "input of one axis": (x[0, 0], h),
        "input of four axes": (x[None], h),
        "input too wide": (torch.cat([x, x], -1), h),
        "no steps": (x.narrow(time, 0, 0), h),
        "state of another batch": (x, torch.cat([h, h], 1)),
        "state of more layers": (x, torch.cat([h, h])),
        "state too wide": (x, torch.cat([h, h], -1)),
        "state unbatched": (x, h[:, 0]),
        "input of another dtype": (x.double(), h),
        "state of another dtype": (x, h.double()),
        "no tensor": ([1.0], h),
    }
    if name in made:
        return *made[name], {}
    whole = torch.full((batch,), steps)
    options: dict[str, Any] = {
        "lengths too long": {"lengths": whole + 1},
        "lengths negative": {"lengths": whole - steps - 1},
        "lengths of another batch": {"lengths": whole[1:]},
        "lengths of floats": {"lengths": whole.float()},
        "resets of integers": {"resets": torch.zeros(rows, dtype=torch.int64)},
        "resets of another shape": {"resets": torch.zeros(rows[0] + 1, rows[1], dtype=torch.bool)},
        "lengths of unbatched input": {"lengths": whole},
    }.get(name, {})
    if name == "lengths of unbatched input":
        return (x[0] if case.batch_first else x[:, 0]), h[:, 0], options
    if name == "freed input":
        return _freed(x), h, {}
    if name == "freed state":
        return x, _freed(h), {}
    return x, h, options
