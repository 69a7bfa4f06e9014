"""Shared by all tests: the tolerance rule, and problems to try kernels on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from fused_rin import cpu, reference
from fused_rin.problem import Rows, Rule, Units, sum_dtype
from torch import Tensor


@dataclass
class Case:
    """A random problem in some dtype, with everything that the sweeps take."""

    pre: Tensor
    weight: Tensor
    h0: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None
    resets: Tensor | None
    skip: float
    activation: str
    num_reversed: int
    units: Units | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.pre, self.weight, self.h0, self.lengths, self.offsets, self.resets

    @property
    def rows(self) -> Rows:
        return Rows(self.lengths, self.offsets, self.resets)

    @property
    def rule(self) -> Rule:
        return Rule(self.skip, self.activation, self.num_reversed)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Rows, Rule]:
        """What a backend's `forward` takes."""
        return self.pre, self.weight, self.h0, self.rows, self.rule

    @property
    def keywords(self) -> dict[str, Units]:
        return {} if self.units is None else {"units": self.units}

    def to(self, dtype: torch.dtype) -> Case:
        h0, units = (None if self.h0 is None else self.h0.to(dtype)), self.units
        if units is not None:
            factors = [None if t is None else t.to(sum_dtype(dtype)) for t in (units.skip, units.gain)]
            units = Units(units.form, *factors, None if units.noise is None else units.noise.to(dtype))  # type: ignore
        return replace(self, pre=self.pre.to(dtype), weight=self.weight.to(dtype), h0=h0, units=units)

    def on(self, device: torch.device | str) -> Case:
        names = ("pre", "weight", "h0", "lengths", "offsets", "resets")
        tensors = (getattr(self, name) for name in names)
        moved = {name: None if t is None else t.to(device) for name, t in zip(names, tensors, strict=True)}
        return replace(self, **moved)


