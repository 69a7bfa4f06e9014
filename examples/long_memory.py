"""A million steps in 16 MB: slow time constants, found by gradients through the whole of a recording.

    python examples/long_memory.py [--steps 1000000] [--updates 60] [--out build/long_memory]     a minute and a half

A leaky network of 64 units listens to a recording of a million steps, each unit with a time constant of its own, from a
thousand to three hundred thousand steps. Another one, which starts with the same time constant everywhere, has to find
them: after each recording it is told where the units stand, and nothing else. Truncated, as such gradients usually are,
they would not reach back as far as a slow unit remembers; kept, the states of a million steps would take 256 MB. With
checkpoint_steps="auto" the whole process grows by less than 16. Writes results.json and figure.png.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from pathlib import Path

import torch
from fused_rin import LeakyRNN
from torch import Tensor

UNITS, FASTEST, SLOWEST = 64, 1e3, 3e5


def network(tau: Tensor, train: bool) -> LeakyRNN:
    """Units that do not know of each other: what is asked for are their time constants alone."""
    net = LeakyRNN(
        1, UNITS, bias=False, nonlinearity="none", tau=tau, dt=1.0, train_alpha=train, checkpoint_steps="auto",
        return_sequences=False,
    )  # fmt: skip
    with torch.no_grad():
        net.weight_ih_l0.fill_(1)
        net.weight_hh_l0.zero_()
    net.weight_ih_l0.requires_grad_(False)
    net.weight_hh_l0.requires_grad_(False)
    return net


def record(x: Tensor, generator: torch.Generator) -> None:
    """Into x [T, 1, 1]: levels that last a 5,000th of it, a 500th, a 16th and a half, one on top of the other."""
    x.zero_()
    for pieces in (5000, 500, 16, 2):
        for piece in x.chunk(pieces):
            piece += torch.randn(1, generator=generator)


def peak() -> float:
    """MB that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def draw(true: Tensor, curves: list[list[float]], errors: list[float], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number in range(0, UNITS, 7):
        (line,) = left.plot([taus[number] for taus in curves])
        left.axhline(float(true[number]), color=line.get_color(), linestyle=":", linewidth=1)
    left.set(xlabel="recordings heard", ylabel="time constant, steps", yscale="log")
    right.plot(errors)
    right.set(xlabel="recordings heard", ylabel="median error, percent", yscale="log")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/long_memory"))
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    generator = torch.Generator().manual_seed(given.seed)
    scale = given.steps / 1_000_000
    true = scale * torch.logspace(math.log10(FASTEST), math.log10(SLOWEST), UNITS)
    teacher, student = network(true, False), network(torch.full((UNITS,), scale * 2e4), True)
    optimizer = torch.optim.Adam([student.logit_alpha_l0], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.updates)

    # Code and workspaces come into memory: an update that moves nothing.
    (0 * student(torch.zeros(given.steps // 100, 1, 1))[1].sum()).backward()
    optimizer.step()
    x = torch.empty(given.steps, 1, 1)
    record(x, generator)
    before, began, curves, errors = peak(), time.perf_counter(), [], []
    for _ in range(given.updates):
        with torch.no_grad():
            told = teacher(x)[1]
        loss = (student(x)[1] - told).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        taus = 1 / student.alphas()[0].detach()
        curves.append(taus.tolist())
        errors.append(100 * float(((taus / true).log().abs().exp() - 1).median()))
        record(x, generator)
    found = {
        "steps": given.steps,
        "updates": given.updates,
        "seconds": time.perf_counter() - began,
        "megabytes": peak() - before,
        "states_in_megabytes": given.steps * UNITS * 4 / 2**20,
        "median_error_percent": errors[-1],
        "first_error_percent": errors[0],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(true, curves, errors, given.out / "figure.png")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
