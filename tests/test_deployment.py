"""Models without this package, and without Python: the operators' C++ library, AOTInductor, core ATen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_rin import RIN, RINCell, library, operator_library, ops, unit_ops
from torch import nn

from tests import warm
from tests.conftest import make_case

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cpp"

needs_library = pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="the stable ABI that the library is built on came with torch 2.10"
)


def _without_the_package(code: str, *arguments: object) -> str:
    """Runs code in a Python that has torch and the operators' library; sys.argv[1:] are the arguments."""
    start = f"import sys, torch; torch.ops.load_library({operator_library()!r})\n"
    end = "\nassert not any(name.startswith('fused_rin') for name in sys.modules)"
    done = subprocess.run(
        [*warm.PYTHON, "-W", "ignore", "-c", start + code + end, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Tagger(nn.Module):
    """Two layers, both directions, heads; and a head of torch's own."""

    def __init__(self, **options):
        super().__init__()
        self.rin = RIN(5, 12, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        out, h_n = self.rin(x)
        return self.head(out), h_n


def _tagger(**options):
    torch.manual_seed(0)
    model = Tagger(**options).eval()
    for name, parameter in model.rin.named_parameters():
        nn.init.normal_(parameter, std=0.3 if "weight" in name else 0.1)
    return model, torch.randn(3, 7, 5)


# ---- the library, in a process without the package


@needs_library
def test_the_library_defines_the_schemas_of_the_package():
    code = "print(*torch._C._jit_get_schemas_for_operator('fused_rin::' + sys.argv[1]))"
    for schema in library.SCHEMAS:
        assert _without_the_package(code, schema.partition("(")[0]).strip() == "fused_rin::" + schema


@needs_library
def test_its_sweeps_are_the_packages_bit_for_bit(tmp_path):
    cases = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for layout in ("full", "lengths", "packed"):
            case = make_case(
                9, 5, 13, 2, dtype=dtype, layout=layout, resets=True, skip=0.7, activation="tanh", num_reversed=1
            )
            out, h_n = ops.sweep_forward(*case.arguments, "cpu")
            grads = torch.randn(out.shape).to(dtype), torch.randn(h_n.shape).to(dtype)
            backward = ops.sweep_backward(*grads, case.weight, out, case.rows, case.rule, "cpu")
            cases.append((case.tensors[:3], tuple(case.rows), tuple(case.rule), (out, h_n), grads, backward))
    joined = make_case(4, 3, 8, 2)  # units in one axis, nothing given
    pre = joined.pre.flatten(2)
    out, h_n = ops.sweep_forward(pre, joined.weight, None, joined.rows, joined.rule, "cpu")
    backward = ops.sweep_backward(None, h_n, joined.weight, out, joined.rows, joined.rule, "cpu")
    cases.append(((pre, joined.weight, None), (None,) * 3, tuple(joined.rule), (out, h_n), (None, h_n), backward))
    torch.save(cases, tmp_path / "cases.pt")
    code = """
forward, backward = torch.ops.fused_rin.sweep_forward, torch.ops.fused_rin.sweep_backward
for (pre, weight, h0), rows, rule, results, gradients, expected in torch.load(sys.argv[1]):
    got = forward(pre, weight, h0, *rows, *rule, "auto")
    assert all(torch.equal(a, b) for a, b in zip(got, results)), (pre.dtype, rows)
    strided = pre.transpose(0, 1).contiguous().transpose(0, 1) if pre.dim() == 4 else pre
    got = forward(strided, weight.mT.contiguous().mT, h0, *rows, *rule, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, results)), (pre.dtype, rows)
    got = backward(*gradients, weight, results[0], *rows, *rule, "auto")
    assert all(torch.equal(a, b) for a, b in zip(got, expected)), (pre.dtype, rows)
    on_meta = [None if t is None else t.to("meta") for t in (pre, weight, h0, *rows)]
    got = forward(*on_meta, *rule, "auto")
    assert [(t.shape, t.device.type) for t in got] == [(t.shape, "meta") for t in results]
print("cases:", len(torch.load(sys.argv[1])))
"""
    assert _without_the_package(code, tmp_path / "cases.pt") == "cases: 13\n"


@needs_library
def test_its_sweeps_of_units_are_the_packages_bit_for_bit(tmp_path):
    cases = []
    for form in ("inside", "outside", "current"):
        for dtype, layout in ((torch.float32, "packed"), (torch.float64, "lengths"), (torch.bfloat16, "full")):
            case = make_case(
                6, 5, 13, 2, dtype=dtype, layout=layout, resets=True, num_reversed=1, form=form,
                activation="softplus", noise=True,
            )  # fmt: skip
            out, h_n, values = unit_ops.sweep_forward(*case.arguments, case.units, "cpu", keep=True)
            saved, gradient = out if values is None else values, torch.randn(out.shape).to(dtype)
            backward = unit_ops.sweep_backward(
                gradient, None, case.weight, saved, case.h0, case.rows, case.rule, case.units, "cpu"
            )
            results, backward = [out, h_n, values], list(backward)
            if form != "outside":  # the third is empty
                results[2] = backward[2] = out.new_empty(0)
            cases.append((case.tensors[:3], tuple(case.rows), tuple(case.units), results, (gradient, saved), backward))
    torch.save(cases, tmp_path / "cases.pt")
    code = """
forward, backward = torch.ops.fused_rin.units_forward, torch.ops.fused_rin.units_backward
for (pre, weight, h0), rows, (form, skip, gain, noise), results, (gradient, saved), expected in torch.load(sys.argv[1]):
    rule = (form, "softplus", 1, "auto")
    got = forward(pre, weight, h0, *rows, skip, gain, noise, *rule)
    assert all(torch.equal(a, b) for a, b in zip(got, results)), (form, pre.dtype)
    got = backward(gradient, None, weight, saved, h0, *rows, skip, gain, *rule)
    assert all(torch.equal(a, b) for a, b in zip(got, expected)), (form, pre.dtype)
    on_meta = [None if t is None else t.to("meta") for t in (pre, weight, h0, *rows, skip, gain, noise)]
    assert [t.shape for t in forward(*on_meta, *rule)] == [t.shape for t in results]
    for words, wrong in (("skip must have shape [2, 13], got [13]", skip[0]), ("skip must have dtype", skip.half())):
        try:
            forward(pre, weight, h0, *rows, wrong, gain, noise, *rule)
        except RuntimeError as error:
            assert words in str(error), str(error)
        else:
            raise AssertionError(words)
print("cases:", len(torch.load(sys.argv[1])))
"""
    assert _without_the_package(code, tmp_path / "cases.pt") == "cases: 9\n"


@needs_library
def test_it_refuses_in_words_what_its_kernels_would_read_or_write_elsewhere():
    code = """
def raises(words, **changes):
    given = dict(pre=torch.zeros(4, 3, 2, 5), weight=torch.zeros(2, 5, 5), h0=None, lengths=None, offsets=None,
                 resets=None, skip=1.0, activation="relu", num_reversed=0, backend="auto")
    try:
        torch.ops.fused_rin.sweep_forward(*{**given, **changes}.values())
    except RuntimeError as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {words}")

freed = torch.zeros(3, 2, 5)
freed.untyped_storage().resize_(0)
long = torch.int64
raises("pre must be float32, float64, bfloat16 or float16, got int64", pre=torch.zeros(4, 3, 2, 5, dtype=long))
raises("pre must have shape [T, B, G, D] or [T, B, G * D] with G = 2 and D = 5, got [4, 3, 2, 6]",
       pre=torch.zeros(4, 3, 2, 6))
raises("got [4]", pre=torch.zeros(4))
raises("weight must have shape [G, D, D], got [2, 5, 4]", weight=torch.zeros(2, 5, 4))
raises("weight must have dtype float32, got float64", weight=torch.zeros(2, 5, 5).double())
raises("h0 must have shape [3, 2, 5], got [3, 2, 4]", h0=torch.zeros(3, 2, 4))
raises("h0 must be on the device of pre", h0=torch.zeros(3, 2, 5, device="meta"))
raises("h0 has no memory", h0=freed)
raises("lengths must have dtype int64", lengths=torch.ones(3))
raises("lengths must have shape [3], got [2]", lengths=torch.ones(2, dtype=long))
raises("resets must have dtype bool, got int64", resets=torch.zeros(4, 3, dtype=long))
raises("resets must have shape [4, 3], got [3, 4]", resets=torch.zeros(3, 4, dtype=torch.bool))
raises("offsets must come with lengths", pre=torch.zeros(4, 2, 5), offsets=torch.tensor([0, 2]))
raises("offsets[1] is 3 and sequence 1 runs in that step, but there are 4 rows", pre=torch.zeros(4, 2, 5),
       offsets=torch.tensor([0, 3]), lengths=torch.tensor([2, 2]))
raises("offsets[0] is -1", pre=torch.zeros(4, 2, 5), offsets=torch.tensor([-1, 2]), lengths=torch.tensor([2, 2]))
raises("activation must be relu, tanh, sigmoid, softplus, leaky_relu or none, got gelu", activation="gelu")
raises("num_reversed must be in [0, 2], got 3", num_reversed=3)
raises("backend triton is not there without Python", backend="triton")

# Sequences in any order are no fault.
lengths, offsets = torch.tensor([1, 3, 2]), torch.tensor([0, 3, 6])
pre, weight = torch.randn(8, 1, 4), torch.zeros(1, 4, 4)
out, h_n = torch.ops.fused_rin.sweep_forward(pre, weight, None, lengths, offsets, None, 0.0, "none", 0, "auto")
assert torch.equal(h_n[:, 0], pre[[0, 7, 5], 0])
"""
    _without_the_package(code)


@needs_library
def test_package_and_library_in_one_process_in_any_order():
    code = """
import torch, fused_rin
weight = torch.zeros(1, 1, 1, requires_grad=True)
out, h_n = torch.ops.fused_rin.sweep_forward(torch.ones(2, 1, 1, 1), weight, None, None, None, None, 1.0, "relu", 0,
                                             "reference")  # which the library alone refuses
assert out.flatten().tolist() == [1.0, 2.0]
out.sum().backward()
assert weight.grad.item() == 1.0
"""
    load = f"import torch; torch.ops.load_library({operator_library()!r})\n"
    for text in (load + code, code + load):
        done = subprocess.run([*warm.PYTHON, "-W", "error", "-c", text], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_operator_library_says_why_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    for device in ("cpu", "cuda"):
        with pytest.raises(RuntimeError, match=rf"the operators for {device} here: it (was not built|needs torch)"):
            operator_library(device)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(RuntimeError, match=r"it needs torch >= 2\.10, .* this is 2\.9\.1"):
        operator_library()
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'mps'"):
        operator_library("mps")


# ---- whole models


@needs_library
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
def test_traced_and_exported_models_run_without_the_package(tmp_path):
    model, x = _tagger(num_heads=2)
    torch.jit.trace(model, x).save(tmp_path / "model.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "call.pt")
    code = """
x, expected = torch.load(sys.argv[1] + "/call.pt")
with torch.no_grad():
    for model in (torch.jit.load(sys.argv[1] + "/model.pt"), torch.export.load(sys.argv[1] + "/model.pt2").module()):
        for got, want in zip(model(x), expected):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
"""
    _without_the_package(code, tmp_path)


@needs_library
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated", "ignore::UserWarning")
def test_a_program_without_python_gives_pythons_numbers(tmp_path):
    build = ["-GNinja", "-DCMAKE_CXX_FLAGS=-O0", f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    tools = Path(sys.executable).parent
    for step in (["-S", EXAMPLE, "-B", tmp_path / "build", *build], ["--build", tmp_path / "build"]):
        done = subprocess.run([tools / "cmake", *step], capture_output=True, text=True)
        if "uses CUDA but I cannot find the CUDA" in " ".join(done.stderr.split()):
            pytest.skip("a torch with CUDA links programs only where CUDA's libraries are: they are not here")
        assert done.returncode == 0, done.stdout + done.stderr
    model, x = _tagger(num_heads=2)
    torch.save(x, tmp_path / "input.pt")
    torch.jit.trace(model, x).save(tmp_path / "model.pt")
    with torch.no_grad():
        expected = model(x)
        torch._inductor.aoti_compile_and_package(
            torch.export.export(model, (x,)), package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )  # fmt: skip
    for name in ("model.pt", "model.pt2"):
        output = tmp_path / f"{name}.output"
        command = [tmp_path / "build" / "run", tmp_path / name, tmp_path / "input.pt", output, "cpu"]
        done = subprocess.run([*command, operator_library()], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for got, want in zip(torch.load(output), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    done = subprocess.run([*command, "/nowhere.so"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "/nowhere.so" in done.stderr


# ---- core ATen


def _targets(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch.compiler.is_exporting came with torch 2.7")
@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore::UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_the_reference_decomposes_into_core_aten(strict):
    options = {"num_layers": 2, "bidirectional": True, "num_heads": 2, "nonlinearity": "tanh", "backend": "reference"}
    x = torch.randn(6, 4, 5)
    calls = [
        (RIN(5, 8, **options), (x, torch.randn(4, 4, 8)), {}),
        (RIN(5, 8, backend="reference"), (x,), {"lengths": torch.tensor([3, 6, 5, 1])}),
        (RINCell(5, 8, backend="reference"), (x[0],), {}),
    ]
    for module, args, kwargs in calls:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        program = torch.export.export(module.eval(), args, kwargs, strict=strict).run_decompositions()
        targets = _targets(program)
        assert targets
        assert all(name.startswith(("aten.", "<built-in function getitem>")) for name in targets), targets
        for got, want in zip(program.module()(*args, **kwargs), module(*args, **kwargs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore::UserWarning")
def test_an_unknown_number_of_steps_stays_one_operator():
    module = RIN(5, 8, backend="reference").eval()
    shapes = {"input": {0: torch.export.Dim("T", min=2, max=100)}}
    program = torch.export.export(module, (torch.randn(6, 4, 5),), dynamic_shapes=shapes).run_decompositions()
    assert "fused_rin.sweep_forward.default" in _targets(program)
    x = torch.randn(9, 4, 5)
    torch.testing.assert_close(program.module()(x)[0], module(x)[0])
