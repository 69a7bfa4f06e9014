"""Looking into a recurrent network: does the gradient reach the first steps, what does the state do, which units live?

Every function returns numbers and takes a user's own model: any module with a torch.nn.RNNBase in it (RIN,
RNN, LSTM, GRU) or another recurrent module that is named. `draw_*` makes a matplotlib figure of the numbers
of several models.

    norms = gradient_norms(model, (x,), lambda output: loss(output, target))
    draw_gradient_norms({"mine": norms}).savefig("gradients.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_rin.identity_prior import recurrent_matrices
from fused_rin.modules import RINCell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EstimationError(NamedTuple):
    """Means over batch and units, [T]: E[h_t - h_T], and E[h_t - h_{t-1}] with h_0 = 0 before the first step."""

    to_last: Tensor
    to_previous: Tensor


class Activity(NamedTuple):
    """How many units are at work."""

    dead: float  # share of units that are 0 in every sample and step
    active: Tensor  # [T], share of units and samples that are not 0


def gradient_norms(
    model: nn.Module,
    inputs: Sequence[Tensor],
    loss: Callable[[Any], Tensor],
    rnn: nn.Module | None = None,
) -> Tensor:
    """||dL / dx_t|| for every step t of what the recurrent module reads, [T]: Frobenius norm over the batch.

    The gradient with respect to an input goes through the state of its step, and is there for gated
    networks as well; where it falls with the distance from the end, the network cannot learn from what it
    read long ago.

    Args:
        model: called as `model(*inputs)`, in the mode (train or eval) it is in; its parameters are left alone.
        loss: makes a 0-dim loss of what the model returns.
        rnn: the recurrent module to look at, by default the first in `model`.

    Raises ValueError when there is no recurrent module, when it is a cell or is not called, and when it reads
    a packed sequence.
    """
    with torch.enable_grad():
        with _watch(model, rnn) as seen:
            value = loss(model(*inputs))
        (gradient,) = torch.autograd.grad(value, [seen["input"]])
    return _time_first(gradient, seen).flatten(1).norm(dim=1)


@torch.no_grad()
def estimation_error(model: nn.Module, inputs: Sequence[Tensor], rnn: nn.Module | None = None) -> EstimationError:
    """The estimation error of arXiv 1801.06105, section 2, near 0 for networks that refine a representation.

    Of the outputs of the last layer. Arguments and errors as in `gradient_norms`.
    """
    states = _states(model, inputs, rnn)
    means = states.flatten(1).mean(1)
    previous = torch.cat([means.new_zeros(1), means[:-1]])
    return EstimationError(means - means[-1], means - previous)


@torch.no_grad()
def activity(model: nn.Module, inputs: Sequence[Tensor], rnn: nn.Module | None = None) -> Activity:
    """The share of dead ReLUs, and of active units at every step. Arguments and errors as in `gradient_norms`."""
    states = _states(model, inputs, rnn) != 0
    dead = ~states.flatten(0, -2).any(0)
    return Activity(dead.float().mean().item(), states.flatten(1).float().mean(1))


@torch.no_grad()
def eigenvalues(model: nn.Module) -> dict[str, Tensor]:
    """The eigenvalues of V (of I + U for a RIN) of every plain recurrent matrix, complex [D], by parameter name.

    Raises ValueError when the model has none (an LSTM or a GRU).
    """
    return {name: torch.linalg.eigvals(matrix.double()).flatten() for name, matrix in recurrent_matrices(model)}


def draw_gradient_norms(norms: Mapping[str, Tensor]) -> Figure:
    """Gradient norm against the time step, a line a model."""
    return _draw_lines(norms, "norm of the gradient at the input of step t", log=True)


def draw_estimation_error(errors: Mapping[str, EstimationError]) -> Figure:
    """E[h_t - h_T], solid, and E[h_t - h_{t-1}], dashed, against the time step."""
    figure = _draw_lines({f"{name}: to the last": error.to_last for name, error in errors.items()}, "estimation error")
    for index, (name, error) in enumerate(errors.items()):
        label = f"{name}: to the previous"
        figure.axes[0].plot(error.to_previous.cpu(), color=f"C{index}", linestyle="--", label=label)
    figure.axes[0].legend(fontsize="small")
    return figure


def draw_activity(activities: Mapping[str, Activity]) -> Figure:
    """Share of active units against the time step; the share of dead units is in the legend."""
    named = {f"{name} ({value.dead:.0%} dead)": value.active for name, value in activities.items()}
    return _draw_lines(named, "share of active units")


def draw_eigenvalues(values: Mapping[str, Tensor]) -> Figure:
    """Eigenvalues in the complex plane, with the unit circle."""
    figure = _figure()
    axis = figure.subplots()
    angle = torch.linspace(0, 2 * torch.pi, 200)
    axis.plot(angle.cos(), angle.sin(), color="grey", linewidth=1)
    for name, value in values.items():
        axis.scatter(value.real.cpu(), value.imag.cpu(), s=10, label=f"{name}: radius {value.abs().max():.3f}")
    axis.set_aspect("equal")
    axis.set_xlabel("real part")
    axis.set_ylabel("imaginary part")
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below: points may be anywhere
    return figure


def _draw_lines(lines: Mapping[str, Tensor], quantity: str, log: bool = False) -> Figure:
    figure = _figure()
    axis = figure.subplots()
    for index, (name, values) in enumerate(lines.items()):
        axis.plot(values.cpu(), color=f"C{index}", label=name)
    if log:
        axis.set_yscale("log")
    axis.set_xlabel("step t")
    axis.set_ylabel(quantity)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(6, 4), layout="constrained")


def _states(model: nn.Module, inputs: Sequence[Tensor], rnn: nn.Module | None) -> Tensor:
    with _watch(model, rnn) as seen:
        model(*inputs)
    return _time_first(seen["output"], seen)


def _time_first(values: Tensor, seen: dict[str, Any]) -> Tensor:
    return values.transpose(0, 1) if seen["batch_first"] and values.dim() == 3 else values


@contextmanager
def _watch(model: nn.Module, rnn: nn.Module | None) -> Iterator[dict[str, Any]]:
    """Keeps what the recurrent module read (as a leaf of the graph) and wrote in its last call."""
    if rnn is None:
        recurrent = (m for m in model.modules() if isinstance(m, nn.RNNBase) or hasattr(m, "identity_weights"))
        rnn = next(recurrent, None)
    if rnn is None:
        raise ValueError("the model has no torch.nn.RNNBase; name its recurrent module: rnn=...")
    if isinstance(rnn, (nn.RNNCellBase, RINCell)):
        raise ValueError(f"rnn must be a module that reads whole sequences, got a {type(rnn).__name__}")
    seen: dict[str, Any] = {"batch_first": bool(getattr(rnn, "batch_first", False))}

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        x = arguments[0] if arguments else named["input"]
        if not isinstance(x, Tensor):
            raise ValueError(f"the recurrent module must read a tensor, got a {type(x).__name__}")
        seen["input"] = x.detach().requires_grad_(torch.is_grad_enabled())
        return ((seen["input"], *arguments[1:]), named) if arguments else ((), {**named, "input": seen["input"]})

    def after(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        seen["output"] = result[0]

    handles = (rnn.register_forward_pre_hook(before, with_kwargs=True), rnn.register_forward_hook(after))
    try:
        yield seen
        if "input" not in seen:
            raise ValueError("the model does not call its recurrent module")
    finally:
        for handle in handles:
            handle.remove()
