"""LeakyRNN and PLRNN: recurrent networks whose units have time constants of their own, on the same kernels as RIN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.nn.utils.rnn import PackedSequence

from fused_rin import reference, watchers
from fused_rin.functional import unit_factor
from fused_rin.problem import ACTIVATIONS, Rows, Rule, Units, Weights
from fused_rin.recurrent import Recurrent
from fused_rin.skip import check_backend

_FORMS = {"rate": "outside", "current": "current"}


def _check_activation(nonlinearity: str) -> str:
    if nonlinearity not in ACTIVATIONS:
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from {', '.join(map(repr, ACTIVATIONS))}.")
    return nonlinearity


def _check_alpha(
    alpha: float | Tensor | None, tau: float | Tensor | None, dt: float | None, hidden_size: int
) -> Tensor:
    """alpha, or dt / tau, as a float64 tensor () or (hidden_size,)."""
    if (alpha is None) == (tau is None) or (tau is None) != (dt is None):
        given = [name for name, value in (("alpha", alpha), ("tau", tau), ("dt", dt)) if value is not None]
        raise ValueError(f"expected either alpha or both tau and dt, got {' and '.join(given) or 'none of them'}")
    if alpha is None:
        name, value = "tau", torch.as_tensor(tau, dtype=torch.float64, device="cpu")
        if not bool((value > 0).all()):
            raise ValueError(f"tau must be greater than zero, got {tau}")
        assert dt is not None
        if not dt > 0:
            raise ValueError(f"dt must be greater than zero, got {dt}")
        value = dt / value
    else:
        name, value = "alpha", torch.as_tensor(alpha, dtype=torch.float64, device="cpu")
    if not bool(((value > 0) & (value <= 1)).all()):
        what = "alpha" if name == "alpha" else "alpha = dt / tau"
        raise ValueError(f"{what} must be in (0, 1], got {value.tolist()}")
    if value.shape not in ((), (hidden_size,)):
        raise ValueError(f"{name} must be a number or have shape ({hidden_size},), got {tuple(value.shape)}")
    return value.detach()


class _Leak:
    """The arguments that LeakyRNN and LeakyRNNCell share."""

    nonlinearity: str
    form: str
    train_alpha: bool
    noise_after: bool
    alpha: Tensor

    def _set_leak(
        self,
        hidden_size: int,
        nonlinearity: str,
        alpha: float | Tensor | None,
        tau: float | Tensor | None,
        dt: float | None,
        train_alpha: bool,
        form: str,
        noise: float,
        noise_after: bool,
    ) -> None:
        """Checks them all; before the constructor of torch's class, which draws the weights."""
        if form not in _FORMS:
            raise ValueError(f"form must be 'rate' or 'current', got {form!r}")
        if noise_after and form != "rate":
            raise ValueError("noise_after is for form='rate'; in currents both are the same noise")
        value = _check_alpha(alpha, tau, dt, hidden_size)
        if train_alpha and not bool((value < 1).all()):
            raise ValueError("an alpha that is trained must be below 1, got 1")
        self.nonlinearity, self.form = _check_activation(nonlinearity), form
        self.train_alpha, self.noise_after, self.noise = train_alpha, noise_after, noise
        self._first_alpha = value.tolist()

    def _leak(self, like: Tensor) -> Tensor:
        """alpha at the start, or what is trained in its place, as `like`."""
        value = torch.tensor(self._first_alpha, dtype=torch.float64, device="cpu")
        value = torch.logit(value) if self.train_alpha else value
        return value.to(device=like.device, dtype=like.dtype)

    @property
    def noise(self) -> float:
        """sigma, see the class."""
        return self._noise

    @noise.setter
    def noise(self, sigma: float) -> None:
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"noise must be a finite number and not negative, got {sigma}")
        self._noise = float(sigma)

    def reset_parameters(self) -> None:
        """Weights and biases as torch.nn.RNN draws them, a trained alpha as the constructor was told."""
        super().reset_parameters()  # type: ignore[misc]  # of the class beside this one
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            if name.startswith("logit_alpha"):
                parameter.data.copy_(self._leak(parameter))

    def _repr_of_leak(self) -> str:
        alpha = getattr(self, "alpha", None)
        text = ""
        if alpha is not None and not alpha.dim():
            text += f", alpha={float(alpha):g}"
        if self.train_alpha:
            text += ", train_alpha=True"
        if self.form != "rate":
            text += f", form={self.form}"
        if self._noise:
            text += f", noise={self._noise:g}"
        if self.noise_after:
            text += ", noise_after=True"
        return text


