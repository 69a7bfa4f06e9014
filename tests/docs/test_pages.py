"""Every block of code of every page runs, or is checked; see pages.py for which is what."""

from __future__ import annotations

import contextlib
import unittest
from pathlib import Path

import pytest
import torch
from sybil.evaluators.skip import Skipper
from sybil.example import SybilFailure

from . import pages, shell

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for example in pages.parse(ROOT / name).examples():
        try:
            with contextlib.suppress(unittest.SkipTest):
                example.evaluate()
        except Exception as error:
            raise AssertionError(f"{name}, line {example.line}: {error}") from error


def test_few_blocks_are_left_out():
    """Each needs what a machine without a GPU or network has not; what only takes long is shortened instead."""
    left_out = [
        (f"{name}:{example.line}", action, reason)
        for name in NAMES
        for example in pages.parse(ROOT / name).examples()
        if isinstance(example.region.evaluator, Skipper)
        for action, reason in [example.parsed]
        if action != "end"
    ]
    assert len(left_out) <= 3, left_out
    assert all(action == "next" and len(reason or "") > 10 for _, action, reason in left_out), "say why"


def blocks(text: str, tmp_path: Path):
    path = tmp_path / "page.md"
    path.write_text(text)
    return list(pages.parse(path).examples())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nimport nothing_of_this_name\n```\n", "nothing_of_this_name"),
        ("```python\n>>> 1 + 1\n3\n```\n", "Expected:\n    3"),
        ("```shell\nmake no-such-target\n```\n", "no target"),
        ("```shell\nmake demo NO_SUCH_VARIABLE=1\n```\n", "no variable"),
        ("```shell\nFUSED_RIN_NO_SUCH_VARIABLE=1 make demo\n```\n", "FUSED_RIN_NO_SUCH"),
        ("```shell\nfused-rin train --task no-such-task\n```\n", "refuses"),
        ("```shell\nfor task in digits nothing; do fused-rin train --task $task; done\n```\n", "nothing"),
        ("```shell\nfused-rin train --no-such-option\n```\n", "refuses"),
        ("```shell\npython -m fused_rin.no_such_module\n```\n", "no module"),
        ("```shell\npython -m benchmarks.loop --no-such-option\n```\n", "no-such-option"),
        ("```shell\npython -m pytest tests/no_such_test.py\n```\n", "no_such_test"),
        ('```shell\npip install ".[no-such-extra]"\n```\n', "no-such-extra"),
        ("```shell\nno-such-command\n```\n", "command not found"),
        ("Run\n\n    make no-such-target\n\n", "no target"),
        ("Run\n\n    import torch\n\n", "without its name"),
        ("```\nmake no-such-target\n```\n", "no target"),
        (f"{pages.RUNS}\n```shell\npython -c 'raise SystemExit(1)'\n```\n", "SystemExit"),
    ],
)
def test_a_block_that_is_wrong_is_found(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(text, tmp_path)
    with pytest.raises((AssertionError, ModuleNotFoundError, SybilFailure), match=said):
        example.evaluate()


def test_the_blocks_of_a_page_are_found(tmp_path):
    text = (
        "# Title\n\n    make demo\n\nText:\n\n```python\nx = 1\n\n    \ny = (\n\n    2)\n```\n\n"
        "<!--- invisible-code-block: python\nz = 3\n\n    \n-->\n\n"
        "- a list\n\n    that goes on\n\n```shell\nmake test\n```\n\n    h_t = ReLU(h)\n\nEnd\n"
    )
    found = [str(example.parsed) for example in blocks(text, tmp_path)]
    assert [block.split("\n")[0] for block in found] == ["make demo", "x = 1", "z = 3", "make test", "h_t = ReLU(h)"]


def test_a_block_in_an_unknown_language_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fortran"):
        blocks("```fortran\nend\n```\n", tmp_path)


def test_calls_are_recorded_as_bash_makes_them(tmp_path):
    calls, variables = shell.record(
        'for x in a b; do FUSED_RIN_CUDA=off make $x; done  # why\n.venv/bin/python -m x "y z" {1,2}\n', tmp_path
    )
    assert calls == [["make", "a"], ["make", "b"], ["python", "-m", "x", "y z", "1", "2"]]
    assert variables == {"FUSED_RIN_CUDA"}
