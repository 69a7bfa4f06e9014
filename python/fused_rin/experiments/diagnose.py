"""`fused-rin diagnose CHECKPOINT`: the diagnostics of a trained model on test samples of its own task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_rin import diagnostics

from .checkpoints import check_model_state, read_checkpoint
from .errors import UserError
from .files import reporting, write_atomically
from .plots import save_figure
from .settings import Settings

SAMPLES = 128  # as the paper has it for its estimation error


def diagnose(checkpoint: Path, out: Path | None = None, data_dir: str = "") -> int:
    """Writes diagnostics.json and a picture of each into `out`, by default beside the checkpoint, and says
    where.
    """
    content = read_checkpoint(checkpoint)
    try:
        settings = Settings.from_dict({**content["settings"], **({"data_dir": data_dir} if data_dir else {})})
        task = settings.build_task()
        model = settings.build_model(task)
        check_model_state(content["model"], model)
        # What was evaluated is the average of the weights, where there is one.
        model.load_state_dict({**content["model"], **content["average"]})
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{checkpoint}: cannot be used: {error}") from error
    inputs, target = next(task.test_batches(SAMPLES))
    model.to(next(iter(content["model"].values())).dtype)
    name = f"{settings.model}, step {content['step']}"
    norms = diagnostics.gradient_norms(model, inputs, lambda output: task.loss(output, target))
    errors, activity = diagnostics.estimation_error(model, inputs), diagnostics.activity(model, inputs)
    numbers: dict[str, Any] = {
        "gradient_norms": norms,
        "estimation_error": errors._asdict(),
        "activity": activity._asdict(),
    }
    figures = {
        "gradients": diagnostics.draw_gradient_norms({name: norms}),
        "estimation-error": diagnostics.draw_estimation_error({name: errors}),
        "activity": diagnostics.draw_activity({name: activity}),
    }
    if settings.model not in ("lstm", "gru"):
        values = diagnostics.eigenvalues(model)
        numbers["eigenvalues"] = {key: [[z.real, z.imag] for z in value.tolist()] for key, value in values.items()}
        figures["eigenvalues"] = diagnostics.draw_eigenvalues(values)
    out = out or checkpoint.parent / "diagnostics"
    with reporting(out, "write the diagnostics"):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "diagnostics.json", (json.dumps(_plain(numbers), indent=1) + "\n").encode())
    for title, figure in figures.items():
        save_figure(figure, out / f"{title}.png")
    last, first = norms[-1].item(), norms[0].item()
    print(f"{name} on {settings.task}: {activity.dead:.1%} of the units are dead;")
    print(f"gradient norm {first:.2e} at the first step, {last:.2e} at the last. Numbers and pictures: {out}")
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value