class _UnitRNN(Recurrent):
    """Layers whose units have factors of their own; a subclass says which."""

    nonlinearity: str
    _engine_form = "current"  # as `recurrence` calls it

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

    def _rule(self) -> Rule:
        return Rule(1.0, self.nonlinearity, self.num_heads if self.bidirectional else 0)

    def _suffixes(self, number: int) -> list[str]:
        """Of the parameters of a layer's directions."""
        return [f"l{number}", f"l{number}_reverse"] if self.bidirectional else [f"l{number}"]

    def _by_unit(self, factors: Sequence[Tensor], states: Tensor, name: str) -> Tensor:
        """Factors () or (hidden_size,) of a layer's directions as [G, D]."""
        like = states.new_empty(0, self.num_heads, self.hidden_size // self.num_heads)
        shape = like.shape[1:]
        rows = [unit_factor(name, f.reshape(shape) if f.dim() else f, like) for f in factors]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, nonlinearity={self.nonlinearity}"
        if self.num_heads != 1:
            text += f", num_heads={self.num_heads}"
        if self.backend != "auto":
            text += f", backend={self.backend}"
        return text


class LeakyRNN(_Leak, _UnitRNN):
    """A leaky rate network, in steps of alpha = dt / tau, with the shapes and the habits of torch.nn.RNN.

        form="rate"      h_t = (1 - alpha) h_{t-1} + alpha act(W x_t + b_ih + U h_{t-1} + b_hh + noise)
        form="current"   h_t = (1 - alpha) h_{t-1} + alpha (W x_t + b_ih + U act(h_{t-1}) + b_hh + noise)

    (Yang et al. 2019, doi 10.1038/s41593-018-0310-2, and Song, Yang and Wang 2016, doi 10.1371/journal.pcbi.1004792,
    both in their methods.) In currents the output is the current h_t; units above a layer receive its rates, act(h_t).

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.RNN.
        nonlinearity: "relu" (default), "tanh", "sigmoid", "softplus", "leaky_relu" (slope 0.01) or "none".
        alpha: in (0, 1], a number or (hidden_size,); or in its place
        tau, dt: the time constant, a number or (hidden_size,), and the length of a step, in the same unit of time.
        train_alpha: alpha is trained, for each layer and direction, as `logit_alpha_l{k}`, with alpha = sigmoid of it
            in (0, 1); of the shape alpha was given in. Else it is the buffer `alpha`.
        form: "rate" or "current".
        noise: sigma. In every step, in training and after it, a unit is moved by a normal number whose standard
            deviation is sqrt(2 alpha) sigma: noise sqrt(2 / alpha) sigma enters where the equation says so. A
            seed of torch repeats it, no gradient reaches alpha through it. Set the attribute to change it.
        noise_after: form="rate": noise of that standard deviation is added to the state, not within the activation.
        num_heads, checkpoint_steps, return_sequences: as `RIN`. Noise is kept for backward as a whole.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; see `fused_rin.explain`.

    Weights are named and drawn as torch.nn.RNN's. Raises ValueError for an alpha outside (0, 1], a tau or dt that is
    not positive, and a negative noise.
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
        alpha: float | Tensor | None = None,
        tau: float | Tensor | None = None,
        dt: float | None = None,
        train_alpha: bool = False,
        form: str = "rate",
        noise: float = 0.0,
        noise_after: bool = False,
        num_heads: int = 1,
        backend: str = "auto",
        checkpoint_steps: int | str | None = None,
        return_sequences: bool = True,
    ) -> None:
        check_backend(backend)
        self._set_leak(hidden_size, nonlinearity, alpha, tau, dt, train_alpha, form, noise, noise_after)
        self.backend = backend
        # Drawn as torch.nn.RNN draws them; the base class knows the names of two activations.
        self._make(
            "tanh", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            num_heads, checkpoint_steps, return_sequences,
        )  # fmt: skip
        if not train_alpha:
            self.register_buffer("alpha", self._leak(self.weight_ih_l0))
            return
        for number in range(num_layers):
            for suffix in self._suffixes(number):
                self.register_parameter(f"logit_alpha_{suffix}", torch.nn.Parameter(self._leak(self.weight_ih_l0)))

    @property
    def _engine_form(self) -> str:  # type: ignore[override]
        return _FORMS[self.form]

    def alphas(self, number: int = 0) -> list[Tensor]:
        """alpha of layer `number`, () or (hidden_size,), one for each direction."""
        if not self.train_alpha:
            return [self.alpha] * len(self._suffixes(number))
        return [torch.sigmoid(getattr(self, f"logit_alpha_{suffix}")) for suffix in self._suffixes(number)]

    def _run_layer(
        self, number: int, x: Tensor, h0: Tensor | None, batch: int, rows: Rows, batch_first: bool
    ) -> tuple[Tensor | None, Tensor]:
        directions = 2 if self.bidirectional else 1
        own, form = self._layer_weights(number), _FORMS[self.form]
        if number and form == "current":
            x = reference.ACTIVATIONS[self.nonlinearity](x)
        alpha = self._by_unit(self.alphas(number), own.w_ih, "alpha")
        gain, noise, added = None, None, None
        if self._noise:
            noise = self._draw(x, alpha, directions)
        if form == "outside":
            gain = alpha
            if not self.noise_after:
                noise, added = None, noise
        else:
            scale = alpha.reshape(-1, 1)
            w_ih, w_hh, *biases = (None if w is None else _scaled(w, scale) for w in own)
            own = Weights(w_ih, w_hh, *biases)  # type: ignore[arg-type]
            noise, added = None, noise
        units = Units(form, 1 - alpha, gain, noise)
        return self._run_recurrences(number, x, own, h0, batch, rows, self._rule(), batch_first, units, added)

    def _draw(self, x: Tensor, alpha: Tensor, directions: int) -> Tensor:
        """Noise of a layer, [T, B, G * D] or [rows, G * D]: as it enters the sum, or after the activation."""
        within = self.form == "rate" and not self.noise_after
        deviation = self._noise * torch.sqrt(2 / alpha if within else 2 * alpha).detach().reshape(-1)
        xi = torch.randn(*x.shape[:-1], directions * self.hidden_size, dtype=x.dtype, device=x.device)
        return xi * deviation.to(x.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._repr_of_leak()


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Row by row, [G * D, 1], in the weight's dtype."""
    scale = scale.to(weight.dtype)
    return weight * (scale if weight.dim() == 2 else scale[:, 0])


class PLRNN(_UnitRNN):
    """Piecewise-linear recurrent network: z_t = A z_{t-1} + W relu(z_{t-1}) + b_hh + C x_t + b_ih, A diagonal.

    Durstewitz 2017, doi 10.1371/journal.pcbi.1005542, eq. 1. C is `weight_ih_l{k}`, W `weight_hh_l{k}` and the diagonal
    of A `skip_l{k}` (hidden_size,), all trained. There W has no diagonal:
    `register_parametrization(plrnn, "weight_hh_l0", parametrize.NoSelfConnection())`. The output is z_t; layers above
    receive relu(z_t).

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.RNN.
        nonlinearity: as `LeakyRNN`, "relu" by default.
        skip: A at the start, of every unit.
        num_heads, checkpoint_steps, return_sequences: as `RIN`. backend: "auto", "cpu", "cuda", "triton" or
            "reference".

    W, C and biases are drawn as torch.nn.RNN's. Raises ValueError for a skip that is not finite.
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
        skip: float = 0.9,
        num_heads: int = 1,
        backend: str = "auto",
        checkpoint_steps: int | str | None = None,
        return_sequences: bool = True,
    ) -> None:
        check_backend(backend)
        if not math.isfinite(skip):
            raise ValueError(f"skip must be finite, got {skip}")
        self.nonlinearity, self.backend, self._first_skip = _check_activation(nonlinearity), backend, float(skip)
        self._make(
            "tanh", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            num_heads, checkpoint_steps, return_sequences,
        )  # fmt: skip
        for number in range(num_layers):
            for suffix in self._suffixes(number):
                diagonal = torch.full_like(self.weight_ih_l0[:, 0], skip)
                self.register_parameter(f"skip_{suffix}", torch.nn.Parameter(diagonal))

    def reset_parameters(self) -> None:
        """W, C and biases as torch.nn.RNN, A as the constructor was told."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("skip_"):
                init.constant_(parameter, self._first_skip)

    def _run_layer(
        self, number: int, x: Tensor, h0: Tensor | None, batch: int, rows: Rows, batch_first: bool
    ) -> tuple[Tensor | None, Tensor]:
        own = self._layer_weights(number)
        if number:
            x = reference.ACTIVATIONS[self.nonlinearity](x)
        skips = [getattr(self, f"skip_{suffix}") for suffix in self._suffixes(number)]
        units = Units("current", self._by_unit(skips, own.w_ih, "skip"))
        return self._run_recurrences(number, x, own, h0, batch, rows, self._rule(), batch_first, units)


class _UnitCell(torch.nn.RNNCellBase):
    """One step, by torch's operators: there is no loop to fuse."""

    nonlinearity: str

    def _sums(self, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """Input and state of a batch of rows, checked, and whether the caller gave a batch; errors as RNNCell's."""
        if input.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        batched = input.dim() == 2
        if not batched:
            input, hx = input.unsqueeze(0), None if hx is None else hx.unsqueeze(0)
        if input.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {self.input_size}")
        if hx is None:
            hx = input.new_zeros(input.shape[0], self.hidden_size)
        if hx.shape[0] != input.shape[0]:
            raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden0 batch size {hx.shape[0]}")
        if hx.shape[1] != self.hidden_size:
            raise RuntimeError(f"hidden0 has inconsistent hidden_size: got {hx.shape[1]}, expected {self.hidden_size}")
        return input, hx, batched

    def _sum(self, input: Tensor, factor: Tensor) -> Tensor:
        linear = torch.nn.functional.linear
        return linear(input, self.weight_ih, self.bias_ih) + linear(factor, self.weight_hh, self.bias_hh)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        if not self.bias:
            text += f", bias={self.bias}"
        return f"{text}, nonlinearity={self.nonlinearity}"


class LeakyRNNCell(_Leak, _UnitCell):
    """One step of a `LeakyRNN`, in place of torch.nn.RNNCell; arguments as of both.

    Input (B, input_size) or (input_size,), hx (B, hidden_size) or (hidden_size,), zeros if None; returns the next state
    in the shape of hx. A trained alpha is `logit_alpha`.
    """

    logit_alpha: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | Tensor | None = None,
        tau: float | Tensor | None = None,
        dt: float | None = None,
        train_alpha: bool = False,
        form: str = "rate",
        noise: float = 0.0,
        noise_after: bool = False,
    ) -> None:
        self._set_leak(hidden_size, nonlinearity, alpha, tau, dt, train_alpha, form, noise, noise_after)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        if train_alpha:
            self.logit_alpha = torch.nn.Parameter(self._leak(self.weight_ih))
        else:
            self.register_buffer("alpha", self._leak(self.weight_ih))

    def extra_repr(self) -> str:
        return super().extra_repr() + self._repr_of_leak()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; errors as torch.nn.RNNCell's."""
        x, h, batched = self._sums(input, hx)
        act = reference.ACTIVATIONS[self.nonlinearity]
        alpha = (torch.sigmoid(self.logit_alpha) if self.train_alpha else self.alpha).to(h.dtype)
        within = 0.0 if not self._noise or self.noise_after else self._normal(h, torch.sqrt(2 / alpha))
        new = act(self._sum(x, h) + within) if self.form == "rate" else self._sum(x, act(h)) + within
        new = (1 - alpha) * h + alpha * new
        if self._noise and self.noise_after:
            new = new + self._normal(h, torch.sqrt(2 * alpha))
        return new if batched else new[0]

    def _normal(self, like: Tensor, deviation: Tensor) -> Tensor:
        return torch.randn_like(like) * (self._noise * deviation.detach())


class PLRNNCell(_UnitCell):
    """One step of a `PLRNN`, in place of torch.nn.RNNCell: A is `skip` (hidden_size,)."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        skip: float = 0.9,
    ) -> None:
        if not math.isfinite(skip):
            raise ValueError(f"skip must be finite, got {skip}")
        self.nonlinearity, self._first_skip = _check_activation(nonlinearity), float(skip)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.skip = torch.nn.Parameter(torch.full_like(self.weight_ih[:, 0], skip))

    def reset_parameters(self) -> None:
        """As `PLRNN.reset_parameters`."""
        super().reset_parameters()
        skip: Any = self._parameters.get("skip")
        if skip is not None:
            init.constant_(skip, self._first_skip)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; errors as torch.nn.RNNCell's."""
        x, h, batched = self._sums(input, hx)
        new = self.skip * h + self._sum(x, reference.ACTIVATIONS[self.nonlinearity](h))
        return new if batched else new[0]
