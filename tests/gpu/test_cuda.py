"""The CUDA backend on a GPU. Nothing here runs without one: tests/cuda_on_cpu runs the same kernels on CPU fibres."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from fused_rin import cuda, cuda_plan, operator_library, parallel_recurrence, recurrence
from fused_rin.device import device_record
from fused_rin.problem import FORMS
from torch import Tensor

from tests.conftest import Case, check_sweeps, make_case
from tests.gpu.moved import on_gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]


def test_the_backend_is_there():
    """So that a build without it is a failure here and not a page of skips."""
    for dtype in DTYPES:
        assert cuda.unavailable_reason(torch.device("cuda"), dtype, 128) is None


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


def check(case: Case, device: torch.device | str = "cuda") -> None:
    check_sweeps(on_gpu(cuda.forward, device), on_gpu(cuda.backward, device), case)


def fits(kernel: cuda_plan.Kernel) -> bool:
    device = device_record(torch.cuda.current_device())
    return kernel.most_shared_bytes <= device.shared_memory_per_block and kernel.runs_on(device)


def force(monkeypatch: pytest.MonkeyPatch, kernel: cuda_plan.Kernel) -> None:
    """As the plan; of a grid with as many tiles at a time as there is room for."""
    places = kernel.places(device_record(torch.cuda.current_device()).sms)
    chosen = cuda_plan.SweepPlan(kernel, "forced", 1, 1, 1, 0.0, 0, places * kernel.workspace_bytes)
    monkeypatch.setattr(cuda_plan, "plan", lambda *a, **k: chosen)


def name(kernel: cuda_plan.Kernel) -> str:
    return f"{kernel.math}-{kernel.hidden}x{kernel.rows}" + (f"-of-{kernel.ctas}" if kernel.ctas > 1 else "")


@pytest.mark.parametrize(
    "kernel",
    [k for k in (*cuda_plan.KERNELS, *cuda_plan.CLUSTER_KERNELS, *cuda_plan.GRID_KERNELS) if k.math != "tf32"],
    ids=name,
)
@pytest.mark.parametrize("loop", ["relu", "tanh", "general"])
def test_every_kernel(monkeypatch, kernel, loop):
    """Its three loops: the general one at an odd size with a ragged batch tile."""
    if not fits(kernel):
        pytest.skip(f"needs {kernel.most_shared_bytes} bytes of shared memory a block and {kernel.ctas} together")
    force(monkeypatch, kernel)
    hidden, batch = (kernel.hidden - 27, kernel.rows + 1) if loop == "general" else (kernel.hidden, kernel.rows)
    activation = "tanh" if loop == "tanh" else "relu"
    for dtype in (BF16, FP16) if kernel.math == "mma" else (FP32,):
        check(make_case(33, batch, hidden, dtype=dtype, activation=activation))


@pytest.mark.parametrize("kernel", [*cuda_plan.CLUSTER_KERNELS, *cuda_plan.GRID_KERNELS], ids=name)
@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_every_kernel_of_shared_tiles(monkeypatch, kernel, layout):
    """More tiles than are resident at a time, resets, both directions; twice the same bits."""
    if not fits(kernel):
        pytest.skip(f"needs {kernel.ctas} blocks together")
    force(monkeypatch, kernel)
    dtype = BF16 if kernel.math == "mma" else FP32
    options = {"layout": layout, "resets": True, "num_reversed": 1}
    tiles = 5 if kernel.grid else 20
    case = make_case(65, tiles * kernel.rows + 1, kernel.hidden - 27, 2, dtype=dtype, **options)
    check(case)
    forward = on_gpu(cuda.forward, "cuda")
    for first, second in zip(forward(*case.arguments), forward(*case.arguments), strict=True):
        assert torch.equal(first, second)


def test_grids_in_a_graph(monkeypatch):
    """Replayed, a grid finds the numbers of its own last run in its workspace: they are cleared each time."""
    kernel = next(k for k in cuda_plan.GRID_KERNELS if k.math == "mma")
    if not fits(kernel):
        pytest.skip(f"needs {kernel.ctas} blocks together")
    force(monkeypatch, kernel)
    case = make_case(3, 2 * kernel.rows, kernel.hidden, dtype=BF16)
    given = [a.cuda() if isinstance(a, torch.Tensor) else a for a in case.arguments]
    expected = cuda.forward(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cuda.forward(*given)
    for _ in range(3):
        for tensor in found:
            tensor.zero_()
        graph.replay()
        for got, right in zip(found, expected, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("kernel", cuda_plan.UNIT_KERNELS, ids=name)
@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_of_units(monkeypatch, kernel, form):
    """Factors of each unit, in every form; in two directions, with noise, resets and an odd size."""
    if not fits(kernel):
        pytest.skip(f"needs {kernel.most_shared_bytes} bytes of shared memory a block")
    force(monkeypatch, kernel)
    for dtype in (BF16, FP16) if kernel.math == "mma" else (FP32,):
        for activation, layout in (("tanh", "full"), ("sigmoid", "lengths"), ("softplus", "packed")):
            options = {"layout": layout, "resets": True, "num_reversed": 1, "noise": True}
            check(
                make_case(
                    33, kernel.rows + 1, kernel.hidden - 27, 2, dtype=dtype, activation=activation, form=form, **options
                )
            )


def test_chunks_of_time():
    """Of a network that forgets: in a 32nd of the steps in turn, the same numbers."""
    torch.manual_seed(0)
    pre = torch.randn(4096, 1, 1, 128, device="cuda", requires_grad=True)
    weight = torch.empty(1, 128, 128, device="cuda").uniform_(-(128**-0.5), 128**-0.5).requires_grad_()
    rule, upstream = {"skip": 0.0, "activation": "tanh"}, torch.randn_like(pre)
    found = []
    for out, _ in (recurrence(pre, weight, **rule), parallel_recurrence(pre, weight, chunks=32, **rule)):
        found.append((out.detach(), *torch.autograd.grad(out, (pre, weight), upstream)))
    for plain, got in zip(*found, strict=True):
        assert (got - plain).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 17, 100, 129])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 33), (257, 3)])
def test_sizes(dtype, hidden, steps, batch):
    check(make_case(steps, batch, hidden, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize(("groups", "num_reversed"), [(1, 0), (3, 1)])
def test_layouts(dtype, layout, resets, groups, num_reversed):
    check(make_case(37, 19, 70, groups, dtype=dtype, layout=layout, resets=resets, num_reversed=num_reversed))


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("skip", [0.0, 1.0, -0.7])
def test_activations_and_skips(activation, skip):
    check(make_case(20, 9, 100, 2, dtype=FP32, activation=activation, skip=skip, num_reversed=1))


def leaves(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    assert case.h0 is not None
    return tuple(t.cuda().requires_grad_() for t in (case.pre, case.weight, case.h0))  # type: ignore[return-value]


def step(pre: Tensor, weight: Tensor, h0: Tensor) -> tuple[Tensor, ...]:
    out, h_n = recurrence(pre, weight, h0, backend="cuda")
    loss = out.float().square().mean() + h_n.float().sum()
    return out, h_n, *torch.autograd.grad(loss, (pre, weight, h0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_for_bit_the_same_from_run_to_run(dtype):
    inputs = leaves(make_case(200, 40, 100, 2, dtype=dtype))
    first = step(*inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(*inputs), strict=True))


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Of `step`: what our kernels made bit for bit; the gradient of U is a product of cuBLAS, which promises that only
    within one stream."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if i == 3:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b), f"output {i}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_capture_and_replay(dtype, monkeypatch):
    """Forward and backward in one CUDA graph, replayed on new inputs."""
    monkeypatch.undo()  # filling with NaN would be captured too
    pre, weight, h0 = leaves(make_case(50, 9, 100, dtype=dtype))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(pre, weight, h0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(pre, weight, h0)
    for seed in range(3):
        other = make_case(50, 9, 100, dtype=dtype, seed=seed + 1)
        with torch.no_grad():
            for tensor, value in zip((pre, weight, h0), (other.pre, other.weight, other.h0), strict=True):
                tensor.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, step(pre, weight, h0))


def test_runs_on_the_current_stream():
    """Behind work on a second stream, and without waiting for the first."""
    inputs = leaves(make_case(100, 8, 64))
    expected = step(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)  # about 0.2 s, far longer than it takes to ask for all that follows
        late = inputs[0].detach() * 2
        got = step(late.div(2).requires_grad_(), *inputs[1:])
        assert not stream.query(), "the sweep waited for its stream on the host"
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_device():
    for dtype in DTYPES:
        check(make_case(20, 5, 100, dtype=dtype), "cuda:1")
    assert torch.cuda.current_device() == 0


def test_more_steps_than_fit_in_16_bits_and_offsets_that_need_64():
    """2.3e9 elements: the second half, started from the first one's last state, must come out the same."""
    steps, batch, hidden = 70_000, 256, 128
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory")
    weight = torch.randn(1, hidden, hidden, device="cuda") * 1e-4
    pre = torch.randn(steps, batch, 1, hidden, device="cuda")
    pre *= 0.01
    out, h_n = recurrence(pre, weight, skip=0.9, backend="cuda")
    half = steps // 2
    again, _ = recurrence(pre[half:], weight, out[half - 1], skip=0.9, backend="cuda")
    assert torch.equal(again, out[half:])
    assert torch.equal(out[-1], h_n)
    assert out.isfinite().all()


