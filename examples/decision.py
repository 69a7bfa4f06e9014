"""A leaky network with Dale's law learns to decide, remember and answer: the psychometric curve of a trained network.

    python examples/decision.py [--updates 800] [--out build/decision]     half a minute on two cores

The task (random dots with a delay): two channels of noisy evidence for 400 ms, their difference is the coherence; a
delay of 100 to 400 ms; then the fixation input goes off, and the network has to say which channel was stronger. 100
units with a time constant of 100 ms, of which 80 excite and 20 inhibit; only the former are read out. After Song, Yang
and Wang 2016, doi 10.1371/journal.pcbi.1004792. Writes results.json and figure.png.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from fused_rin import LeakyRNN, parametrize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

DT, TAU = 20.0, 100.0  # ms
FIXATION, STIMULUS, DECISION = 5, 20, 10  # steps
DELAY = (5, 20)
COHERENCES = (-0.64, -0.32, -0.16, -0.08, -0.04, 0.0, 0.04, 0.08, 0.16, 0.32, 0.64)
UNITS, EXCITATORY = 100, 80
NOISE = 0.5  # of the evidence, a step


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = LeakyRNN(3, UNITS, nonlinearity="relu", tau=TAU, dt=DT, noise=0.05)
        signs = torch.ones(UNITS)
        signs[EXCITATORY:] = -1
        # Four excite for each that inhibits: in balance at the start, and stable.
        weight = torch.rand(UNITS, UNITS) * torch.where(signs > 0, 1.0, EXCITATORY / (UNITS - EXCITATORY))
        weight.fill_diagonal_(0)
        radius = torch.linalg.eigvals(weight * signs).abs().max()
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(weight / radius)
        register_parametrization(self.rnn, "weight_hh_l0", parametrize.NoSelfConnection())
        register_parametrization(self.rnn, "weight_hh_l0", parametrize.DaleLaw(signs))
        self.readout = nn.Linear(EXCITATORY, 3)  # fixate, left, right

    def forward(self, x: Tensor) -> Tensor:
        rates, _ = self.rnn(x)
        return self.readout(rates[..., :EXCITATORY])


def trials(coherence: Tensor, delay: int) -> tuple[Tensor, Tensor]:
    """Inputs [T, B, 3] (fixation, left, right) and answers [T, B]: 0 until the fixation goes off, then 1 or 2."""
    before = FIXATION + STIMULUS + delay
    x = torch.zeros(before + DECISION, len(coherence), 3)
    x[:before, :, 0] = 1
    evidence = 0.5 + torch.stack([-coherence, coherence], -1) / 2
    x[FIXATION : FIXATION + STIMULUS, :, 1:] = evidence + NOISE * torch.randn(STIMULUS, len(coherence), 2)
    answers = torch.zeros(x.shape[:2], dtype=torch.long)
    answers[before:] = torch.where(coherence > 0, 2, 1)
    return x, answers


def train(network: Network, updates: int, batch: int = 64) -> list[float]:
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    losses = []
    for _ in range(updates):
        strength = torch.tensor([c for c in COHERENCES if c])[torch.randint(len(COHERENCES) - 1, (batch,))]
        x, answers = trials(strength, int(torch.randint(*DELAY, ())))
        said = network(x)
        # To fixate is most of a trial and easily learnt; the first steps of the answer are for getting there.
        answer = slice(len(x) - DECISION + 3, None)
        loss = F.cross_entropy(said[answer].flatten(0, 1), answers[answer].flatten())
        loss = loss + 0.2 * F.cross_entropy(said[:-DECISION].flatten(0, 1), answers[:-DECISION].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def psychometric(network: Network, each: int = 400) -> dict[str, list[float]]:
    """How often the network says "right" at each coherence, of the trials in which it answers, and a standard error."""
    chosen, errors, answered = [], [], []
    for coherence in COHERENCES:
        said = network(trials(torch.full((each,), coherence), DELAY[1])[0])[-1].argmax(-1)
        valid = int((said > 0).sum())
        share = int((said == 2).sum()) / max(1, valid)
        chosen.append(share)
        errors.append(math.sqrt(share * (1 - share) / max(1, valid)))
        answered.append(valid / each)
    return {"coherence": list(COHERENCES), "right": chosen, "error": errors, "answered": answered}


def draw(curve: dict[str, list[float]], losses: list[float], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(losses, linewidth=0.8)
    left.set(xlabel="update", ylabel="cross entropy", yscale="log")
    right.errorbar(curve["coherence"], curve["right"], curve["error"], marker="o", capsize=2)
    right.axhline(0.5, color="grey", linewidth=0.8)
    right.set(xlabel="coherence", ylabel='share of "right"', ylim=(-0.02, 1.02))
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/decision"))
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    network = Network()
    losses = train(network, given.updates)
    curve = psychometric(network)
    given.out.mkdir(parents=True, exist_ok=True)
    weight = network.rnn.weight_hh_l0.detach()
    results = {
        "updates": given.updates, "seed": given.seed, "loss": losses[-1], "psychometric": curve,
        "excitatory": float((weight[:, :EXCITATORY] >= 0).float().mean()),
        "inhibitory": float((weight[:, EXCITATORY:] <= 0).float().mean()),
    }  # fmt: skip
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(curve, losses, given.out / "figure.png")
    for coherence, right in zip(curve["coherence"], curve["right"], strict=True):
        print(f"coherence {coherence:+.2f}: right {right:.0%}")


if __name__ == "__main__":
    main()
