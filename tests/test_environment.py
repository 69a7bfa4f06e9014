"""Which torch `make` works with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import environment

PINNED = "# why\ntorch==2.13.0\ntriton==3.9.0\n"
FOLDER = Path("env")


@pytest.mark.parametrize("have", ["2.6.0", "2.11.0+cu130", "3.0"])
def test_a_torch_that_is_there_is_used_and_kept(have):
    commands, constraints, text = environment.plan(FOLDER, "", have, PINNED)
    assert commands == [[sys.executable, "-m", "venv", "env", "--system-site-packages"]]
    assert constraints == f"# why\ntorch=={have}\ntriton==3.9.0\n"
    assert have in text


@pytest.mark.parametrize("have", [None, "2.5.1", "1.13.0", "odd"])
def test_without_one_the_pinned_is_installed_and_what_comes_is_said(have):
    commands, constraints, text = environment.plan(FOLDER, "", have, PINNED)
    assert commands[0] == [sys.executable, "-m", "venv", "env"]
    assert commands[1][1:] == ["-m", "pip", "install", "-q", "torch==2.13.0"]
    assert constraints == PINNED
    if sys.platform == "linux":
        assert ("3 GB" in text) == ("TORCH_INDEX=" in text)


def test_an_index_that_is_named_is_asked_even_if_there_is_a_torch():
    commands, _, text = environment.plan(FOLDER, "https://example.org/cpu", "2.9.0", PINNED)
    assert commands[1][-3:] == ["--index-url", "https://example.org/cpu", "torch==2.13.0"]
    assert "3 GB" not in text


def test_torchs_own_triton_takes_the_place_of_the_pinned():
    """pip finds no solution for two of them, and takes long to say so."""
    several = 'torch==2.13.0\ntriton==3.9.0; python_version >= "3.11"\ntriton==3.8.0; python_version < "3.11"\n'
    own = 'triton==3.7.1; platform_system == "Linux" and python_version < "3.15"'
    required = ["filelock", own, "tritonclient", 'triton==1.0; extra == "old"']
    assert environment.with_triton_of(required, several) == f"torch==2.13.0\n{own}\n"
    for without in ([], ["filelock", "tritonclient", 'triton==1.0; extra == "old"']):  # as builds for CPUs have it
        assert environment.with_triton_of(without, several) == several


def test_an_environment_sees_the_callers_torch_and_leaves_it(tmp_path):
    """With a torch of no more than its metadata, found by way of a folder on the calling Python's path."""
    folder = tmp_path / "env"
    about = tmp_path / "packages" / "torch-2.99.0.dist-info"
    about.mkdir(parents=True)
    required = "Requires-Dist: filelock\nRequires-Dist: triton==9.9.9\n"
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0\n{required}")
    done = subprocess.run(
        [sys.executable, environment.__file__, folder],
        env={"PYTHONPATH": str(about.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "torch 2.99.0 of" in done.stdout
    assert "include-system-site-packages = true" in (folder / "pyvenv.cfg").read_text()
    constraints = (folder / "constraints.txt").read_text()
    assert "\ntorch==2.99.0\n" in constraints
    assert re.findall("^triton.*$", constraints, re.MULTILINE) == ["triton==9.9.9"]
    if sys.prefix != sys.base_prefix:  # packages of an environment are not the system's
        seen = subprocess.run(
            [folder / "bin" / "python", "-c", "import pytest; print(pytest.__file__)"], capture_output=True
        )
        assert seen.stdout.decode().strip() == pytest.__file__
