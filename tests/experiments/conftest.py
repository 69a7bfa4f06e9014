import pytest
from fused_rin.experiments.training.runs import Run
from fused_rin.experiments.training.settings import Settings

# Small enough for a run to take well under a second.
TINY = {"length": 10, "hidden_size": 8, "steps": 24, "test_size": 20, "threads": 1}
TINY |= {"log_every": 5, "eval_every": 10, "checkpoint_every": 7}
TINY |= {"learning_rate": 1e-3, "schedule": "constant", "warmup": 0.0}


@pytest.fixture
def tiny():
    """Settings of a run of 24 steps; any of them can be changed."""
    return lambda task="adding", **changes: Settings.for_task(task, **{**TINY, **changes})


@pytest.fixture
def tiny_run(tmp_path, tiny):
    """A new run folder under `name` with tiny settings."""
    return lambda name="run", **changes: Run.new(tmp_path / name, tiny(**changes))
