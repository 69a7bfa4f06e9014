"""DeepTransitionRIN: several transitions in each step, with a matrix each, in one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fused_rin import backends, checkpoint, cpu_layers, layer, ops, watchers
from fused_rin.functional import recurrence
from fused_rin.problem import ALL_ROWS, Rows, Rule, Weights
from fused_rin.recurrent import Recurrent
from fused_rin.skip import SkipModule, check_backend, check_nonlinearity, check_skip
from fused_rin.watchers import DIRECT

_Rest = tuple[Rows, Rule, bool]


class _Deep(torch.autograd.Function):
    """A layer of one recurrence as one native call each way; the states of all transitions are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ih: Tensor,
        u: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        b_deep: Tensor | None,
        h0: Tensor | None,
        rest: _Rest,
    ) -> tuple[Tensor, Tensor]:
        out, h_n, inner = cpu_layers.deep_forward(x, w_ih, u, b_ih, b_hh, b_deep, h0, *rest, keep=True)
        rows, *ctx.constants = rest
        ops.keep(ctx, (x, w_ih, u, b_ih, b_hh, b_deep, h0, out, inner, *rows))
        return out, h_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if watchers.may_be_passed_by(*grads):
            with watchers.without_function_modes():
                return _backward(ctx, *grads)
        return _backward(ctx, *grads)