def test_what_has_no_plan_says_so():
    pre, weight = torch.zeros(2, 1, 1, 1000, device="cuda"), torch.zeros(1, 1000, 1000, device="cuda")
    with pytest.raises(RuntimeError, match="hidden sizes up to"):
        recurrence(pre, weight, backend="cuda")


@pytest.mark.skipif(torch.__version__ < (2, 10), reason="the stable ABI that the library is built on came with it")
def test_operators_without_the_package_give_the_same_bits(tmp_path):
    """The C++ libraries alone, on sizes with and without padding, on a stream of the caller's."""
    cases = []
    for dtype, hidden in ((BF16, 64), (FP16, 61), (FP32, 128), (FP32, 50), (BF16, 384)):
        case = make_case(9, 5, hidden, 2, dtype=dtype, layout="lengths", resets=True, num_reversed=1).on("cuda")
        out, h_n = cuda.forward(*case.arguments)
        grads = cuda.backward(out, h_n, case.weight, out, case.rows, case.rule)
        cases.append((case.tensors[:3], tuple(case.rows), tuple(case.rule), (out, h_n), grads))
    torch.save(cases, tmp_path / "cases.pt")
    libraries = [operator_library("cpu"), operator_library("cuda")]
    code = """
import sys, torch
for library in sys.argv[2:]: torch.ops.load_library(library)
with torch.cuda.stream(torch.cuda.Stream()):
    for (pre, weight, h0), rows, rule, (out, h_n), expected in torch.load(sys.argv[1]):
        got = torch.ops.fused_rin.sweep_forward(pre, weight, h0, *rows, *rule, "auto")
        got += torch.ops.fused_rin.sweep_backward(out, h_n, weight, out, *rows, *rule, "cuda")
        torch.cuda.current_stream().synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, (out, h_n, *expected))), (pre.dtype, pre.shape)
assert not any(name.startswith("fused_rin") for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cases.pt", *libraries], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
