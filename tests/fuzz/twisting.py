"""Runs a twisted case (twists.py): as checks.py does, but for the first of its runs, that of the module itself."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from fused_rin import cpu
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.conftest import use_threads
from tests.fuzz.checks import Checked
from tests.fuzz.twists import GRADIENTS, Twisted

NAN = float("nan")


def check(case: Twisted) -> str:
    with use_threads(case.threads):
        return Twisting(case).run()


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def guarded(tensor: Tensor) -> Tensor:
    """The same numbers between NaN, which a kernel that reads too far meets. Differentiable."""
    pads = [1, 3] + [1, 1] * (tensor.dim() - 1)
    return F.pad(tensor, pads, value=NAN)[(*[slice(1, -1)] * (tensor.dim() - 1), slice(1, -3))]


def at_odd_address(tensor: Tensor) -> Tensor:
    """A copy at an address that is no multiple of its item's size, as memory-mapped files give."""
    if not tensor.numel():
        return tensor
    odd = torch.frombuffer(bytearray(tensor.numel() * tensor.itemsize + 1), dtype=tensor.dtype, offset=1)
    return odd[: tensor.numel()].view(tensor.shape).copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, NAN)], -1)[..., 0]


class Twisting(Checked):
    """`Checked`, whose first run, of the module itself, is twisted; those of the reference are as ever."""

    def __init__(self, case: Twisted) -> None:
        self.twist, self.twisting = case.twist, False
        self.choose = random.Random(case.seed)
        self.mask: list[bool] | None = None
        super().__init__(case)

    def run(self) -> str:
        if self.twist == "not finite":
            return self.run_not_finite()
        with contextlib.ExitStack() as stack:
            if self.twist == "other set":
                stack.enter_context(cpu.use_instruction_set(self.choose.choice(cpu.instruction_sets())))
            if self.twist == "deterministic":
                stack.enter_context(_deterministic())
            return super().run()

    # ---- tensors ----

    def make_module(self) -> Any:
        module = super().make_module()
        parameters = list(module.parameters())
        if self.twist == "tied weights":
            for name in ("weight_ih", "weight_hh"):
                setattr(module, f"{name}_l1", getattr(module, f"{name}_l0"))
        elif self.twist == "flat weights":
            flat = torch.cat([torch.full((1,), NAN, dtype=self.dtype), *[p.data.flatten() for p in parameters]])
            for p, part in zip(parameters, flat[1:].split([p.numel() for p in parameters]), strict=True):
                p.data = part.view(p.shape)
        for p in parameters:
            if self.twist == "negated weights":
                p.data = torch._neg_view(-p.data)
            elif self.twist == "expanded weights":
                p.data = p.data[:1].clone().expand(p.shape)
            elif self.twist == "guarded":
                p.data = guarded(p.data)
            elif self.twist == "odd addresses":
                p.data = at_odd_address(p.data)
        return module

    def leaves(self, module: Any, dtype: torch.dtype, layouts: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        self.twisting = module is self.module
        case, twist = self.case, self.twist
        x, h, wanted = super().leaves(module, dtype, layouts)
        if twist == "aliased":
            wanted = [t for t in wanted if t is not h]
            if case.kind == "cell":
                h = x
            elif case.kind == "recurrence":
                h = x[0]
            else:
                h = x[:, :1].transpose(0, 1) if self.batch_first() else x[:1]
        if twist == "some trained":
            if self.mask is None:
                self.mask = [self.choose.random() < 0.5 for _ in wanted]
            for t, is_trained in zip(wanted, self.mask, strict=True):
                t.requires_grad_(is_trained)
            wanted = [t for t in wanted if t.requires_grad]
        if not self.twisting:
            return x, h, wanted
        if twist == "guarded":
            x, h = guarded(x), None if h is None else guarded(h)
        elif twist == "odd addresses":
            if not x.requires_grad:  # a leaf is what gradients are wanted of
                x = at_odd_address(x)
            if h is not None and not h.requires_grad:
                h = at_odd_address(h)
        elif twist == "past the end":
            past = torch.arange(case.steps)[:, None] >= self.arguments.lengths
            past = past.t() if self.batch_first() else past
            x = x.masked_fill(past.reshape(*past.shape, *[1] * (x.dim() - 2)), self.choose.choice((NAN, float("inf"))))
        elif twist == "subclass":
            x = x.as_subclass(Subclass)
        return x, h, wanted

    def batch_first(self) -> bool:
        case = self.case
        return case.kind == "layers" and case.batch_first and not case.unbatched and case.rows in ("full", "lengths")

    # ---- calls ----

    def call(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        way = getattr(self, "call_" + self.twist.replace(" ", "_"), None) if self.twisting else None
        self.before = [(t, t.detach().clone()) for t in (x, h, *module.parameters()) if t is not None]
        out = super().call(module, x, h) if way is None else way(module, x, h)
        if self.twisting and self.twist in ("repeat", "guarded", "large", "other set"):
            for t, old in self.before:
                assert same_bits(t.detach(), old), "an argument was written"
        return out

    def arguments_there(self) -> list[Tensor]:
        """Those that have memory."""
        return [t for t, _ in self.before if not t._is_zerotensor()]

    def plainly(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        return Checked.call(self, module, x, h)

    def call_repeat(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        """The same bits again, in memory of their own."""
        first = self.plainly(module, x, h)
        kept = [t.detach().clone() for t in first]
        second = self.plainly(module, x, h)
        storages = [t.untyped_storage().data_ptr() for t in (*first, *second, *self.arguments_there()) if t.numel()]
        mine = [t.untyped_storage().data_ptr() for t in (*first, *second) if t.numel()]
        assert all(storages.count(place) == 1 for place in mine), "results share memory"
        for a, b, c in zip(first, second, kept, strict=True):
            assert same_bits(a, c), "a second call wrote to the first one's result"
            assert same_bits(a, b), "not the same bits again"
        return first

    def call_dispatch_mode(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        with Dispatch():
            return self.plainly(module, x, h)

    def call_function_mode(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        with Function():
            return self.plainly(module, x, h)

    def call_meta_device(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        if self.case.rows in ("packed", "shuffled"):  # torch packs on the default device
            return self.plainly(module, x, h)
        with torch.device("meta"):
            return self.plainly(module, x, h)

    def call_functional_call(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        return torch.func.functional_call(_Calling(self, module), _named(module), (x, h))

    def call_checkpoint(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        return checkpoint(lambda x, h: self.plainly(module, x, h), x, h, use_reentrant=False)

    def call_trace(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        given = (x,) if h is None else (x, h)
        function = torch.jit.trace(_Calling(self, module), given, check_trace=False)
        return function(*given)

    def call_subclass(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(t.as_subclass(Tensor) for t in self.plainly(module, x, h))

    def call_edited(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        """Weights that were others in the call before."""
        old = [(p, p.data.clone()) for p in module.parameters()]
        with torch.no_grad():
            for p in module.parameters():
                if self.choose.random() < 0.5:
                    p.data = torch.randn_like(p)
                else:
                    p.mul_(-1.5)
            self.plainly(module, x, h)
            for p, values in old:
                p.copy_(values)
        return self.plainly(module, x, h)

    def call_vmap(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        xs = torch.stack([x.detach().flip(0), x])
        if h is None:
            out = torch.func.vmap(lambda x: self.plainly(module, x, None))(xs)
        else:
            out = torch.func.vmap(lambda x, h: self.plainly(module, x, h), in_dims=(0, None))(xs, h)
        return tuple(t[1] for t in out)

    def call_jvp(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(self.case.seed + 2)
        along = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in (x, h) if t is not None]
        given = tuple(t.detach() for t in (x, h) if t is not None)
        out, self.moved = torch.func.jvp(lambda x, h=None: self.plainly(module, x, h), given, tuple(along))
        self.along = along
        results = self.plainly(module, x, h)
        for a, b in zip(out, results, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-8, atol=1e-8)
        return results

    def call_pieces(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        """The first steps, and from their state the others."""
        given, time = self.arguments, 1 if self.batch_first() else 0
        lengths, resets = given.lengths, given.resets
        first = self.choose.randrange(1, self.case.steps)
        outs = []
        try:
            for low, high in ((0, first), (first, self.case.steps)):
                given.lengths = None if lengths is None else (lengths - low).clamp(0, high - low)
                given.resets = None if resets is None else resets.narrow(time, low, high - low)
                out, h = self.plainly(module, x.narrow(time, low, high - low), h)
                outs.append(out)
        finally:
            given.lengths, given.resets = lengths, resets
        return torch.cat(outs, time), h

    def call_rows(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        """Each sequence by itself."""
        given, axis = self.arguments, 0 if self.batch_first() else 1
        of_state = 0 if self.case.kind == "recurrence" else 1
        lengths, resets = given.lengths, given.resets
        outs = []
        try:
            for b in range(self.case.batch):
                given.lengths = None if lengths is None else lengths[b : b + 1]
                given.resets = None if resets is None else resets.narrow(axis, b, 1)
                outs.append(self.plainly(module, x.narrow(axis, b, 1), None if h is None else h.narrow(of_state, b, 1)))
        finally:
            given.lengths, given.resets = lengths, resets
        return torch.cat([out for out, _ in outs], axis), torch.cat([h_n for _, h_n in outs], of_state)

    def call_row_arguments(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        """Lengths and resets of other kinds and layouts."""
        given = self.arguments
        lengths, resets = given.lengths, given.resets
        kind = self.choose.choice(("list", "int32", "strided", "transposed"))
        try:
            if kind == "list":
                given.lengths = lengths.tolist()
            elif kind == "int32":
                given.lengths = lengths.int()
            else:
                given.lengths = torch.stack([lengths, lengths + 1000], 1)[:, 0]
            if kind == "transposed":
                given.resets = resets.t().contiguous().t()
            else:
                given.resets = torch.stack([resets, ~resets], -1)[..., 0]
            return self.plainly(module, x, h)
        finally:
            given.lengths, given.resets = lengths, resets

    # ---- gradients ----

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with super().context(), contextlib.ExitStack() as stack:
            pack = {"hooks dtype": _wider, "hooks negated": _negated}.get(self.twist)
            if pack is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed))
            yield

    def tangents(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """What the outputs' gradients are: in the twisted run laid out otherwise, with the same values."""
        draw = torch.Generator().manual_seed(self.case.seed + 1)
        made = []
        for t in outputs:
            w = torch.randn(t.shape, generator=draw, dtype=torch.float64).to(self.dtype).to(t.dtype)
            layout = self.twist.removeprefix("grad ")
            if layout == "expanded":
                w = (w.flatten()[:1].sum().expand(t.shape)) if t.numel() else w
                w = w if self.twisting else w.clone(memory_format=torch.contiguous_format)
            elif layout == "zero":
                w = torch._efficientzerotensor(t.shape, dtype=t.dtype) if self.twisting else torch.zeros_like(w)
            elif self.twisting and layout == "negated":
                w = torch._neg_view(-w)
            elif self.twisting and layout == "strided":
                w = strided(w)
            elif self.twisting and layout == "offset":
                w = guarded(w)
            made.append(w)
        return made

    def with_gradients(self, outputs: tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor]:
        twist = self.twist
        if twist not in GRADIENTS and twist != "jvp":
            return super().with_gradients(outputs, wanted)
        weights = self.tangents(outputs)
        used = [(t, w) for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
        if twist in ("only output", "only state") and len(used) == 2:
            used = used[:1] if twist == "only output" else used[1:]
        if not wanted or not used:
            return list(outputs)
        results, leaves = list(outputs), wanted
        outs, weights = [t for t, _ in used], [w for _, w in used]
        if not self.twisting or twist not in GRADIENTS[7:]:
            second = self.case.context == "second"
            grads = list(torch.autograd.grad(outs, leaves, weights, create_graph=second))
            if self.twisting and twist == "jvp":
                self.check_jvp(weights, grads)
            results += grads
            if second:
                total = sum(g.square().sum() for g in grads)
                again: Any = [None] * len(leaves)
                if total.requires_grad:
                    again = torch.autograd.grad(total, leaves, allow_unused=True)
                results += [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, again, strict=True)]
            return results
        return getattr(self, "grad_" + twist.replace(" ", "_"))(results, outs, weights, leaves)

    def check_jvp(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        """<w, J v> = <J^T w, v>, if the input and the state were trained."""
        if self.case.trained != "all":
            return
        there = sum(float((w * m).sum()) for w, m in zip(weights, self.moved, strict=True))
        back = sum(float((g * v).sum()) for g, v in zip(grads, self.along, strict=False))
        size = sum(float((w * m).abs().sum()) for w, m in zip(weights, self.moved, strict=True))
        assert abs(there - back) <= 1e-9 * max(1.0, size), f"forward mode {there}, backward {back}"

    def grad_hooks_dtype(self, results: Any, outs: Any, weights: Any, leaves: Any) -> list[Tensor]:
        try:
            return results + list(torch.autograd.grad(outs, leaves, weights))
        except RuntimeError as error:  # torch's own operators refuse it, and say so
            if "dtype" not in str(error) and "type" not in str(error):
                raise
            return results

    def grad_hooks_negated(self, results: Any, outs: Any, weights: Any, leaves: Any) -> list[Tensor]:
        return results + list(torch.autograd.grad(outs, leaves, weights))

    def grad_hooks_tensor(self, results: Any, outs: Any, weights: Any, leaves: Any) -> list[Tensor]:
        """Tensor hooks at both ends that hand on the same numbers in other tensors."""
        seen: list[int] = []
        for t in outs:
            t.register_hook(lambda g: torch._neg_view(-g))
        for i, t in enumerate(leaves):
            t.register_hook(lambda g, i=i: (seen.append(i), strided(g))[1])
        grads = list(torch.autograd.grad(outs, leaves, weights))
        assert sorted(seen) == list(range(len(leaves))), f"hooks ran for {seen}"
        return results + grads

    def grad_twice(self, results: Any, outs: Any, weights: Any, leaves: Any) -> list[Tensor]:
        first = torch.autograd.grad(outs, leaves, weights, retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(outs, leaves, weights)
        for a, b, c in zip(first, second, kept, strict=True):
            assert same_bits(a, c), "a second backward wrote to the first one's gradient"
            assert same_bits(b, c), "not the same bits again"
        return results + list(first)

    def grad_accumulated(self, results: Any, outs: Any, weights: Any, leaves: Any) -> list[Tensor]:
        """`backward` into .grad, twice; no two of them in one memory, since they are scaled in place."""
        for t in leaves:
            t.grad = None
        torch.autograd.backward(outs, weights, retain_graph=True)
        first = [t.grad.clone() for t in leaves]
        torch.autograd.backward(outs, weights)
        for t, g in zip(leaves, first, strict=True):
            assert same_bits(t.grad, g + g), "accumulated"
            t.grad.mul_(0.5)
        for t, g in zip(leaves, first, strict=True):
            assert same_bits(t.grad, g), "gradients share memory"
            t.grad = None
        return results + first

    def grad_batched_grads(self, results: Any, outs: Any, weights: Any, leaves: Any) -> list[Tensor]:
        stacked = [torch.stack([torch.ones_like(w), w]) for w in weights]
        return results + [g[1] for g in torch.autograd.grad(outs, leaves, stacked, is_grads_batched=True)]

    def grad_vjp(self, results: Any, outs: Any, weights: Any, leaves: Any) -> list[Tensor]:
        """Of a function of the weights, by torch.func, which knows no leaves."""
        module, named = self.module, _named(self.module)
        x, h, _ = super().leaves(module, self.dtype, layouts=False)
        detached = {name: p.detach() for name, p in named.items()}
        h = None if h is None else h.detach()

        def function(x: Tensor, h: Tensor | None, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
            made = torch.func.functional_call(_Calling(self, module), weights, (x, h))
            return tuple(t for t, old in zip(made, results, strict=True) if old.requires_grad)

        if h is None:
            out, back = torch.func.vjp(lambda x, w: function(x, None, w), x.detach(), detached)
            grad_x, by_name = back(tuple(weights))
            grads = [grad_x]
        else:
            out, back = torch.func.vjp(function, x.detach(), h, detached)
            grad_x, grad_h, by_name = back(tuple(weights))
            grads = [grad_x, grad_h]
        made = iter(out)
        results = [next(made) if t.requires_grad else t for t in results]
        mine = list(by_name.values())
        trained = self.case.trained
        grads = (grads if trained in ("all", "input") else []) + (mine if trained in ("all", "weights") else [])
        return results + grads

    def grad_written(self, results: Any, outs: Any, weights: Any, leaves: Any) -> list[Tensor]:
        """A tensor of the call is written before backward: an error, or the gradients from before."""
        kept = [t.detach().clone() for t in results]
        with torch.no_grad():
            self.choose.choice([*[t for t, _ in self.before], *results]).add_(1)
        try:
            return kept + list(torch.autograd.grad(outs, leaves, weights))
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            return kept

    # ---- numbers that are not finite ----

    def run_not_finite(self) -> str:
        """NaN and Inf where the reference has them, in the same dtype; except where rounding decides."""
        x, h, _ = self.leaves(self.module, self.dtype, layouts=False)
        target = self.choose.choice([t for t in (x, h, *self.module.parameters()) if t is not None])
        with torch.no_grad():
            x, h = x.detach(), None if h is None else h.detach()
            if target.numel():
                place = self.choose.randrange(target.numel())
                value = self.choose.choice((NAN, NAN, float("inf"), -float("inf")))
                for t in (x, h, *self.module.parameters()):
                    if t is not None and t.shape == target.shape and torch.equal(t, target):
                        flat = t.flatten()
                        flat[place] = value
                        t.copy_(flat.view(t.shape))
                        break
            got = self.call(self.module, x, h)
            plain_module = copy.deepcopy(self.module)
            plain_module.backend = "reference"
            plain = self.plainly(plain_module, x, h)
        for i, (a, b) in enumerate(zip(got, plain, strict=True)):
            assert torch.equal(a.isnan(), b.isnan()), f"output {i}: NaN at other places"
            assert torch.equal(a.isinf(), b.isinf()), f"output {i}: Inf at other places"
        return "value"


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


class _Calling(nn.Module):
    """A module whose forward is a case's call, so that functional_call can put other weights in."""

    def __init__(self, twisting: Twisting, module: nn.Module) -> None:
        super().__init__()
        self.module, self.plainly = module, twisting.plainly

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.plainly(self.module, x, h)


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {f"module.{name}": p for name, p in module.named_parameters()}


def _wider(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor.clone()


def _negated(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor.detach()) if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Memory that torch does not write holds NaN then."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
