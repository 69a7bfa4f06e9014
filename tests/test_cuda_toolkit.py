"""Which nvcc is taken, and what becomes of one that does not work: by programs that behave as it would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import cuda_toolkit
from tools.cuda_toolkit import Refused, choose

WORKS = "echo 'Cuda compilation tools, release 13.0, V13.0.48'"
BROKEN = {
    "exits": (
        "echo 'no licence: error 7' >&2; exit 1",
        "--version ended with exit code 1 and said: no licence: error 7",
    ),
    "says nothing": ("exit 1", "--version ended with exit code 1 and said: nothing"),
    "is another program": ("echo hello", "--version names no release: hello"),
    "is too old": ("echo 'release 11.8, V11.8.89'", "it is of CUDA 11.8, CUDA 12.3 or later is needed"),
    "has no host compiler": (
        f"{WORKS}; [ $1 = --version ] || {{ echo 'In x' >&2; echo 'gcc: No such file or directory' >&2; exit 1; }}",
        "compiling a small program ended with exit code 1 and said: gcc: No such file or directory",
    ),
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    for name in ("FUSED_RIN_CUDA", "FUSED_RIN_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_toolkit, "_of_this_machine", lambda: ())


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("how", BROKEN)
def test_one_that_does_not_work_is_a_warning_or_an_error(tmp_path, how):
    script, reason = BROKEN[how]
    nvcc = program(tmp_path / "nvcc", script)
    env = {"CUDACXX": str(nvcc)}
    choice = choose("auto", environment=env)
    assert choice.nvcc is None
    first, second, third = choice.warning.splitlines()
    assert first == "warning: the CUDA part is not built, the rest is"
    assert second == f"{nvcc} does not work: {reason}"
    assert "FUSED_RIN_CUDA=off" in third
    with pytest.raises(Refused) as error:
        choose("on", environment=env)
    assert str(error.value) == f"FUSED_RIN_CUDA=on, but {nvcc} does not work: {reason}"
    assert choose("off", environment=env) == (None, None, (), "")


def test_one_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "SECONDS", 0.2)
    nvcc = program(tmp_path / "nvcc", "exec sleep 60")
    assert "--version did not end within 0.2 seconds" in choose("auto", environment={"CUDACXX": str(nvcc)}).warning


def test_the_trial_has_what_the_build_asks_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDAHOSTCXX", "/opt/g++-9")
    nvcc = program(tmp_path / "nvcc", f'{WORKS}; echo "$@" >> {tmp_path}/asked')
    for archs in ("90a,80", "all"):
        assert choose("on", archs, {"CUDACXX": str(nvcc)})[:2] == (str(nvcc), (13, 0))
    two, six = [line for line in (tmp_path / "asked").read_text().splitlines() if "trial.cu" in line]
    host = "-ccbin /opt/g++-9"
    codes = "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a"
    assert two.startswith(f"-std=c++17 --no-compress {codes} {host} ")
    assert six.count("-gencode") == 6
    assert "--compress-mode=size" in six
    rules = (Path(cuda_toolkit.__file__).parents[1] / "cmake/cuda.cmake").read_text()
    assert "--no-compress" in rules
    assert "--compress-mode=size" in rules


def test_the_named_one_comes_first_and_alone(tmp_path):
    places = {name: program(tmp_path / name / "bin/nvcc", WORKS) for name in ("cxx", "home", "path", "front")}
    env = {
        "CUDACXX": str(places["cxx"]),
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path"),
        "PATH": str(tmp_path / "front/bin"),
    }
    for name in ("cxx", "home", "path"):
        assert cuda_toolkit.find(env) == str(places[name])
        env.pop({"cxx": "CUDACXX", "home": "CUDA_HOME", "path": "CUDA_PATH"}[name])
    assert cuda_toolkit.find(env) == str(places["front"])
    warning = choose("auto", environment={**env, "CUDACXX": "/no/nvcc"}).warning
    assert "/no/nvcc does not work: --version cannot be run (No such file or directory)" in warning


def test_without_any_nothing_is_said_unless_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "find", lambda _: None)
    assert choose("auto") == (None, None, (), "")
    with pytest.raises(Refused, match="FUSED_RIN_CUDA=on, but there is no nvcc; set CUDA_HOME"):
        choose("on")


@pytest.mark.parametrize("value", ["maybe", "yes", "1"])
def test_values_of_the_choice(value):
    with pytest.raises(Refused, match=f"^FUSED_RIN_CUDA must be auto, on or off, got '{value}'$"):
        choose(value)
    assert choose("OFF").nvcc is None
    assert choose("", "") == choose()


@pytest.mark.parametrize("value", ["8.0", "75", "80;sm_90", "80x", "80;;90a", "ALL"])
def test_values_of_the_architectures(value):
    for cuda in ("auto", "off"):
        with pytest.raises(Refused, match=f"FUSED_RIN_CUDA_ARCHS must be auto, all or a list .* got '{value}'$"):
            choose(cuda, value)
    assert cuda_toolkit.architectures("120;90a, 80;100f") == ("80", "90a", "100f", "120")


def test_the_gpus_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    nvcc = str(program(tmp_path / "nvcc", WORKS))
    smi = tmp_path / "nvidia-smi"
    for says, expected in ((r"9.0\n8.6\n9.0", ("86", "90a")), (r"7.5\n12.0", ("120",))):
        program(smi, f"printf '{says}\\n'")
        assert choose("on", environment={"CUDACXX": nvcc}).architectures == expected
    program(smi, "exit 6")
    assert choose("on", environment={"CUDACXX": nvcc}).architectures == ("80", "90a")
    program(smi, "echo 7.5")
    old = "the GPU of this machine is of compute capability 75, the kernels need 80 or later"
    choice = choose("auto", environment={"CUDACXX": nvcc})
    assert choice.nvcc is None
    assert choice.warning.splitlines()[1].startswith(old)
    with pytest.raises(Refused, match=f"FUSED_RIN_CUDA=on, but {old}"):
        choose("on", environment={"CUDACXX": nvcc})
    assert choose("on", "80", {"CUDACXX": nvcc}).architectures == ("80",)


def test_the_command_that_cmake_and_make_call(tmp_path):
    nvcc = program(tmp_path / "nvcc", "exit 3")

    def run(*arguments, **env):
        command = [sys.executable, cuda_toolkit.__file__, *arguments]
        return subprocess.run(command, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True)

    done = run("--archs=80", CUDACXX=str(nvcc))
    assert (done.returncode, done.stdout) == (0, "\n\n")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["fused-rin"] * 3
    done = run("--cuda=on", "--archs=80", CUDACXX=str(nvcc))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"fused-rin: FUSED_RIN_CUDA=on, but {nvcc} does not work")
    done = run("--archs=90a;80", f"--nvcc={nvcc}")  # tried before
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{nvcc}\n80;90a\n", "")
