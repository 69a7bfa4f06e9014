"""The Triton backend on a GPU. Nothing here runs without one: tests/triton_kernels interprets the same kernels."""

from __future__ import annotations

import time

import pytest
import torch
from fused_rin import explain, recurrence, triton_kernels
from fused_rin.problem import ALL_ROWS, FORMS, Rule
from fused_rin.triton_kernels.device import device_record

from tests.conftest import Case, check_sweeps, make_case
from tests.gpu.moved import on_gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Outputs and buffers hold NaN before."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


def check(case: Case, plan: triton_kernels.Plan | None = None) -> None:
    check_sweeps(on_gpu(triton_kernels.forward, plan=plan), on_gpu(triton_kernels.backward, plan=plan), case)


def plan_of(hidden: int, dtype: torch.dtype, precision: str | None = None) -> triton_kernels.Plan:
    return triton_kernels.plan(hidden, dtype, 1, 1, device_record(torch.cuda.current_device()), precision)


def compiled() -> int:
    """How many kernels this process has compiled for the current GPU."""
    from fused_rin.triton_kernels.sweep import sweep

    return len(sweep.device_caches[torch.cuda.current_device()][0])


def test_the_backend_is_there():
    """So that a missing Triton is a failure here and not a page of skips."""
    for dtype in DTYPES:
        assert triton_kernels.unavailable_reason(torch.device("cuda"), dtype, 2048) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 17, 64, 100, 128, 129, 256, 300, 512])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 33), (257, 3)])
