"""Engines that run an ONNX model, here one of the operator RNN: ONNX Runtime and OpenVINO; inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.peers.protocol import Job, Peer, Run


def model(job: Job) -> bytes:
    """`feeds` -> y of the caller's layout, weights inside, float32; a node RNN for each layer."""
    from onnx import TensorProto, helper, numpy_helper

    case = job.case
    nodes, constants = [], []

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    first = case.layout == "batch_first"
    value = node("Transpose", ["x"], "time_first", perm=[1, 0, 2]) if first else "x"
    sizes = "" if job.lengths is None else constant("lengths", job.lengths.to(torch.int32))
    for layer in range(case.layers):
        weights = [job.weights(suffix) for suffix, number, _ in job.parts() if number == layer]
        w, v, b = (torch.stack([part[i].float() for part in weights]) for i in range(3))
        names = [constant(f"W{layer}", w), constant(f"R{layer}", v), constant(f"B{layer}", torch.cat([b, b * 0], 1))]
        state = f"h{layer}" if job.hx is not None else ""
        kinds = {"relu": "Relu", "tanh": "Tanh"}
        value = node(
            "RNN", [value, *names, sizes, state], f"states{layer}", hidden_size=case.hidden,
            direction="bidirectional" if case.directions == 2 else "forward",
            activations=[kinds[case.activation]] * case.directions,
        )  # fmt: skip
        if case.directions == 2:  # [T, directions, B, D] -> [T, B, directions * D]
            value = node("Transpose", [value], f"ways{layer}", perm=[0, 2, 1, 3])
            value = node("Reshape", [value, constant(f"size{layer}", torch.tensor([0, 0, -1]))], f"out{layer}")
        else:
            value = node("Squeeze", [value, constant(f"axis{layer}", torch.tensor([1]))], f"out{layer}")
    node("Transpose" if first else "Identity", [value], "y", **({"perm": [1, 0, 2]} if first else {}))
    shapes = {name: value.shape for name, value in feeds(job).items()}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(job.grad.shape))
    graph = helper.make_graph(nodes, "rnn", given, [out], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return made.SerializeToString()


def feeds(job: Job) -> dict[str, Any]:
    """x and, where there are states, h0 of each layer [directions, B, D]; float32 arrays by the inputs' names."""
    values = {"x": job.x}
    if job.hx is not None:
        values |= {f"h{layer}": h for layer, h in enumerate(job.hx.split(job.case.directions))}
    return {name: value.float().numpy() for name, value in values.items()}


class Engine(Peer):
    """For inference, on threads of its own; torch's, which make the inputs, do not wait beside them."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(1)
        self.threads = threads

    def refuses(self, case: Case) -> str:
        return "inference only" if case.mode == "training" else ""


class OnnxRuntime(Engine):
    name = "ONNX Runtime"
    modules = ("onnxruntime", "onnx")
    packages = ("onnxruntime",)
    setting = "SessionOptions.intra_op_num_threads"

    def refuses(self, case: Case) -> str:
        return super().refuses(case) or ("" if case.dtype == "float32" else "the operator RNN is float32 only")

    def start(self, job: Job) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        session = onnxruntime.InferenceSession(model(job), options, providers=["CPUExecutionProvider"])
        given = feeds(job)
        return Run(lambda: session.run(None, given)[0], lambda out: {"output": torch.from_numpy(out)})


class OpenVINO(Engine):
    name = "OpenVINO"
    modules = ("openvino", "onnx")
    packages = ("openvino",)
    setting = "INFERENCE_NUM_THREADS, one stream"

    def refuses(self, case: Case) -> str:
        plugin = "" if case.dtype in PRECISIONS else f"its CPU plugin does not compute in {case.dtype}"
        return super().refuses(case) or plugin

    def start(self, job: Job) -> Run:
        import openvino

        core = openvino.Core()
        config = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISIONS[job.case.dtype],  # it would round to 16 bits by itself
        }
        compiled = core.compile_model(core.read_model(model(job)), "CPU", config)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != PRECISIONS[job.case.dtype]:
            raise RuntimeError(f"OpenVINO computes in {used} here, not in {job.case.dtype}")
        request = compiled.create_infer_request()
        given = feeds(job)  # in and out are float32 in any precision

        def call() -> Any:
            return request.infer(given, share_inputs=True, share_outputs=True)[0]

        return Run(call, lambda out: {"output": torch.from_numpy(out.copy())})


PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