def make_case(
    steps: int,
    batch: int,
    hidden: int,
    groups: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "full",
    h0: bool = True,
    resets: bool = False,
    skip: float = 1.0,
    activation: str = "relu",
    num_reversed: int = 0,
    seed: int = 0,
    form: str | None = None,
    noise: bool = False,
) -> Case:
    """`layout`: "full", "lengths" (some of them 0) or "packed". Values are such that states stay near 1 in size.

    With a form, units have factors of their own: leaks between 0.05 and 0.95.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    # Growth (1 + 0.3)^T has to be avoided for long sequences: the longer, the smaller U, and the skip below 1 by it.
    weight = normal(groups, hidden, hidden) * (0.5 / math.sqrt(hidden) / max(1.0, steps / 16))
    lengths = offsets = None
    rows: tuple[int, ...] = (steps, batch)
    if layout != "full":
        low = 1 if layout == "packed" else 0
        lengths = torch.randint(low, steps + 1, (batch,), generator=draw)
        if layout == "packed":
            lengths[0] = steps
            lengths = lengths.sort(descending=True)[0]
            sizes = (lengths > torch.arange(steps)[:, None]).sum(1)
            offsets = sizes.cumsum(0) - sizes
            rows = (int(sizes.sum()),)
    units = None
    if form is not None:
        leak = torch.rand(groups, hidden, generator=draw, dtype=torch.float64) * 0.9 + 0.05
        skip_, gain = ((1 - leak).to(sum_dtype(dtype)), leak.to(sum_dtype(dtype)))
        outside = form == "outside"
        units = Units(
            form, skip_, gain if outside else None, normal(*rows, groups, hidden) if noise and outside else None
        )
    return Case(
        units=units,
        pre=normal(*rows, groups, hidden),
        weight=weight,
        h0=normal(batch, groups, hidden) if h0 else None,
        lengths=lengths,
        offsets=offsets,
        resets=torch.rand(rows, generator=draw) < 0.25 if resets else None,
        skip=skip,
        activation=activation,
        num_reversed=num_reversed,
    )


def layouts(*reversals: tuple[int, int]) -> list[dict[str, object]]:
    """Options of `make_case`: every way to say which rows run, with and without h0, of (groups, num_reversed)."""
    return [
        {"layout": layout, "resets": resets, "h0": h0, "groups": groups, "num_reversed": num_reversed}
        for layout in ("full", "lengths", "packed")
        for resets in (False, True)
        for h0 in (False, True)
        for groups, num_reversed in reversals
    ]


def name_of(options: dict[str, object]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items())


def assert_within(
    what: str,
    got: Tensor,
    plain: Tensor,
    exact: Tensor,
    factor: float,
    terms: int,
    computed_in: torch.dtype | None = None,
) -> None:
    """The tolerance rule: got may miss `exact` (float64) by `factor` times what plain PyTorch misses it by.

    A small absolute part, a few last places (of `computed_in`, under autocast not the dtype of the result) of the
    largest value and for `terms` summands, covers the cases where plain PyTorch happens to be exact.
    """
    assert got.dtype == plain.dtype
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    error = (got.double() - exact).abs().max().item()
    allowed = factor * (plain.double() - exact).abs().max().item()
    allowed += 2 * torch.finfo(computed_in or got.dtype).eps * math.sqrt(terms) * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@contextlib.contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """So many, on processors that count as there and free."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if cpu._native is not None:
        cpu._native.assume_processors(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cpu._native is not None:
            cpu._native.assume_processors(0)


def check_sweeps(forward, backward, case: Case, *, seed: int = 1, threads: int = 1) -> None:
    """Forward and backward sweep of a backend on `case`, by the tolerance rule against the float64 reference.

    The backward sweep is compared on the kernel's own outputs, so that a unit that stops in one arithmetic and not
    in the other does not hide or feign an error of the sweep.
    """
    dtype, double = case.pre.dtype, case.to(torch.float64)
    kept: list[dict[str, Tensor]] = [{}, {}, {}]  # outside: what is written aside, by the kernel, plain and exact
    if case.units is not None and case.units.form == "outside":
        kept = [{"aside": torch.empty_like(t)} for t in (case.pre, case.pre, double.pre)]
    with use_threads(threads):
        out, h_n = forward(*case.arguments, **case.keywords, **kept[0])
    plain = reference.forward(*case.arguments, **case.keywords, **kept[1])
    exact = reference.forward(*double.arguments, **double.keywords, **kept[2])
    terms = case.pre.shape[-1] + case.pre.shape[0]
    assert_within("out", out, plain[0], exact[0], 2, terms)
    assert_within("h_n", h_n, plain[1], exact[1], 2, terms)
    saved, more, more_exact = out, {}, {}
    if case.units is not None:
        more, more_exact = {**case.keywords, "h0": case.h0}, {**double.keywords, "h0": double.h0}
    if kept[0]:
        assert_within("values", kept[0]["aside"], kept[1]["aside"], kept[2]["aside"], 2, terms)
        saved = kept[0]["aside"]

    draw = torch.Generator().manual_seed(seed)
    grad_out, grad_h_n = (torch.randn(t.shape, generator=draw, dtype=torch.float64).to(dtype) for t in (out, h_n))
    for name, g, g_n in (("both", grad_out, grad_h_n), ("out", grad_out, None), ("h_n", None, grad_h_n)):
        asides = [{key: torch.empty_like(t) for key, t in one.items()} for one in kept]
        with use_threads(threads):
            got = backward(g, g_n, case.weight, saved, case.rows, case.rule, **more, **asides[0])
        plain = reference.backward(g, g_n, case.weight, saved, case.rows, case.rule, **more, **asides[1])
        doubles = (None if t is None else t.double() for t in (g, g_n, case.weight, saved))
        exact = reference.backward(*doubles, case.rows, case.rule, **more_exact, **asides[2])
        if asides[0]:
            assert_within(f"grad_state from {name}", *[a["aside"] for a in asides], 3, terms)
        assert_within(f"grad_pre from {name}", got[0], plain[0], exact[0], 3, terms)
        assert_within(f"grad_h0 from {name}", got[1], plain[1], exact[1], 3, terms)


# Minutes each: first, so that no process is left with one of them at the end.
LONGEST = ("test_triton_interpreted.py", "test_triton_resources.py", "test_native.py", "test_block.py")
# What the tests of a module or folder have built for all of them, each process would build anew.
BUILT_ONCE = ("test_triton_resources.py", "test_distributed.py", "cuda_on_cpu")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist looks for groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        for name in (item.path.name, item.path.parent.name):
            if name in BUILT_ONCE:
                item.add_marker(pytest.mark.xdist_group(name))


def pytest_collection_finish(session: pytest.Session) -> None:
    """In a process of pytest-xdist, which marks a group by the end of its tests' names."""
    if not getattr(session.config.option, "loadgroup", False):
        return
    for item in session.items:
        if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
            pytest.exit(f"pytest {pytest.__version__} and pytest-xdist do not go together: no group has an effect")


@pytest.fixture(params=cpu.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    with cpu.use_instruction_set(request.param):
        yield request.param


class CudaModule:
    """What `fused_rin.cuda` asks the native module before it launches anything: as the default build has it."""

    architectures, ptx = "80 90a", 80

    @staticmethod
    def versions() -> tuple[int, int]:
        return 13000, 13000


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs hold NaN before a kernel writes them, not what happened to lie there."""
    real_like, real_new = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real_like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: real_new(*a, **k).fill_(float("nan")))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tests that want more say so; the reference's small products are fastest on one