def test_sizes(dtype, hidden, steps, batch):
    check(make_case(steps, batch, hidden, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hidden", [70, 600])
def test_units_with_factors_of_their_own(dtype, form, hidden):
    for activation, layout in (("tanh", "full"), ("sigmoid", "lengths"), ("softplus", "packed")):
        options = {"layout": layout, "resets": True, "num_reversed": 1, "noise": True}
        check(make_case(17, 9, hidden, 2, dtype=dtype, activation=activation, form=form, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1000, 1024, 2048])
def test_many_programs_and_a_grid_barrier(dtype, hidden):
    check(make_case(17, 21, hidden, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [70, 320])
@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize(("groups", "num_reversed"), [(1, 0), (3, 1)])
def test_layouts(dtype, hidden, layout, resets, groups, num_reversed):
    check(make_case(13, 19, hidden, groups, dtype=dtype, layout=layout, resets=resets, num_reversed=num_reversed))


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("skip", [0.0, 1.0, -0.7])
def test_activations_and_skips(activation, skip):
    check(make_case(20, 9, 100, 2, activation=activation, skip=skip, num_reversed=1))


@pytest.mark.parametrize("hidden", [64, 200])
def test_float32_without_tensor_cores(hidden):
    check(make_case(9, 5, hidden), plan_of(hidden, torch.float32, "ieee"))


def test_tf32_follows_torchs_setting(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert "tf32 products" in explain((1, 1, 64), device="cuda", backend="triton").plan
        torch.set_float32_matmul_precision("highest")
        assert "tf32x3 products" in explain((1, 1, 64), device="cuda", backend="triton").plan
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("hidden", [128, 1024])
def test_more_tiles_than_run_at_once(hidden):
    """Several waves of cooperative launches, or more blocks than SMs."""
    batch = 16 * 300 if hidden == 128 else 16 * 9
    check(make_case(3, batch, hidden, dtype=torch.bfloat16))


@pytest.mark.parametrize("hidden", [100, 1024])
def test_results_are_bitwise_the_same(hidden):
    case = make_case(50, 40, hidden, dtype=torch.bfloat16)
    arguments = case.on("cuda").arguments
    first = triton_kernels.forward(*arguments)
    for _ in range(10):
        again = triton_kernels.forward(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_than_65535_steps():
    case = make_case(70_000, 1, 16, dtype=torch.bfloat16, skip=0.5)
    out = triton_kernels.forward(*case.on("cuda").arguments)[0]
    tail = case.pre[-100:], case.weight, out[-101].cpu()
    again = triton_kernels.forward(*(t.cuda() for t in tail), ALL_ROWS, case.rule)[0]
    # The state at step T-101 is rounded to bfloat16 when it starts the shorter run; skip = 0.5 forgets that.
    torch.testing.assert_close(again[20:], out[-80:], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("hidden", [48, 1024])
def test_no_compilation_when_batch_or_length_changes(hidden):
    def run(steps, batch):
        case = make_case(steps, batch, hidden, dtype=torch.float16, layout="lengths")
        triton_kernels.forward(*case.on("cuda").arguments)

    run(3, 2)
    before = compiled()
    for steps, batch in ((1, 1), (4, 16), (16, 32), (17, 64), (33, 129)):
        run(steps, batch)
    assert compiled() == before


def test_the_first_call_takes_less_than_3_s(tmp_path, monkeypatch):
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        # No other test compiles this one: float16, tanh, no skip.
        case = make_case(2, 2, 23, dtype=torch.float16)
        arguments = case.on("cuda").arguments[:-1]
        before, start = compiled(), time.perf_counter()
        triton_kernels.forward(*arguments, Rule(0.0, "tanh"))
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    assert compiled() == before + 1
    assert elapsed < 3


@pytest.mark.parametrize("hidden", [64, 1024])
def test_a_cuda_graph_replays_forward_and_backward(hidden):
    """On new inputs: those of the capture are not what is replayed."""
    case = make_case(9, 5, hidden, dtype=torch.bfloat16)
    arguments = case.on("cuda").arguments
    weight = arguments[1]

    def run() -> tuple[torch.Tensor, ...]:
        out, h_n = triton_kernels.forward(*arguments)
        return out, h_n, *triton_kernels.backward(out, h_n, weight, out, *arguments[-2:])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        arguments[0].copy_(make_case(9, 5, hidden, dtype=torch.bfloat16, seed=seed + 1).pre)
        for tensor in captured:
            tensor.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_offsets_that_need_64_bits():
    """2.3e9 elements: the second half, started from the first one's last state, must come out the same."""
    steps, batch, hidden = 70_000, 256, 128
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of free memory")
    rest = (ALL_ROWS, Rule(0.5))
    weight = torch.randn(1, hidden, hidden, device="cuda", dtype=torch.bfloat16) * 1e-3
    pre = torch.randn(steps, batch, 1, hidden, device="cuda", dtype=torch.bfloat16)
    out, h_n = triton_kernels.forward(pre, weight, None, *rest)
    half = steps // 2
    again, _ = triton_kernels.forward(pre[half:], weight, out[half - 1], *rest)
    # Its start is rounded to bfloat16, which a skip of 0.5 forgets.
    assert torch.equal(again[100:], out[half + 100 :])
    assert torch.equal(out[-1], h_n)


def test_another_stream_and_device():
    case = make_case(9, 5, 64)
    arguments = case.on("cuda").arguments
    expected = triton_kernels.forward(*arguments)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = triton_kernels.forward(*arguments)
    torch.cuda.synchronize()
    assert torch.equal(got[0], expected[0])
    if torch.cuda.device_count() > 1:
        other = triton_kernels.forward(*case.on("cuda:1").arguments)
        assert torch.equal(other[0].cpu(), expected[0].cpu())


@pytest.mark.parametrize("hidden", [40, 600])
def test_through_the_public_function_and_compiled(hidden):
    case = make_case(7, 6, hidden)
    leaves = [t.cuda().requires_grad_() for t in (case.pre, case.weight, case.h0)]

    def step(pre, weight, h0, backend="triton"):
        out, h_n = recurrence(pre, weight, h0, skip=1.0, backend=backend)
        return out.square().mean() + h_n.sum()

    expected = torch.autograd.grad(step(*leaves, backend="reference"), leaves)
    for function in (step, torch.compile(step, fullgraph=True)):
        for a, b in zip(torch.autograd.grad(function(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_too_wide_says_so():
    with pytest.raises(ValueError, match=r"hidden size of 100000 .* use backend"):
        plan_of(100_000, torch.float16)
