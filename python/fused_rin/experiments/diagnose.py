"""`fused-rin diagnose CHECKPOINT ...`: the diagnostics of trained models on test samples of their own task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_rin import diagnostics

from .errors import UserError
from .files import read_results, reporting, write_atomically
from .plots import save_figure
from .training.checkpoints import check_model_state, read_checkpoint
from .training.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "fused-rin diagnostics"
VERSION = 1
SAMPLES = 128  # as the paper has it for its estimation error
GATED = ("lstm", "gru")  # no single recurrent matrix to have eigenvalues, and no ReLU


def diagnose(checkpoints: Sequence[Path], out: Path | None = None, data_dir: str = "", first: bool = False) -> int:
    """Writes diagnostics.json and a picture of each into `out`, by default beside the first checkpoint, and
    says where. Returns the exit code.

    Args:
        data_dir: see `data.data_folder`. first: look at the weights the networks started with instead.
    """
    networks = [measure(checkpoint, data_dir, first) for checkpoint in checkpoints]
    out = out or checkpoints[0].parent / "diagnostics"
    lines = ",\n".join(json.dumps(network) for network in networks)
    content = f'{{"format": "{FORMAT}", "version": {VERSION}, "networks": [\n{lines}\n]}}\n'
    with reporting(out, "write the diagnostics"):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "diagnostics.json", content.encode())
    for network in networks:
        norms, dead = network["gradient_norms"], network["activity"]["dead"]
        print(f"{network['name']}: {dead:.1%} of the units are dead; gradient norm {norms[0]:.2e} at the first step,")
        print(f"    {norms[-1]:.2e} at the last")
    return redraw(out / "diagnostics.json", out)


def measure(checkpoint: Path, data_dir: str = "", first: bool = False) -> dict[str, Any]:
    """The numbers of one checkpoint, as JSON has them. Raises UserError when it is damaged or none."""
    content = read_checkpoint(checkpoint)
    try:
        settings = Settings.from_dict({**content["settings"], **({"data_dir": data_dir} if data_dir else {})})
        task = settings.build_task()
        model = settings.build_model(task)
        check_model_state(content["model"], model)
        if not first:
            # What was evaluated is the average of the weights, where there is one.
            model.load_state_dict({**content["model"], **content["average"]})
            model.to(next(iter(content["model"].values())).dtype)
        step = 0 if first else int(content["step"])
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("a weight is infinite or NaN")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{checkpoint}: cannot be used: {error}") from error
    inputs, target = next(task.test_batches(SAMPLES))
    numbers: dict[str, Any] = {
        "gradient_norms": diagnostics.gradient_norms(model, inputs, lambda output: task.loss(output, target)),
        "estimation_error": diagnostics.estimation_error(model, inputs)._asdict(),
        "activity": diagnostics.activity(model, inputs)._asdict(),
    }
    if settings.model not in GATED:
        values = diagnostics.eigenvalues(model)
        numbers["eigenvalues"] = {name: torch.view_as_real(value) for name, value in values.items()}
    about = {"name": f"{settings.model}, step {step}", "task": settings.task, "seed": settings.seed}
    return {**about, **_plain(numbers)}


def redraw(path: Path, out: Path) -> int:
    """Draws the pictures of a diagnostics.json into `out`; measures nothing. Returns the exit code."""
    content = read_results(path, FORMAT, VERSION, "networks")
    try:
        figures = draw(content["networks"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: is damaged: {error!r}") from error
    with reporting(out, "write the pictures"):
        out.mkdir(parents=True, exist_ok=True)
    for title, figure in figures.items():
        save_figure(figure, out / f"{title}.png")
    print(f"Pictures of {path}: {', '.join(figures)} in {out}")
    return 0


def draw(networks: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """A picture of each of the diagnostics with all networks in it, by the name of its file."""
    norms, errors, activities, eigenvalues = {}, {}, {}, {}
    for network in networks:
        name = network["name"]
        while name in norms:  # two checkpoints of one model and step
            name += "'"
        norms[name] = torch.tensor(network["gradient_norms"])
        error, activity = network["estimation_error"], network["activity"]
        errors[name] = diagnostics.EstimationError(*(torch.tensor(error[part]) for part in ("to_last", "to_previous")))
        activities[name] = diagnostics.Activity(activity["dead"], torch.tensor(activity["active"]))
        for parameter, values in network.get("eigenvalues", {}).items():
            eigenvalues[f"{name}, {parameter}"] = torch.view_as_complex(torch.tensor(values))
    figures = {
        "gradients": diagnostics.draw_gradient_norms(norms),
        "estimation-error": diagnostics.draw_estimation_error(errors),
        "activity": diagnostics.draw_activity(activities),
    }
    return figures | ({"eigenvalues": diagnostics.draw_eigenvalues(eigenvalues)} if eigenvalues else {})


def _plain(value: Any) -> Any:
    """Tensors as lists, numbers with five digits: a picture needs no more."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    return [_plain(inner) for inner in value] if isinstance(value, list) else float(f"{value:.5g}")
