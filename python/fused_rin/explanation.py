"""Which kernel runs a call, and why: asked of the very functions that the call asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_rin import backends, cpu, step, watchers, wavefront
from fused_rin.deep import DeepTransitionRIN
from fused_rin.leaky import PLRNN, LeakyRNN, _UnitRNN
from fused_rin.modules import RIN, RINCell
from fused_rin.problem import ALL_ROWS, Rows
from fused_rin.recurrent import Recurrent
from fused_rin.watchers import OPERATOR, REFERENCE


@dataclass(frozen=True)
class Choice:
    """What `explain` returns.

    backend: who computes. kernel: what of it, "step" (weights read as they lie), "layer" (a whole layer in one call),
    "sweep" (the recurrence alone), "torch" (its operators).
    plan: the kernel's plan in words. reason: why this backend. way: who sees the call on its way, in words.
    passed_over: why not the backends that are preferred.
    """

    backend: str
    plan: str
    reason: str
    passed_over: dict[str, str] = field(default_factory=dict)
    kernel: str = "sweep"
    way: str = ""

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.plan}", f"  because {self.reason}"]
        if self.way:
            lines.append(f"  {self.way}")
        lines += [f"  not {name}: {why}" for name, why in self.passed_over.items()]
        return "\n".join(lines)


@dataclass
class _Call:
    """A call as the kernels' rules see it."""

    steps: int
    batch: int
    groups: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    backend: str
    input_size: int = 0  # 0: the bare recurrence
    cell: bool = False
    training: bool = False  # something needs a gradient
    short: bool = True  # its sizes apart, a call that `step` takes
    batch_first: bool = False
    rows: Rows = ALL_ROWS
    activation: str = "relu"
    form: str | None = None  # of units with factors of their own
    transitions: int = 1
    layers: int = 1
    wave: wavefront.Wave | None = None  # where all layers run side by side
    span_steps: int | None = None  # of the last layer, where its states are not all kept (checkpoint.py)


def _grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _of_module(module: Recurrent | RINCell, input: Any, hx: Tensor | None, lengths: Any, resets: Any) -> _Call:
    if input is None:
        raise TypeError("explain of a module needs the input of the call: a tensor, a PackedSequence or a shape")
    weights = list(module.parameters())
    data, rows = input, ALL_ROWS
    if isinstance(input, torch.nn.utils.rnn.PackedSequence):
        data = input.data
        rows = Rows(input.batch_sizes, input.batch_sizes, resets)  # whose values no rule looks at
        steps, batch = input.batch_sizes.shape[0], int(input.batch_sizes[0])
        shape = tuple(data.shape)
    else:
        shape = tuple(input.shape if isinstance(input, Tensor) else input)
    tensors = [t for t in (data, hx) if isinstance(t, Tensor)]
    common: dict[str, Any] = {
        "dtype": data.dtype if isinstance(data, Tensor) else weights[0].dtype,
        "device": data.device if isinstance(data, Tensor) else weights[0].device,
        "backend": module.backend,
        "training": _grad(*tensors, *weights),
        "input_size": module.input_size,
        "activation": module.nonlinearity,
        "form": module._engine_form if isinstance(module, _UnitRNN) else None,
    }
    if isinstance(module, RINCell):
        if len(shape) not in (1, 2):
            raise ValueError(f"input must be (B, input_size) or (input_size,), got {shape}")
        return _Call(1, shape[0] if len(shape) == 2 else 1, 1, module.hidden_size, cell=True, **common)
    if rows is ALL_ROWS:
        if len(shape) not in (2, 3):
            raise ValueError(f"input must be (T, B, input_size) or (T, input_size), got {shape}")
        steps, batch = (shape[0], 1) if len(shape) == 2 else shape[:2]
        if module.batch_first and len(shape) == 3:
            steps, batch = batch, steps
        given = [None if t is None else torch.empty(0, device="cpu") for t in (lengths, resets)]
        rows = ALL_ROWS if given == [None, None] else Rows(given[0], None, given[1])
    if isinstance(module, DeepTransitionRIN):
        return _of_transitions(_Call(
            steps, batch, 1, module.hidden_size, short=False, batch_first=module.batch_first, rows=rows,
            transitions=module.transitions, **common,
        ))  # fmt: skip
    if isinstance(module, RIN) and watchers.observer(product=True) is None:
        common["layers"] = module.num_layers
        size = steps, batch, common["dtype"], common["device"]
        common["wave"] = wavefront.plan_of(module, module.nonlinearity, rows, *size)
    return _Call(
        steps, batch, module.num_heads * (2 if module.bidirectional else 1), module.hidden_size // module.num_heads,
        short=rows is ALL_ROWS
        and not (isinstance(module, _UnitRNN) or module.bidirectional or (module.dropout and module.training)),
        batch_first=module.batch_first, rows=rows, span_steps=module._span_steps(
            steps, data.shape[0] if rows.offsets is not None else steps * batch, common["dtype"],
            module.return_sequences,
        ), **common,
    )  # fmt: skip


def _of_transitions(call: _Call) -> _Call:
    """As deep.py has it: one layer of K transitions, or one recurrence over a state K times as large."""
    name, seen = backends.requested(call.backend), watchers.observer(product=True)
    if seen is None and name in ("auto", "cpu") and cpu.unavailable_reason(call.device, call.dtype) is None:
        return call
    deep, wide = call.transitions, torch.promote_types(call.dtype, torch.float32)
    return replace(
        call, steps=deep * call.steps, hidden=deep * call.hidden, dtype=wide, input_size=0, rows=ALL_ROWS, transitions=1
    )


