"""What a shell block of a page would run: bash runs it, with recorders in the place of all commands.

So loops, braces, variables and comments are bash's own affair. `check` then says what of a recorded call is not there:
a target or variable of the Makefile, a command or option of `fused-rin`, a module, a path, an extra.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fused_rin.experiments import cli

from tools import extras

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", MAKEFILE, re.MULTILINE))
FOLDERS = {"benchmarks", "docs", "examples", "tests"}  # paths in them are the repository's, not a command's result

_RECORDER = r"""#!/bin/bash
{ for name in $(compgen -e FUSED_RIN_); do printf 'variable %q\n' "$name"; done
  printf 'call %q' "$(basename "$0")"; printf ' %q' "$@"; printf '\n'; } >> "$RECORD"
"""


class Parsed(Exception):
    """Raised in the place of running a command whose arguments are right."""


def first_word(line: str) -> str:
    """The command of a line, past variables that are set for it."""
    words = [word for word in line.split() if not re.match(r"[A-Z_]+=", word)]
    return words[0] if words else ""


def is_shell(text: str) -> bool:
    """Whether a block without a language is one for a shell."""
    return Path(first_word(text)).name in {*CHECKS, "for"}


def record(text: str, folder: Path) -> tuple[list[list[str]], set[str]]:
    """The calls that a block makes, and the FUSED_RIN_ variables that it sets for them. `folder` is empty."""
    recorders, log = folder / "recorders", folder / "log"
    recorders.mkdir()
    for name in CHECKS:
        (recorders / name).write_text(_RECORDER)
        (recorders / name).chmod(0o755)
    for path in re.findall(r"(?:^|\s)((?:\.?[\w-]+/)+[\w-]+)(?=\s)", text):  # commands by their place
        if Path(path).name in CHECKS and not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(recorders / Path(path).name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSED_RIN_")}
    environment |= {"PATH": f"{recorders}:/usr/bin:/bin", "RECORD": str(log), "EDITOR": "editor"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\nin\n{text}"
    lines = [shlex.split(line) for line in log.read_text().splitlines()]
    return (
        [words[1:] for words in lines if words[0] == "call"],
        {words[1] for words in lines if words[0] == "variable"},
    )


def check(call: list[str]) -> None:
    """AssertionError where a recorded call names what is not there."""
    for word in call[1:]:
        if word.split("/")[0] in FOLDERS and "/" in word:
            assert (ROOT / word).exists(), f"there is no {word}"
    CHECKS[call[0]](call[1:])


def check_variable(name: str) -> None:
    """AssertionError for a FUSED_RIN_ variable that nothing reads."""
    for folder in ("python", "csrc", "triton_kernels", "cmake", "tools"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cmake") and name in path.read_text():
                return
    assert any(name in (ROOT / file).read_text() for file in ("setup.py", "CMakeLists.txt", "Makefile")), name


def _make(words: list[str]) -> None:
    assert words, "make without a target"
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            assert re.search(rf"\$\([^)]*\b{name}\b", MAKEFILE), f"the Makefile has no variable {name}"
        else:
            assert word in TARGETS, f"the Makefile has no target {word}"


def _fused_rin(words: list[str]) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self, *args, **kwargs):
        options = parse(self, *args, **kwargs)
        if options.run is cli._train and options.resume is None:
            return options  # its settings are checked before there is a run
        raise Parsed

    def no_run(*args, **kwargs):
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        patch.setattr(cli.Run, "new", no_run)
        try:
            cli.main(words)
        except Parsed:
            pass
        except SystemExit as error:
            if error.code:  # 0: --help, --version
                raise AssertionError(f"fused-rin refuses {words}") from error


def _python(words: list[str]) -> None:
    if words[:1] == ["-c"]:
        compile(words[1], "python -c", "exec")
        return
    if words[:1] != ["-m"]:
        assert (ROOT / words[0]).is_file(), words
        return
    name, options = words[1], words[2:]
    if name == "fused_rin.experiments":
        return _fused_rin(options)
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"there is no module {name}"
    if ROOT in Path(spec.origin or "").parents:
        texts = "".join(path.read_text() for path in Path(spec.origin or "").parent.glob("*.py"))
        assert all(f'"{word}"' in texts for word in options if word.startswith("--")), options


def _torchrun(words: list[str]) -> None:
    _python(words[words.index("-m") :])


def _pip(words: list[str]) -> None:
    assert words[0] == "install", words
    for word in words[1:]:
        for extra in re.findall(r"(?:\.|fused-rin)\[([\w,-]+)\]", word):
            assert set(extra.split(",")) <= set(extras.extras), extra


def _cmake(words: list[str]) -> None:
    if "-S" in words:
        assert (ROOT / words[words.index("-S") + 1] / "CMakeLists.txt").is_file(), words


def _anything(words: list[str]) -> None:
    """What is no command of the project."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": _make,
    "fused-rin": _fused_rin,
    "python": _python,
    "python3": _python,
    "torchrun": _torchrun,
    "pip": _pip,
    "cmake": _cmake,
    "run": _anything,  # examples/cpp, built
    "editor": _anything,
}
