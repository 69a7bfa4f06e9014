"""A stream, sample by sample: a state that is carried from call to call, and how long a call takes.

    python examples/streaming.py [--samples 20000] [--out build/streaming]     ten seconds

A filter of two layers takes one sample a call, as a controller or an audio effect does, in inference mode and on one
thread. Its outputs are compared with those of one call on the whole stream, and its calls are timed beside torch.nn.RNN
of the same weights. Writes results.json and figure.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from fused_rin import RIN, explain
from torch import Tensor, nn

UNITS, LAYERS = 64, 2


class Filter(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.readout = rnn, nn.Linear(UNITS, 1)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, B, 1], any number of steps; returns y of that shape and the state for the next call."""
        out, state = self.rnn(x, state)
        return self.readout(out), state


@torch.inference_mode()
def stream(model: Filter, samples: Tensor) -> tuple[Tensor, list[float]]:
    """All outputs, and the microseconds of each call."""
    state, outputs, times = None, [], []
    for sample in samples.split(1):
        began = time.perf_counter()
        y, state = model(sample, state)
        times.append(1e6 * (time.perf_counter() - began))
        outputs.append(y)
    return torch.cat(outputs), times


def percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {f"p{p}": ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] for p in (50, 90, 99)}


def draw(times: dict[str, list[float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    most = 1.5 * max(percentiles(values)["p99"] for values in times.values())
    for name, values in times.items():
        axes.hist([min(v, most) for v in values], bins=200, range=(0, most), histtype="step", label=name)
    axes.set(xlabel="us a call", ylabel="calls", yscale="log")
    axes.legend()
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("build/streaming"))
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    theirs = Filter(nn.RNN(1, UNITS, LAYERS)).eval()
    ours = Filter(RIN.from_rnn(theirs.rnn, skip=0)).eval()
    ours.readout = theirs.readout
    samples = torch.sin(torch.arange(given.samples) * 0.05)[:, None, None] + 0.1 * torch.randn(given.samples, 1, 1)
    with torch.inference_mode():
        print(explain(ours.rnn, samples[:1]))
        whole, _ = ours(samples)
    times, distance = {}, {}
    for name, model in (("RIN", ours), ("torch.nn.RNN", theirs)):
        stream(model, samples[:200])
        outputs, times[name] = stream(model, samples)
        distance[name] = float((outputs - whole).abs().max())
    results = {
        "samples": given.samples, "us": {name: percentiles(values) for name, values in times.items()},
        "distance_from_one_call": distance,
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(times, given.out / "figure.png")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
