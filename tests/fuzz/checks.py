"""Runs a fuzz case: against the reference in its own dtype and in float64, and against torch.nn where skip is 0."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from fused_rin import PLRNN, RIN, DeepTransitionRIN, LeakyRNN, RINCell, recurrence, reference
from torch import Tensor, nn
from torch.nn.utils import rnn as rnn_utils

from tests.conftest import assert_within, use_threads
from tests.fuzz.cases import DTYPES, Case


def check(case: Case) -> str:
    """AssertionError if something is wrong. Returns what was checked: "value", "gradient", "error", or "overflow"."""
    if case.mistake:
        from tests.fuzz.mistakes import check_mistake

        check_mistake(case)
        return "error"
    with use_threads(case.threads):
        return Checked(case).run()


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor with these values (or, "expanded" and "zero", with others) that lies in memory in another way."""
    if layout == "strided":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        return torch.empty(values.numel() + 3, dtype=values.dtype)[3:].view(values.shape).copy_(values)
    if layout == "expanded" and values.shape[0]:
        return values[:1].expand(values.shape)
    if layout == "negated":
        return torch._neg_view(-values)
    if layout == "zero":
        return torch._efficientzerotensor(values.shape, dtype=values.dtype)
    return values


class Arguments:
    """Of a case, in float64: drawn once, laid out and cast for each run."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(case.seed)
        dtype = DTYPES[case.dtype]
        width, states = case.hidden, case.layers * case.directions
        self.lengths = self.resets = None
        if case.kind == "recurrence":
            shape: tuple[int, ...] = (case.steps, case.batch, case.heads, case.hidden // case.heads)
            state: tuple[int, ...] = (case.batch, *shape[2:])
        elif case.kind == "cell":
            shape = (case.inputs,) if case.unbatched else (case.batch, case.inputs)
            state = (width,) if case.unbatched else (case.batch, width)
        else:
            shape = (case.steps, case.batch, case.inputs)
            state = (states, case.batch, width)
            if case.unbatched:
                shape, state = (case.steps, case.inputs), (states, width)
            elif case.batch_first and case.rows in ("full", "lengths"):
                shape = (case.batch, case.steps, case.inputs)
        if case.rows != "full":
            low = 0 if case.rows == "lengths" else 1
            self.lengths = torch.randint(low, case.steps + 1, (case.batch,), generator=self.random)
            if case.rows != "lengths":
                self.lengths[0] = case.steps
            if case.rows == "packed":
                self.lengths = self.lengths.sort(descending=True)[0]
        self.x, self.h = self.normal(*shape, dtype=dtype), self.normal(*state, dtype=dtype)
        if case.input_layout in ("expanded", "zero"):
            self.x = laid_out(self.x, case.input_layout).clone()
        if case.state_layout in ("expanded", "zero"):
            self.h = laid_out(self.h, case.state_layout).clone()
        if case.resets:
            rows: tuple[int, ...] = shape[:1] if case.unbatched else shape[:2]
            if case.rows in ("packed", "shuffled"):
                rows = (int(self.lengths.sum()),)
            self.resets = torch.rand(rows, generator=self.random) < 0.3

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(dtype)


class Smallest:
    """An activation of the reference, noting how near to 0 an argument came: there rounding decides whether a unit
    stops."""

    def __init__(self, activation: str) -> None:
        self.value, self.activation = math.inf, reference.ACTIVATIONS[activation]

    def __call__(self, a: Tensor) -> Tensor:
        if a.numel():
            self.value = min(self.value, a.detach().abs().min().item())
        return self.activation(a)


class Checked:
    def __init__(self, case: Case) -> None:
        self.case, self.arguments = case, Arguments(case)
        self.dtype = DTYPES[case.dtype]
        self.module = self.make_module()

    def make_module(self) -> Any:
        case, draw = self.case, self.arguments.normal
        options = {"skip": case.skip, "nonlinearity": case.activation, "bias": case.bias, "backend": case.backend}
        if case.kind == "cell":
            module: Any = RINCell(case.inputs, case.hidden, **options)
        elif case.kind == "layers" and case.form:
            # Factors are overwritten below.
            kind = {"alpha": torch.full((case.hidden,), 0.5), "train_alpha": True, "form": "rate"}
            if case.form == "current":
                kind = {} if case.seed % 2 else {**kind, "form": "current"}
            del options["skip"]
            module = (LeakyRNN if kind else PLRNN)(
                case.inputs, case.hidden, case.layers, batch_first=case.batch_first, num_heads=case.heads,
                bidirectional=case.directions == 2, **options, **kind,
            )  # fmt: skip
        elif case.transitions > 1:
            module = DeepTransitionRIN(
                case.inputs, case.hidden, case.layers, batch_first=case.batch_first,
                bidirectional=case.directions == 2, transitions=case.transitions, **options,
            )  # fmt: skip
        elif case.kind == "layers":
            module = RIN(
                case.inputs, case.hidden, case.layers, batch_first=case.batch_first, num_heads=case.heads,
                bidirectional=case.directions == 2, **options,
            )  # fmt: skip
        else:
            module = nn.Module()
            side = case.hidden // case.heads
            module.weight_hh = nn.Parameter(torch.empty(case.heads, side, side))
            if case.form:
                module.skip = nn.Parameter(torch.empty(case.heads, side))
            if case.form == "outside":
                module.gain = nn.Parameter(torch.empty(case.heads, side))
        module = module.to(self.dtype)
        growth = max(1.0, case.steps / 4)
        for name, parameter in module.named_parameters():
            recurrent = "weight_hh" in name or "weight_deep" in name
            scale = 0.5 / math.sqrt(parameter.shape[-1]) / (growth if recurrent else 1.0)
            values = draw(*parameter.shape, dtype=torch.float64) * (scale if "weight" in name else 0.3)
            parameter.data = laid_out(values.to(self.dtype), case.weight_layout)
        return module

    def call(self, module: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
        """Outputs as tensors, and one call's worth of everything between arguments and outputs."""
        case, given = self.case, self.arguments
        if case.kind == "cell":
            return (module(x, h),)
        if case.kind == "recurrence":
            options: dict[str, Any] = {"skip": case.skip, "activation": case.activation, "resets": given.resets}
            options["reverse"] = [g >= case.heads // 2 for g in range(case.heads)] if case.directions == 2 else False
            if case.form:
                options |= {"form": case.form, "skip": module.skip}
            if case.form == "outside":
                options["gain"] = module.gain
            options["backend"] = "reference" if getattr(module, "backend", "") == "reference" else case.backend
            if case.rows == "packed":
                steps = torch.arange(case.steps)
                sizes = (given.lengths > steps[:, None]).sum(1)
                x = torch.cat([x[t, :n] for t, n in enumerate(sizes.tolist())])
                return recurrence(x, module.weight_hh, h, batch_sizes=sizes, **options)
            return recurrence(x, module.weight_hh, h, lengths=given.lengths, **options)
        options = {} if given.resets is None else {"resets": given.resets}
        if case.rows in ("packed", "shuffled"):
            packed = rnn_utils.pack_padded_sequence(x, given.lengths, enforce_sorted=case.rows == "packed")
            out, h_n = module(packed, h, **options)
            return out.data, h_n
        if given.lengths is not None:
            options["lengths"] = given.lengths
        return module(x, h, **options)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Of the call that is checked; its gradients are taken outside."""
        case = self.case
        with contextlib.ExitStack() as stack:
            if case.context == "no_grad":
                stack.enter_context(torch.no_grad())
            elif case.context == "inference":
                stack.enter_context(torch.inference_mode())
            elif case.context == "default_device":
                stack.enter_context(torch.device("cpu"))
            elif case.context == "autocast":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            elif case.context == "hooks":
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_pack, lambda packed: packed))
            yield

    def leaves(self, module: Any, dtype: torch.dtype, layouts: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Input, state and what gradients are wanted of; the laid out tensors are views of the leaves."""
        case, given = self.case, self.arguments
        x, h = given.x.to(dtype, copy=True), given.h.to(dtype, copy=True) if case.state else None
        trained = case.trained
        wanted = []
        if trained in ("all", "input", "one"):
            wanted = [t.requires_grad_() for t in ([x] if trained == "one" or h is None else [x, h])]
        for parameter in module.parameters():
            parameter.requires_grad_(trained in ("all", "weights"))
        if trained in ("all", "weights"):
            wanted += list(module.parameters())
        if layouts:
            x, h = _laid_out(x, case.input_layout), _laid_out(h, case.state_layout)
        return x, h, wanted

    def run(self) -> str:
        case = self.case
        plain_module, exact_module = copy.deepcopy(self.module), copy.deepcopy(self.module).double()
        plain_module.backend = exact_module.backend = "reference"
        with_gradients = case.context not in ("no_grad", "inference")
        if case.span:
            self.module.checkpoint_steps = case.span

        x, h, wanted = self.leaves(self.module, self.dtype, layouts=True)
        with self.context():
            out = self.call(self.module, x, h)
        got = self.with_gradients(out, wanted) if with_gradients else list(out)

        x, h, wanted = self.leaves(plain_module, self.dtype, layouts=False)
        autocast = torch.autocast("cpu", torch.bfloat16) if case.context == "autocast" else contextlib.nullcontext()
        with autocast:
            out = self.call(plain_module, x, h)
        plain = self.with_gradients(out, wanted) if with_gradients else list(out)

        x, h, wanted = self.leaves(exact_module, torch.float64, layouts=False)
        smallest, has_kink = Smallest(case.activation), case.activation in ("relu", "leaky_relu")
        activations, reference.ACTIVATIONS = reference.ACTIVATIONS, {**reference.ACTIVATIONS, case.activation: smallest}
        try:
            out = self.call(exact_module, x, h)
        finally:
            reference.ACTIVATIONS = activations
        exact = self.with_gradients(out, wanted) if with_gradients else list(out)

        outputs = len(out)
        terms = 4 * (case.hidden + case.inputs + case.steps * max(1, case.batch)) * case.layers**2
        if self.dtype == torch.float64:  # plain PyTorch is what is called exact then; errors grow as the state may
            terms *= (16 if case.context == "second" else 1) * max(1.0, abs(case.skip) + 0.5) ** (2 * case.steps)
        computed_in = torch.bfloat16 if case.context == "autocast" else self.dtype
        # Values grow by skip in every step, and with them the error of what enters the next product.
        scale = max([1.0, *(float(t.detach().abs().max()) for t in exact if t.numel())])
        if scale > torch.finfo(self.dtype).max / 64:
            return "overflow"
        near = 64 * torch.finfo(computed_in).eps * scale * math.sqrt(terms)
        spread: list[float] = []
        compared = len(got) if not has_kink or smallest.value > near else outputs
        for i in range(compared):
            what = f"output {i}" if i < outputs else f"gradient {i - outputs}"
            three = got[i].detach(), plain[i].detach(), exact[i].detach()
            factor = 2 if i < outputs else 3
            try:
                assert_within(what, *three, factor, terms, computed_in)
            except AssertionError:
                # Where the state grows in every step, so does an error, and whose comes first is chance.
                if abs(case.skip) <= 1:
                    raise
                spread = spread or self.spread(exact_module, exact, torch.finfo(computed_in).eps)
                if (three[0].double() - exact[i].detach()).abs().max() > factor * spread[i]:
                    raise
        if case.skip == 0 and not case.form and case.kind != "recurrence":
            self.compare_with_torch(out=[t.detach() for t in got[:outputs]], exact=exact, terms=terms)
        return "gradient" if compared > outputs else "value"

    def spread(self, module: Any, exact: list[Tensor], eps: float) -> list[float]:
        """How far each of `exact` moves when all arguments and weights move by their last place."""
        largest = [0.0] * len(exact)
        draw = torch.Generator().manual_seed(self.case.seed + 2)
        for _ in range(4):
            moved = copy.deepcopy(module)
            x, h, wanted = self.leaves(moved, torch.float64, layouts=False)
            with torch.no_grad():
                for t in [x, *([] if h is None else [h]), *moved.parameters()]:
                    t *= 1 + eps * torch.randn(t.shape, generator=draw, dtype=torch.float64)
            out = self.call(moved, x, h)
            results = self.with_gradients(out, wanted) if len(exact) > len(out) else out
            for i, (values, right) in enumerate(zip(results, exact, strict=True)):
                if right.numel():
                    largest[i] = max(largest[i], (values - right).detach().abs().max().item())
        return largest

    def with_gradients(self, outputs: tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor]:
        """The outputs, and the gradients of what is wanted from a random combination of them; "second": of those."""
        results = list(outputs)
        if not wanted or not any(t.requires_grad for t in outputs):
            return results
        draw = torch.Generator().manual_seed(self.case.seed + 1)
        weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.dtype) for t in outputs]
        used = [(t, w) for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
        second = self.case.context == "second"
        grads = torch.autograd.grad([t for t, _ in used], wanted, [w for _, w in used], create_graph=second)
        results += grads
        if second:
            total = sum(g.square().sum() for g in grads)
            again = [None] * len(wanted)
            if total.requires_grad:
                again = torch.autograd.grad(total, wanted, allow_unused=True)
            results += [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, again, strict=True)]
        return results

    def compare_with_torch(self, out: list[Tensor], exact: list[Tensor], terms: int) -> None:
        """torch.nn's own module, where it has the arguments."""
        case = self.case
        if (
            case.heads > 1
            or case.transitions > 1
            or case.resets
            or case.rows == "lengths"
            or case.context == "autocast"
        ):
            return
        theirs = self.module.to_rnn()
        x, h, _ = self.leaves(theirs, self.dtype, layouts=False)
        with torch.no_grad():
            for i, (got, want) in enumerate(zip(out, self.call(theirs, x, h), strict=True)):
                assert got.dtype == want.dtype
                assert_within(f"torch's output {i}", got, want, exact[i].detach(), 2, terms)


def _pack(tensor: Tensor) -> Tensor:
    """What comes back has other strides. Another dtype, which torch's own operators would refuse, has a test apart."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor.clone()


def _laid_out(tensor: Tensor | None, layout: str) -> Any:
    """As `laid_out`; a leaf cannot be a view, so one that is trained is laid out by operators."""
    if tensor is None or not tensor.requires_grad:
        return tensor if tensor is None else laid_out(tensor, layout)
    if layout == "strided":
        return tensor.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    return torch._neg_view(-tensor) if layout == "negated" else tensor