def _kernel(call: _Call, name: str, chosen: backends.Backend) -> str:
    """By the rules of modules.py: a short call, then a cell's own, a layer's, the recurrence's."""
    if chosen.name == "reference":
        return "torch"
    if not call.input_size or chosen is not cpu:
        return "sweep"
    unobserved = watchers.observer(product=True) is None
    is_short = call.short and step.is_short(call.steps, call.batch, call.dtype, call.batch_first)
    if unobserved and not call.training and is_short:
        return "step"
    if call.cell:
        return "torch" if step.suits_products(call.dtype, call.device, call.backend) else "sweep"
    if (
        call.form is None
        and call.transitions == 1
        and step.layers_suit_products(
            call.steps, call.rows, call.groups, call.hidden, call.dtype, call.device, call.backend
        )
    ):
        return "torch"
    return "layer" if unobserved else "sweep"


def explain(
    problem: RIN | RINCell | DeepTransitionRIN | LeakyRNN | PLRNN | Tensor | Sequence[int],
    input: Any = None,
    hx: Tensor | None = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    input_size: int = 0,
    activation: str = "relu",
    form: str | None = None,
) -> Choice:
    """Which backend and kernel run a call made here and now, and why.

    Here and now: under autocast, a transform, `no_grad` or a compiler it says what happens there.

    Args:
        problem: a RIN, RINCell, DeepTransitionRIN, LeakyRNN or PLRNN; or `pre` of `recurrence`, or its shape
            (T, B, G, D), or (T, B, D) for one recurrence.
        input, hx, lengths, resets: of the module's call; a shape may stand for the input.
        dtype, device: of the problem where only its shape is given.
        backend: as in `recurrence`; a module has its own.
        input_size: of a layer, where only its shape is given, without gradients; 0 for the bare recurrence.
        activation, form: of a recurrence; form None where `skip` is one number inside, as a RIN's.

    Raises ValueError for a shape of another rank or a negative input_size, TypeError for a module without input, and
    BackendError if the backend named cannot run the problem.
    """
    if isinstance(problem, (Recurrent, RINCell)):
        call = _of_module(problem, input, hx, lengths, resets)
    else:
        training = False
        if isinstance(problem, Tensor):
            dtype, device, training = problem.dtype, problem.device, _grad(problem)
            problem = tuple(problem.shape)
        if len(problem) not in (3, 4):
            raise ValueError(f"problem must be (T, B, G, D) or (T, B, D), got {tuple(problem)}")
        if input_size < 0:
            raise ValueError(f"input_size must not be negative, got {input_size}")
        steps, batch, *groups, hidden = problem
        call = _Call(
            steps, batch, groups[0] if groups else 1, hidden, dtype, torch.device(device), backend, input_size,
            training=training, activation=activation, form=form,
        )  # fmt: skip
    name = backends.requested(call.backend)
    chosen, passed_over = backends.select(
        name, call.device, call.dtype, call.hidden, call.batch, call.activation, call.form
    )
    if name != "auto":
        reason = "it was asked for by name"
    elif passed_over:
        reason = "the backends before it cannot run this problem"
    else:
        reason = f"it is the first choice for {call.device.type} tensors"
    seen = watchers.observer(product=bool(call.input_size))
    if seen is not None and seen[0] is REFERENCE:
        return Choice(
            "reference", _loop(call), f"{seen[1]}, and only the reference has those derivatives", passed_over, "torch",
        )  # fmt: skip
    kernel = _kernel(call, name, chosen)
    way = ""
    if seen is not None and seen[0] is OPERATOR:
        way = f"as operators of torch, since {seen[1]}"
    plan = _plan(call, chosen, kernel)
    if call.transitions > 1:
        plan += f"; {call.transitions} transitions a step"
    if call.span_steps is not None and kernel in ("layer", "sweep"):
        again = ", computed again for backward" if torch.is_grad_enabled() else ""
        plan += f"; in spans of some {call.span_steps} steps{again}"
    if call.wave is not None:
        plan += (
            f"; {call.layers} layers side by side, each a span of {call.wave.steps} steps behind the one below it: "
            f"{call.wave.gain:.1f} times as fast as in turn by the model (not a measurement)"
        )
    return Choice(chosen.name, plan, reason, passed_over, kernel, way)


def _loop(call: _Call) -> str:
    return f"a loop of PyTorch operations over {call.steps} steps"


def _plan(call: _Call, chosen: backends.Backend, kernel: str) -> str:
    size = (call.steps, call.batch, call.groups, call.hidden, call.dtype, call.device)
    if kernel == "step":
        best = cpu.instruction_sets()[0]
        return (
            f"{cpu._isa or best}, {call.steps} step(s) from W and U as they lie, each output a dot product of its row"
        )
    if kernel == "torch":
        if chosen is cpu:
            return "one step by torch's matrix products: there is no loop to fuse, and packing U would cost more"
        return _loop(call)
    if kernel == "layer":
        return cpu.describe(*size, call.input_size)
    if chosen.name == "cuda":
        from fused_rin import cuda  # not before a GPU is asked about

        return cuda.describe(*size, units=cuda.has_factors(call.activation, call.form))
    return chosen.describe(*size)
