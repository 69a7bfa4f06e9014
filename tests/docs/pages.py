"""The blocks of code of a page, as Sybil's examples.

```python   runs, all of a page in one namespace; with >>> its output has to be the one shown
```shell    is checked (shell.py): what it names has to be there; behind <!--- runs --> it runs as well
no language, or indented: a shell block where it begins with a command, otherwise text; it must not be Python

<!--- invisible-code-block: python ... --> prepares what a page takes for granted. <!--- skip: next "why" --> leaves a
block out, which test_pages.py counts.
"""

from __future__ import annotations

import ast
import doctest
import os
import re
import shlex
import subprocess
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

import fused_rin
from sybil import Document, Example, Region
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from tests import warm

from . import shell

TEXTS = {"text", "cpp", "json", "toml", "yaml", "diff"}  # languages that are not run
RUNS = "<!--- runs -->"
PACKAGE = Path(fused_rin.__file__).resolve().parents[1]
_FENCES = RawFencedCodeBlockLexer(re.compile(r"[ \t]*(?P<language>[^\n]*)\n"))
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}[^\n]*\n|[ \t]*\n)+)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def parse(path: Path) -> Document:
    """A page with its examples. ValueError for a block in a language that nothing is known of."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return Document.parse(str(path), PythonCodeBlockParser(doctest_optionflags=flags), SkipParser(), _others)


def _others(document: Document) -> Iterable[Region]:
    """All blocks but Python's."""
    text = document.text
    for fence in _FENCES(document):
        language = fence.lexemes["language"].strip()
        if language == "shell":
            yield Region(fence.start, fence.end, str(fence.lexemes["source"]), run_shell)
        elif not language:
            yield Region(fence.start, fence.end, str(fence.lexemes["source"]), run_unlabelled)
        elif language != "python" and language not in TEXTS:
            raise ValueError(f"{document.path}: a block in {language!r}; known are python, shell, {sorted(TEXTS)}")
        text = _masked(text, fence.start, fence.end)
    for comment in _COMMENT.finditer(text):
        text = _masked(text, *comment.span())
    for block in _INDENTED.finditer(text):
        before = text[: block.start()].rstrip().rsplit("\n", 1)[-1]
        if block[1].strip() and not re.match(r"\s*(?:[-*+]|\d+\.) |  ", before):  # not what goes on in a list
            yield Region(block.start(), block.end(), textwrap.dedent(block[1]), run_unlabelled)


def _masked(text: str, start: int, end: int) -> str:
    return text[:start] + re.sub(r"[^\n]", "x", text[start:end]) + text[end:]


def run_unlabelled(example: Example) -> None:
    text = example.parsed
    if shell.is_shell(text):
        return run_shell(example)
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    code = (ast.Import, ast.ImportFrom, ast.Call, ast.With, ast.FunctionDef)
    assert not any(isinstance(node, code) for node in ast.walk(tree)), f"Python without its name:\n{text}"


def run_shell(example: Example) -> None:
    text = example.parsed
    with tempfile.TemporaryDirectory() as folder:
        calls, variables = shell.record(text, Path(folder))
    assert calls, f"no command is known in\n{text}"
    for call in calls:
        shell.check(call)
    for variable in variables:
        shell.check_variable(variable)
    if example.document.text[: example.start].rstrip().endswith(RUNS):
        _run(text)


def _run(text: str) -> None:
    """For real, in the current folder, with this Python and this package."""
    with tempfile.TemporaryDirectory() as folder:
        for name, words in (("python", ""), ("fused-rin", "-m fused_rin.experiments")):
            (Path(folder) / name).write_text(f'#!/bin/sh\nexec {shlex.join(warm.PYTHON)} {words} "$@"\n')
            (Path(folder) / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE), environment.get("PYTHONPATH", "")])
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nin\n{text}"
