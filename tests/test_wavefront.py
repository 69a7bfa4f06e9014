"""When layers run side by side: by the model of a step, by the kind of call, by the setting."""

from __future__ import annotations

import math
from typing import Any

import fused_rin
import pytest
import torch
from fused_rin import RIN, backends, cuda, cuda_plan, settings, wavefront
from fused_rin.problem import ALL_ROWS, Rows

from tests.test_cuda_plan import A100, H200

BF16, FP32 = torch.bfloat16, torch.float32
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("layers", "hidden", "batch", "dtype"), [(2, 128, 8, BF16), (4, 256, 1, FP32), (3, 512, 1, BF16)]
)
def test_few_rows_gain(layers, hidden, batch, dtype):
    """At most a layer's share of the time, and no more than all of them."""
    wave = wavefront.choose(layers, 2048, batch, 1, hidden, dtype, H200)
    assert wave is not None
    assert 1.2 < wave.gain < layers
    spans = math.ceil(2048 / wave.steps)
    assert layers * spans * wavefront.CALL < 2048 * layers * wave.plan.estimated_cycles / wavefront.CLOCK
    assert wave.plan.kernel == cuda_plan.plan(batch, 1, hidden, dtype, H200).kernel  # so the same numbers


def test_more_steps_gain_more():
    gains = [
        wavefront.choose(3, steps, 8, 1, 128, BF16, H200, least_gain=0.0).gain for steps in (256, 1024, 4096, 16384)
    ]
    assert gains == sorted(gains)
    assert gains[0] < 1.2 < 2 < gains[-1] < 3


def test_a_layer_that_fills_the_device_gains_nothing():
    full = 2 * 8 * H200.sms  # two blocks to an SM
    assert wavefront.choose(2, 1024, full, 1, 128, BF16, H200) is None
    assert wavefront.choose(2, 1024, full // 2, 1, 128, BF16, H200) is not None
    # The grid of 2,048 units is one at a time.
    assert wavefront.choose(2, 1024, 1, 1, 2048, BF16, H200) is None


def test_too_few_steps():
    assert wavefront.choose(4, 2 * wavefront.LEAST_STEPS - 1, 8, 1, 128, BF16, H200, least_gain=0.0) is None
    assert wavefront.choose(4, 2 * wavefront.LEAST_STEPS, 8, 1, 128, BF16, H200, least_gain=0.0).steps == 16


def test_each_layer_has_a_workspace_for_its_own_tiles():
    wave = wavefront.choose(2, 2048, 1, 1, 512, BF16, A100)
    assert wave.plan.kernel.grid
    assert wave.plan.workspace_bytes == wave.plan.kernel.workspace_bytes
    # Eight rows: alone over three places, side by side with another layer one place has more rows.
    alone, beside = (
        cuda_plan.plan(8, 1, 512, BF16, A100),
        wavefront.choose(2, 2048, 8, 1, 512, BF16, A100, least_gain=0.0),
    )
    assert alone.tile_rows < beside.plan.tile_rows
    assert beside.plan.workspace_bytes == beside.plan.kernel.workspace_bytes


@pytest.fixture
def plan_of(monkeypatch):
    monkeypatch.setattr(settings, "WAVEFRONT", "")
    monkeypatch.setattr(backends, "select", lambda *_: (cuda, {}))
    monkeypatch.setattr(cuda, "runnable_device", lambda _: H200)

    def run(rows: Rows = ALL_ROWS, *, steps: int = 2048, dtype: torch.dtype = BF16, device: Any = GPU, **options: Any):
        module = RIN(8, options.pop("hidden", 128), options.pop("layers", 3), dtype=dtype, **options)
        return wavefront.plan_of(module, "relu", rows, steps, 8, dtype, device)

    return run


def test_which_calls_are_side_by_side(plan_of, monkeypatch):
    lengths = torch.full((8,), 2048)
    assert plan_of() == plan_of(Rows(lengths)) == plan_of(batch_first=True)
    assert plan_of(num_heads=2).plan.blocks == 2 * plan_of().plan.blocks
    assert plan_of(Rows(lengths, torch.arange(2048))) is None  # packed
    assert plan_of(bidirectional=True) is None
    assert plan_of(layers=1) is None
    assert plan_of(device=torch.device("cpu")) is None
    assert plan_of(hidden=100) is None  # rows of no whole 16 bytes
    assert plan_of(hidden=100, dtype=FP32) is not None
    assert plan_of(checkpoint_steps=64) is None
    assert plan_of(dropout=0.5) is None
    assert plan_of(hidden=4096) is None  # no plan
    assert plan_of(steps=64) is None
    monkeypatch.setattr(settings, "WAVEFRONT", "on")
    assert plan_of(steps=64) is not None
    assert plan_of(bidirectional=True) is None
    monkeypatch.setattr(settings, "WAVEFRONT", "off")
    assert plan_of() is None
    monkeypatch.setattr(settings, "WAVEFRONT", "")
    monkeypatch.setattr(backends, "select", lambda *_: (fused_rin.reference, {}))
    assert plan_of() is None


def test_dropout_counts_in_training_alone(plan_of):
    module = RIN(8, 128, 3, dropout=0.5, dtype=BF16)
    assert wavefront.plan_of(module, "relu", ALL_ROWS, 2048, 8, BF16, GPU) is None
    assert wavefront.plan_of(module.eval(), "relu", ALL_ROWS, 2048, 8, BF16, GPU) is not None


def test_explain_says_so(monkeypatch):
    module, wave = RIN(8, 16, 3), wavefront.Wave(128, cuda_plan.plan(8, 1, 16, FP32, H200), 2.04)
    monkeypatch.setattr(wavefront, "plan_of", lambda *_: wave)
    text = "3 layers side by side, each a span of 128 steps behind the one below it: 2.0 times as fast as in turn"
    assert text in fused_rin.explain(module, (512, 8, 8)).plan
    with torch.autocast("cpu", dtype=BF16):
        assert "side by side" not in fused_rin.explain(module, (512, 8, 8)).plan
    monkeypatch.setattr(wavefront, "plan_of", lambda *_: None)
    assert "side by side" not in fused_rin.explain(module, (512, 8, 8)).plan
