"""oneDNN's vanilla_rnn primitive, from its packages of headers and library; vanilla_rnn.cpp is built on demand."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.peers import native
from benchmarks.peers.cases import inputs
from benchmarks.peers.protocol import Job, Peer, Run, Tensors, installed

HEADERS, LIBRARY = "onednn-devel-cpu-gomp", "onednn-cpu-gomp"
HEADER, BINARY = "oneapi/dnnl/dnnl.hpp", "libdnnl.so.3"
FIELDS = ("steps", "batch", "inputs", "hidden", "layers", "directions")
FLAGS = ("tanh", "bf16", "training", "state", "batch_first", "threads")
POINTERS = (
    "x", "state", "out", "grad", "input_weights", "weights", "bias",
    "x_grad", "input_weights_grad", "weights_grad", "bias_grad",
)  # fmt: skip


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in (*FIELDS, *FLAGS)]


class Given(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]


def found(package: str, end: str) -> Path | None:
    """The file of an installed package whose path ends so."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).resolve() for file in files if str(file).endswith(end)), None)


@functools.cache
def library() -> ctypes.CDLL:
    """vanilla_rnn.cpp. Raises native.CannotBuild."""
    header, binary = found(HEADERS, HEADER), found(LIBRARY, BINARY)
    if header is None or binary is None:
        raise native.CannotBuild(f"{HEADERS if header is None else LIBRARY} not installed")
    flags = [*native.FLAGS, "-fopenmp", "-fPIC", "-shared", f"-I{header.parents[2]}"]
    flags += [str(binary), f"-Wl,-rpath,{binary.parent}"]
    return ctypes.CDLL(str(native.build(Path(__file__).with_name("vanilla_rnn.cpp"), flags, ".so")))


class OneDNN(Peer):
    name = "oneDNN"
    packages = (LIBRARY,)
    setting = "omp_set_num_threads"

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(1)
        self.threads = threads

    def missing(self) -> str:
        for package, end in ((HEADERS, HEADER), (LIBRARY, BINARY)):
            if found(package, end) is None:
                return f"{package} not installed"
        return "" if native.compiler() else "no C++ compiler"

    def versions(self) -> dict[str, str]:
        numbers = (ctypes.c_int32 * 3)()
        library().rnn_version(numbers)
        return {"oneDNN": ".".join(map(str, numbers)), LIBRARY: installed(LIBRARY)}

    def refuses(self, case: Case) -> str:
        if case.dtype not in ("float32", "bfloat16"):
            return f"no {case.dtype} in vanilla_rnn"
        if case.layout == "packed":
            return "no lengths"
        if case.layers > 1 and (case.directions > 1 or inputs(case) != case.hidden):
            return "several layers only where all have inputs of one size"
        return ""

    def start(self, job: Job) -> Run:
        network = Network(job, self.threads)
        return Run(network.run, network.tensors)


class Network:
    def __init__(self, job: Job, threads: int) -> None:
        case = job.case
        weights = [job.weights(suffix) for suffix, _, _ in job.parts()]
        plain = (case.layers, case.directions)
        w, v = (torch.stack([part[i].t() for part in weights]).contiguous() for i in (0, 1))  # [in, D] each
        state = torch.empty(case.layers * case.directions, case.batch, case.hidden, dtype=job.x.dtype)
        gradients = [torch.zeros(t.shape) for t in (job.x, w, v, torch.stack([part[2] for part in weights]))]
        self.job, self.plain = job, plain
        self.held: dict[str, Tensor | None] = {
            "x": job.x,
            # oneDNN 3.2 without a state to begin with gives the gradient of V a term of a state that was never set, if
            # the layout is tnc and there is one layer and direction; so training has one of zeros.
            "state": torch.zeros_like(state) if job.hx is None and job.training else job.hx,
            "out": torch.empty(job.grad.shape, dtype=job.x.dtype),
            "grad": job.grad.float(),
            "input_weights": w,
            "weights": v,
            "bias": torch.stack([part[2].float() for part in weights]),
        }
        if job.training:
            self.held |= dict(zip(POINTERS[-4:], gradients, strict=True))
        sizes = Sizes(
            case.steps, case.batch, inputs(case), case.hidden, case.layers, case.directions,
            case.activation == "tanh", case.dtype == "bfloat16", job.training, self.held["state"] is not None,
            case.layout == "batch_first", threads,
        )  # fmt: skip
        given = Given(**{name: tensor.data_ptr() for name, tensor in self.held.items() if tensor is not None})
        self.text = ctypes.create_string_buffer(500)
        self.network = ctypes.c_void_p()
        self._run = library().rnn_run
        self._delete = library().rnn_delete
        refused = library().rnn_create(
            ctypes.byref(sizes), ctypes.byref(given), ctypes.byref(self.network), self.text, ctypes.c_int64(500)
        )
        if refused:
            raise RuntimeError(f"oneDNN: {self.text.value.decode()}")

    def run(self) -> None:
        if self._run(self.network, self.text, ctypes.c_int64(500)):
            raise RuntimeError(f"oneDNN: {self.text.value.decode()}")

    def tensors(self, _: object) -> Tensors:
        held = {name: tensor for name, tensor in self.held.items() if tensor is not None}
        found = {"output": held["out"].clone()}
        if self.job.training:
            found["x"] = held["x_grad"].clone()
            for i, (suffix, _, _) in enumerate(self.job.parts()):
                found[f"weight_ih_{suffix}"] = held["input_weights_grad"][i].t().clone()
                found[f"weight_hh_{suffix}"] = self._square(held["weights_grad"][i].t())
                found[f"bias_{suffix}"] = held["bias_grad"][i].clone()
        return found

    def _square(self, grad: Tensor) -> Tensor:
        return self.job.blocks(grad) if self.job.case.heads > 1 else grad.clone()

    def __del__(self) -> None:
        if getattr(self, "network", None):
            self._delete(self.network)
