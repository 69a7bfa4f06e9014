"""Processes of Python that need not import torch: `[*warm.PYTHON, "-m", ...]` for `[sys.executable, "-m", ...]`.

`import torch` takes 2 s of a core, torch._dynamo, which comes with the first optimizer, 3 more, and the tests start
some hundred processes. A server that has imported them forks. What it forks runs `-c CODE`, `-m MODULE` or a file as
its __main__. The process that was started imports next to nothing, lends it arguments, environment, folder and streams,
hands on signals, and ends as it ends.

Not for tests of what happens while torch is loaded, nor of the last moments of an interpreter: of the variables that
torch reads then, a fork obeys OMP_NUM_THREADS alone, and what it has imported it does not take apart, a second more.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings

PRELOADED = ("torch", "torch._dynamo", "lightning_fabric", "matplotlib.figure")
LOOKS = 1.0  # seconds after which a server that nobody asks looks whether the tests have ended
LONGEST = 1 << 20  # bytes of a request: more than Linux takes in one message, which it refuses to the sender
HANDED_ON = (signal.SIGINT, signal.SIGTERM)


def command() -> list[str]:
    """Python as it is where there are no file descriptors of processes: outside Linux, before its 5.3."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return [sys.executable]
    folder = tempfile.mkdtemp(prefix="fused-rin-warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [sys.executable, "-S", "-E", __file__, folder, str(os.getpid())]


# ---- in the process that was started


def connect(folder: str, owner: str) -> socket.socket:
    """To the server of this folder, which ends with the owner's process. The first to come starts it, and need not wait
    until it is ready.
    """
    path, asking = f"{folder}/socket", socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with open(f"{folder}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listening.bind(path)
            listening.listen(64)
            environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
            nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            server = [sys.executable, "-E", __file__, "--serve", folder, owner, str(listening.fileno())]
            subprocess.Popen(server, env=environment, pass_fds=[listening.fileno()], start_new_session=True, **nowhere)
        asking.connect(path)
    return asking


def stand_in(folder: str, owner: str, *arguments: str) -> None:
    """Has a fork of the server run, and ends with its exit status or by its signal."""
    connection = connect(folder, owner)
    request = {"arguments": [*arguments], "environment": dict(os.environ), "folder": os.getcwd()}
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until there is somebody to hand them to
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    child = int(connection.recv(64))
    for number in HANDED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    status = os.waitstatus_to_exitcode(int(connection.recv(64)))
    if status < 0:
        with contextlib.suppress(OSError):  # of a signal that cannot be caught
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# ---- in the server


def serve(folder: str, owner: str, listening: socket.socket) -> list[str]:
    """Returns in every process that is forked, with what it has to run."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    listening.settimeout(LOOKS)
    while True:
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            if not os.path.exists(f"/proc/{owner}"):
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)
            continue
        if os.fork() == 0:
            listening.close()
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> list[str]:
    """Forks what was asked for, which returns; tells of its end, or ends it where the other side has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
    child = os.fork()
    if child == 0:
        connection.close()
        request = json.loads(message)
        become(request["environment"], request["folder"], streams)
        return request["arguments"]
    for stream in streams:
        os.close(stream)
    connection.send(str(child).encode())
    ended = os.pidfd_open(child)
    if ended not in select.select([connection, ended], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.send(str(status).encode())
    os._exit(0)


def become(environment: dict[str, str], folder: str, streams: list[int]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = sys.__stdin__ = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))  # empty is as not set
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        raw = open(number, "wb", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
        by_line = number == 2 or os.isatty(number)
        text = io.TextIOWrapper(raw, encoding, errors, line_buffering=by_line, write_through=unbuffered)
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if threads := environment.get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(threads))
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def run(first: str, *rest: str) -> None:
    """As Python's command line does."""
    while first == "-W":
        warnings.simplefilter(rest[0])  # type: ignore[arg-type]
        first, *rest = rest[1:]  # type: ignore[assignment]
    if first == "-c":
        code, *arguments = rest
        sys.argv, sys.path[0] = ["-c", *arguments], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        name, *arguments = rest
        sys.argv, sys.path[0] = [name, *arguments], os.getcwd()
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


def run_to_the_end(arguments: list[str]) -> None:
    """With the exit status that Python would give."""
    status = 0
    try:
        run(*arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            status = 120
            print(f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}", file=sys.stderr)
    os._exit(status)


if __name__ != "__main__":
    PYTHON = command()
elif sys.argv[1] == "--serve":
    run_to_the_end(serve(*sys.argv[2:4], socket.socket(fileno=int(sys.argv[4]))))
else:
    stand_in(*sys.argv[1:])
