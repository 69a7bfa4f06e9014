"""What the schema of `make lint` does not see in .github/workflows: pins, rights, and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import wheel

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {path.name: path.read_text() for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="this is an sdist, which has no workflows")


def test_there_are_workflows():
    assert {"ci.yml", "wheels.yml"} <= set(WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_commit_with_one_version_each(name):
    used = re.findall(r"uses: (.*)", WORKFLOWS[name])
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    everywhere = {action for text in WORKFLOWS.values() for action in re.findall(r"uses: (.*)", text)}
    names = [action.partition("@")[0] for action in everywhere]
    assert len(names) == len(set(names)), everywhere


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_only_read_and_ends(name):
    text = WORKFLOWS[name]
    assert re.findall(r"^permissions:\n((?: +.*\n)+)", text, re.MULTILINE) == ["  contents: read\n"]
    assert text.count("permissions:") == 1  # no job has more
    assert "secrets" not in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert text.count("runs-on:") == text.count("timeout-minutes:")
    assert re.search(r"^concurrency:\n  group: ", text, re.MULTILINE)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_a_workflow_makes_can_be_made(name):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = re.findall(r"run: make ([a-z-]+)", WORKFLOWS[name])
    assert made
    assert set(made) <= set(targets)


def test_every_python_is_tested_and_gets_a_wheel():
    versions = [f"3.{minor}" for minor in wheel.MINORS]
    assert f"python: {versions}".replace("'", '"') in WORKFLOWS["ci.yml"]
    assert f'PYTHONS="{" ".join(versions)}"' in WORKFLOWS["wheels.yml"]
    assert re.findall(r"^ +(3\.\d+)$", WORKFLOWS["wheels.yml"], re.MULTILINE) == versions