def _backward(ctx: Any, grad_out: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_h_n is None:
        return (None,) * 8
    *tensors, out, inner, lengths, offsets, resets = cast(list[Any], ops.restored(ctx))
    rule, batch_first = ctx.constants
    rows = Rows(*[None if t is None else t.contiguous() for t in (lengths, offsets, resets)])
    if watchers.way_back(grad_out, grad_h_n) is not DIRECT:
        run = partial(_by_recurrence, rows=rows, rule=rule, batch_first=batch_first, backend="auto")
        return *checkpoint.gradients_of(run, tensors, (grad_out, grad_h_n), ctx.needs_input_grad[:7]), None
    if batch_first:
        out, grad_out = out.transpose(0, 1), None if grad_out is None else grad_out.transpose(0, 1)
    x, w_ih, u, _, _, _, h0 = tensors
    plain = [None if t is None else t.contiguous() for t in (grad_out, grad_h_n, x, w_ih, u, h0, out, inner)]
    return *cpu_layers.deep_backward(*plain, rows, rule, ctx.needs_input_grad), None  # type: ignore[arg-type, call-arg]


def _by_recurrence(
    x: Tensor,
    w_ih: Tensor,
    u: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    b_deep: Tensor | None,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    batch_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """On any backend: one recurrence of K * T steps over a state of K blocks, of which each step writes one.

    Block k comes from block k - 1 by U_k + skip * I, which stands in the matrix as it is, so 16 bits are widened. The
    other blocks of a step are zero, as all that enters them is: K^2 times the arithmetic.
    """
    deep, hidden = u.shape[:2]
    lengths, offsets, resets = rows
    is_there = None
    if offsets is not None:
        assert lengths is not None
        batch = torch.arange(lengths.shape[0], device=x.device)
        is_there = torch.arange(offsets.shape[0], device=x.device)[:, None] < lengths
        index = torch.where(is_there, offsets[:, None] + batch, 0)
        x, resets = x[index], None if resets is None else resets[index] & is_there
    pre = F.linear(x, w_ih, layer.bias(b_ih, b_hh))
    dtype, wide = pre.dtype, torch.promote_types(pre.dtype, torch.float32)
    pre = pre.to(wide)
    parts = [pre]
    for k in range(deep - 1):
        parts.append((pre.new_zeros(hidden) if b_deep is None else b_deep[k].to(wide)).expand_as(pre))
    # A reversed recurrence goes through the places of a step from the last one, and starts there.
    places = list(range(deep))[:: -1 if rule.num_reversed else 1]  # of the transitions, and the other way round
    step = torch.stack([F.pad(parts[k], (k * hidden, (deep - 1 - k) * hidden)) for k in places], 1)  # [T, K, B, K * D]
    identity = rule.skip * torch.eye(hidden, dtype=wide, device=u.device)
    blocks = [[torch.zeros_like(identity)] * deep for _ in range(deep)]
    for k in range(deep):
        blocks[k][k - 1] = u[k].to(wide) + identity
    weight = torch.cat([torch.cat(row, 1) for row in blocks])
    if h0 is not None:
        h0 = F.pad(h0.to(wide), ((deep - 1) * hidden, 0))
    if resets is not None:
        resets = torch.stack([resets] + [torch.zeros_like(resets)] * (deep - 1), 1).flatten(0, 1)
    out, h_n = recurrence(
        step.flatten(0, 1)[:, :, None], weight[None], h0, skip=0.0, activation=rule.activation,
        lengths=None if lengths is None else lengths * deep, resets=resets, reverse=rule.num_reversed > 0,
        backend=backend,
    )  # fmt: skip
    out = out.view(step.shape)[:, places[-1], :, (deep - 1) * hidden :].to(dtype)
    if is_there is not None:
        out = out[is_there]
    return (out.transpose(0, 1) if batch_first else out).clone(), h_n[:, 0, -hidden:].to(dtype)[None]


def forward(
    x: Tensor,
    weights: Weights,
    w_deep: Tensor | None,
    b_deep: Tensor | None,
    h0: Tensor | None,
    rows: Rows,
    rule: Rule,
    backend: str,
    batch_first: bool,
    u_name: str,
) -> tuple[Tensor, Tensor]:
    """A layer of one recurrence on checked arguments; w_deep [K - 1, D, D], None for K = 1; rest as `layer.forward`."""
    layer.check_weights(weights, x.shape[-1], 1, x.device, u_name)
    suffix, hidden = u_name.removeprefix("weight_hh"), weights.w_hh.shape[0]
    for kind, t, shape in (("weight", w_deep, (hidden, hidden)), ("bias", b_deep, (hidden,))):
        if t is not None and t.shape[1:] != shape:
            sizes = ", ".join(map(str, shape))
            raise RuntimeError(f"{kind}_deep{suffix} must have shape (K - 1, {sizes}), got {tuple(t.shape)}")
    w_ih, w_hh, b_ih, b_hh = weights
    u = w_hh[None] if w_deep is None else torch.cat([w_hh[None], w_deep])
    tensors = (x, w_ih, u, b_ih, b_hh, b_deep, h0)
    name = backends.requested(backend)
    if layer.is_fused(x, weights, h0, rows, 1, name) and all(
        t is None or watchers.is_plain(t, x.dtype, t.shape) for t in (u, b_deep)
    ):
        tensors = tuple(None if t is None else t.contiguous() for t in tensors)  # type: ignore[assignment]
        rows = rows if rows is ALL_ROWS else Rows(*[None if t is None else t.contiguous() for t in rows])
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return cast("tuple[Tensor, Tensor]", _Deep.apply(*tensors, (rows, rule, batch_first)))
        return cpu_layers.deep_forward(*tensors, rows, rule, batch_first, keep=False)[:2]
    return _by_recurrence(*tensors, rows, rule, batch_first, name)


class DeepTransitionRIN(SkipModule, Recurrent):
    """A RIN with several transitions in each step (RIN-DT of arXiv 1801.06105, after arXiv 1312.6026).

        h^1 = act(W x_t + b_ih + U_1 h_{t-1} + b_hh + skip * h_{t-1}),
        h^k = act(U_k h^{k-1} + b_k + skip * h^{k-1}) for k = 2, ..., K,    h_t = h^K

    (the paper gives no equations; these are inferred from its text). `weight_hh_l{k}` holds U_1, `weight_deep_l{k}`
    (K - 1, hidden_size, hidden_size) the others, `bias_deep_l{k}` (K - 1, hidden_size) their biases.

    On a CPU a step costs K of a RIN's, without a second input product. Elsewhere, and where somebody watches (autocast,
    a compiler, transforms), it is one recurrence over a state K times as large: K^2 times the arithmetic.

    Args:
        transitions: K, 2 by default; 1 is a RIN.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.RNN.
        nonlinearity, skip, backend, return_sequences: as `RIN`.

    Raises ValueError for transitions below 1, TypeError for what is no int.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transitions: int = 2,
        skip: float = 1.0,
        backend: str = "auto",
        return_sequences: bool = True,
    ) -> None:
        check_nonlinearity(nonlinearity)
        check_backend(backend)
        if isinstance(transitions, bool) or not isinstance(transitions, int):
            raise TypeError(f"transitions should be of type int, got: {type(transitions).__name__}")
        if transitions < 1:
            raise ValueError(f"transitions must be at least 1, got {transitions}")
        # Before the base class, whose constructor initialises the weights.
        self.nonlinearity, self.skip_factor, self.backend = nonlinearity, check_skip(skip), backend
        self.transitions = transitions
        self._make(
            nonlinearity, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            1, None, return_sequences,
        )  # fmt: skip
        for names in self._all_weights:
            like: Tensor = getattr(self, names[1])
            suffix = names[1].removeprefix("weight_hh")
            for name, shape in (("weight", (hidden_size, hidden_size)), ("bias", (hidden_size,))):
                values = None
                if transitions > 1 and (bias or name == "weight"):
                    values = torch.nn.Parameter(like.new_empty(transitions - 1, *shape))
                self.register_parameter(f"{name}_deep{suffix}", values)
        self.reset_parameters()

    _first_recurrent_weight = "weight_hh_l0"

    @property
    def checkpoint_steps(self) -> int | str | None:
        """None: every state is kept."""
        return None

    @checkpoint_steps.setter
    def checkpoint_steps(self, steps: int | str | None) -> None:
        if steps is not None:
            raise ValueError(f"DeepTransitionRIN keeps every state, got checkpoint_steps={steps!r}")

    def identity_weights(self) -> list[Tensor]:
        """What an identity prior pulls to zero: all of U, that is, V to skip * I."""
        names = [name for name in dict(self.named_parameters()) if name.startswith(("weight_hh", "weight_deep"))]
        return [getattr(self, name) for name in names] if self.skip_factor else []

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, transitions={self.transitions}"
        if self.nonlinearity != "relu":
            text += f", nonlinearity={self.nonlinearity}"
        if self.skip_factor != 1.0:
            text += f", skip={self.skip_factor:g}"
        if self.backend != "auto":
            text += f", backend={self.backend}"
        return text

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence | None, Tensor]:
        """Run all steps of all layers; arguments and results as `RIN.forward`."""
        if not torch.compiler.is_compiling():
            leaf = None if isinstance(input, (Tensor, PackedSequence)) else watchers.fx_leaf(self, input, hx)
            if leaf is not None:
                return leaf
        return self._forward(input, hx, lengths, resets)

    def _run_layer(
        self, number: int, x: Tensor, h0: Tensor | None, batch: int, rows: Rows, batch_first: bool
    ) -> tuple[Tensor | None, Tensor]:
        weights, outs, states = self._layer_weights(number), [], []
        directions = 2 if self.bidirectional else 1
        for direction in range(directions):
            u_name = self._all_weights[number * directions + direction][1]
            suffix, mine = u_name.removeprefix("weight_hh"), slice(direction * self.hidden_size, None)
            own = Weights(*[None if w is None else w[mine][: self.hidden_size] for w in weights])  # type: ignore[arg-type]
            out, h_n = forward(
                x, own, getattr(self, f"weight_deep{suffix}"), getattr(self, f"bias_deep{suffix}"),
                None if h0 is None else h0[direction][:, None], rows,
                Rule(self.skip_factor, self.nonlinearity, direction), self.backend, batch_first, u_name,
            )  # fmt: skip
            outs.append(out)
            states.append(h_n)
        return (outs[0], states[0]) if directions == 1 else (torch.cat(outs, -1), torch.cat(states))
