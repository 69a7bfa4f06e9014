"""A forecasting model of darts whose torch.nn.RNN is replaced: the same numbers, and a RIN in its place.

    python examples/forecasting.py [--epochs 8] [--out build/forecasting]     a minute; needs darts

Twenty weeks of an hourly load, made here: a daily and a weekly course, and weather that lasts for days. darts' RNNModel
learns from windows of two weeks (336 steps) with the time of day and the working days beside them, and forecasts the
last week. It is fitted three times from one seed: as it
comes, with its nn.RNN replaced (`replace_rnn`: the same function and the same weights), and with a RIN instead. One
thread. Writes results.json and figure.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
from fused_rin import RIN, replace_rnn

WEEK = 7 * 24
HOURS, WINDOW = 20 * WEEK, 2 * WEEK
UNITS = 64
NAMES = ("torch.nn.RNN", "replace_rnn", "RIN")


def load(seed: int = 0) -> numpy.ndarray:
    """[HOURS] around 1, float32."""
    random = numpy.random.default_rng(seed)
    hours, weather = numpy.arange(HOURS), numpy.zeros(HOURS)
    for t in range(1, HOURS):
        weather[t] = (1 - 1 / 72) * weather[t - 1] + 0.01 * random.standard_normal()
    works = (hours // 24) % 7 < 5
    day = numpy.where(works, 0.25, 0.12) * numpy.sin(2 * numpy.pi * (hours % 24 - 8) / 24)
    return (1 + day + 0.1 * works + weather + 0.01 * random.standard_normal(HOURS)).astype(numpy.float32)


def calendar() -> numpy.ndarray:
    """[HOURS, 3]: the time of day as a point on a circle, and whether people work; known ahead."""
    hours = numpy.arange(HOURS)
    angle = 2 * numpy.pi * hours / 24
    return numpy.stack([numpy.sin(angle), numpy.cos(angle), (hours // 24) % 7 < 5], -1).astype(numpy.float32)


def make(name: str, epochs: int, folder: str) -> Any:
    """darts' model with the network of that name; darts makes it when it first sees a series."""
    from darts import TimeSeries
    from darts.models import RNNModel

    model = RNNModel(
        input_chunk_length=WEEK, model="RNN", hidden_dim=UNITS, training_length=WINDOW, batch_size=32, n_epochs=epochs,
        random_state=0, optimizer_kwargs={"lr": 2e-3}, work_dir=folder, model_name=name,
        pl_trainer_kwargs={
            "accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False,
            "gradient_clip_val": 1.0,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    known = TimeSeries.from_values(calendar())
    model.fit(TimeSeries.from_values(load()[: WINDOW + 2]), future_covariates=known, epochs=1)
    if name == "replace_rnn":
        print(replace_rnn(model.model, report=True))
    elif name == "RIN":
        model.model.rnn = RIN(model.model.rnn.input_size, UNITS, batch_first=True)
        torch.nn.init.normal_(model.model.rnn.weight_ih_l0, std=0.1)  # of 0.001 as the paper has it, for larger inputs
    return model


def fit(name: str, epochs: int, folder: str) -> dict[str, Any]:
    from darts import TimeSeries

    values, known = load(), TimeSeries.from_values(calendar())
    model = make(name, epochs, folder)
    torch.manual_seed(1)
    began = time.perf_counter()
    model.fit(TimeSeries.from_values(values[:-WEEK]), future_covariates=known, epochs=epochs)
    seconds = time.perf_counter() - began
    forecast = model.predict(WEEK, future_covariates=known).values()[:, 0]
    return {
        "seconds": seconds,
        "error": float(numpy.abs(forecast - values[-WEEK:]).mean()),
        "forecast": [round(float(value), 5) for value in forecast],
    }


def draw(runs: dict[str, dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    left.plot(load()[-WEEK:], color="black", linewidth=1, label="the load")
    for (name, run), style in zip(runs.items(), ("-", ":", "-"), strict=True):
        left.plot(run["forecast"], style, label=f"{name}, mean error {run['error']:.3f}")
    left.set(xlabel="hour of the last week", ylabel="load")
    left.legend(fontsize="small")
    right.bar([*runs], [run["seconds"] for run in runs.values()], color=["C0", "C1", "C2"])
    right.set(ylabel="seconds of the fit, one thread")
    right.tick_params(axis="x", labelrotation=30)
    figure.savefig(file, dpi=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("build/forecasting"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # of the libraries
    import darts  # noqa: F401  lightning sets its loggers' levels when it is imported

    for name in ("darts", "pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            runs[name] = fit(name, given.epochs, folder)
            print(f"{name:14} {runs[name]['seconds']:6.1f} s, mean error {runs[name]['error']:.4f}", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps({"epochs": given.epochs, "runs": runs}, indent=1) + "\n")
    draw(runs, given.out / "figure.png")


if __name__ == "__main__":
    main()
