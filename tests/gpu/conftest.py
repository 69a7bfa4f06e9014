"""What the tests on a GPU share: parts of them in several processes, and an end once nothing more can be learnt."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", help="I/N: every N-th test, from the I-th on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("FUSED_RIN_NEEDS_GPU") and not torch.cuda.is_available():
        pytest.exit("PyTorch sees no GPU: every test would be skipped", returncode=3)
    first, step = map(int, config.getoption("--shard").split("/"))
    chosen = items[first - 1 :: step]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(autouse=True)
def _context_survives(request: pytest.FixtureRequest) -> Iterator[None]:
    """An illegal access ends all work of the process with the GPU: the tests after it would fail for no fault."""
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the GPU is lost to this process since {request.node.nodeid}: {error}", returncode=3)
