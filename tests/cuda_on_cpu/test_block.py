"""The `block` sweeps, forward and backward, on CPU fibres: every compiled kernel by the tolerance rule."""

from __future__ import annotations

import ctypes

import pytest
import torch
from fused_rin import cuda, cuda_plan, reference
from fused_rin.cuda_plan import CLUSTER_KERNELS, GRID_KERNELS, KERNELS, MATH, UNIT_KERNELS, Kernel
from fused_rin.problem import ALL_ROWS, Rows, Rule

from tests.conftest import check_sweeps, make_case
from tests.cuda_on_cpu.machine import KernelError, Machine

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {  # the kernel that a feature is tried on, for every element type and way to multiply
    "bf16": (BF16, Kernel("mma", 64, 8, 4, 4, 8, 8)),
    "fp16": (FP16, Kernel("mma", 64, 8, 4, 4, 8, 8)),
    "fp32 fma": (FP32, Kernel("fma", 64, 2, 4, 4, 8, 8)),
    "fp32 tf32x3": (FP32, Kernel("tf32x3", 64, 16, 4, 8, 4, 4)),
}
ACCURATE = [k for k in KERNELS if k.math != "tf32"]
TF32 = [k for k in KERNELS if k.math == "tf32"]


def name(kernel: Kernel) -> str:
    return f"{kernel.math}-{kernel.hidden}x{kernel.rows}"


@pytest.fixture(params=SMALL)
def small(request, force) -> torch.dtype:
    dtype, kernel = SMALL[request.param]
    assert kernel in KERNELS
    force(kernel)
    return dtype


def test_the_planner_knows_what_is_compiled(machine: Machine):
    """cuda_plan mirrors block_configs.h; both directions of every kernel exist, for every type of its math."""
    expected = {
        (
            dtype,
            MATH[k.math],
            backward,
            k.units,
            k.hidden,
            k.rows,
            k.ctas,
            k.threads,
            k.shared_bytes(backward=bool(backward)),
            k.workspace_bytes,
        )
        for k in (*KERNELS, *UNIT_KERNELS, *CLUSTER_KERNELS, *GRID_KERNELS)
        for dtype in ((2, 3) if k.math == "mma" else (0,))
        for backward in (0, 1)
    }
    assert set(machine.instances()) == expected
    assert len(machine.instances()) == len(expected)


@pytest.mark.parametrize("kernel", ACCURATE, ids=name)
@pytest.mark.parametrize("loop", ["relu", "tanh", "general"])
def test_every_kernel(native, force, kernel, loop):
    """Its three loops: the general one at an odd size with a ragged batch tile."""
    force(kernel)
    hidden, batch = (kernel.hidden - 27, kernel.rows + 1) if loop == "general" else (kernel.hidden, kernel.rows)
    for dtype in (BF16, FP16) if kernel.math == "mma" and kernel.hidden <= 128 else (BF16,):
        dtype = dtype if kernel.math == "mma" else FP32
        activation = "tanh" if loop == "tanh" else "relu"
        case = make_case(3, batch, hidden, dtype=dtype, activation=activation, seed=hidden)
        check_sweeps(cuda.forward, cuda.backward, case)
    assert native.kernels == {(MATH[kernel.math], kernel.hidden, kernel.rows, 1)}


def tf32(t: torch.Tensor) -> torch.Tensor:
    """Rounded to TF32 (11 significant bits, ties away from zero), as float64."""
    return ((t.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


@pytest.mark.parametrize("kernel", TF32, ids=name)
def test_tf32_kernels(native, force, kernel):
    """One step from h0, whose only error beyond float32's is the rounding of the product's operands to TF32."""
    force(kernel)
    case = make_case(1, kernel.rows + 1, kernel.hidden - 1, activation="none")
    out, h_n = cuda.forward(*case.arguments)
    rounded = torch.einsum("bgj,gij->bgi", tf32(case.h0), tf32(case.weight)) + case.pre[0] + case.h0.double()
    torch.testing.assert_close(h_n.double(), rounded, rtol=0, atol=2e-6)
    assert torch.equal(out[0], h_n)
    exact = reference.forward(*case.to(torch.float64).arguments)[1]
    assert (h_n.double() - exact).abs().max() > 1e-5, "TF32 was asked for"
    grad = torch.randn_like(out)
    grad_pre, grad_h0 = cuda.backward(grad, None, case.weight, out, ALL_ROWS, case.rule)
    torch.testing.assert_close(grad_pre, grad, rtol=0, atol=0)
    rounded = torch.einsum("bgi,gij->bgj", tf32(grad[0]), tf32(case.weight)) + grad[0].double()
    torch.testing.assert_close(grad_h0.double(), rounded, rtol=0, atol=2e-6)


@pytest.mark.parametrize("hidden", [1, 2, 17, 50])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 3), (9, 5)])
def test_sizes(native, small, hidden, steps, batch):
    check_sweeps(cuda.forward, cuda.backward, make_case(steps, batch, hidden, dtype=small, seed=hidden))


@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("h0", [False, True], ids=["", "h0"])
@pytest.mark.parametrize(("groups", "num_reversed"), [(1, 1), (3, 1)])
def test_layouts(native, small, layout, resets, h0, groups, num_reversed):
    native.seed = 2 * resets + h0
    case = make_case(
        7, 5, 20, groups, dtype=small, layout=layout, h0=h0, resets=resets, num_reversed=num_reversed, seed=3
    )  # fmt: skip
    check_sweeps(cuda.forward, cuda.backward, case)


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("skip", [0.0, 1.0, -0.7])
def test_activations_and_skips(native, small, activation, skip):
    case = make_case(5, 3, 24, 2, dtype=small, activation=activation, skip=skip, num_reversed=1)
    check_sweeps(cuda.forward, cuda.backward, case)


@pytest.mark.parametrize("loop", ["plain", "general"])
def test_tanh_of_every_size(native, small, loop):
    """Within a few roundings of float32, then the type's own: near 0 too, and 1 where exp overflows."""
    sizes = torch.logspace(-9, 4, 2000, dtype=torch.float64)
    inf, nan = float("inf"), float("nan")
    values = torch.cat([sizes, -sizes, torch.tensor([0.0, -0.0, inf, -inf, nan, nan, 0.55, 0.35])]).to(small)
    pre = values.view(1, -1, 1, 8)
    lengths = torch.ones(pre.shape[1], dtype=torch.int64) if loop == "general" else None
    out, _ = cuda.forward(pre, torch.zeros(1, 8, 8, dtype=small), None, Rows(lengths), Rule(0.0, "tanh"))
    exact = pre.double().tanh()
    assert torch.equal(out.isnan(), exact.isnan())
    allowed = 4e-7 * exact.abs() + (exact.abs() * torch.finfo(small).eps / 2 if small != FP32 else 0)
    # Below its smallest normal number float16 rounds to steps of 2^-24.
    assert ((out.double() - exact).abs() <= allowed + (2**-25 if small == FP16 else 0))[~exact.isnan()].all()


@pytest.mark.parametrize("which", ["bf16", "fp16", "fp32 fma"])  # three TF32 products do make NaN of inf
@pytest.mark.parametrize("hidden", [6, 8])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_an_infinite_state_stays_one(native, force, which, hidden, skip):
    """No 0 * inf: neither of the skip that is not there, nor of padding."""
    dtype, kernel = SMALL[which]
    force(kernel)
    case = make_case(4, 3, hidden, dtype=dtype, skip=skip)
    case.pre[1, 1, 0, 2] = float("inf")
    case.weight = case.weight.abs() + 0.125
    out, h_n = cuda.forward(*case.arguments)
    assert torch.equal(out.isinf(), reference.forward(*case.arguments)[0].isinf())
    assert out.isinf().any()
    assert not out.isnan().any()
    assert not h_n.isnan().any()


@pytest.mark.parametrize("seed", range(6))
def test_the_schedule_changes_nothing(native, small, seed):
    """Bit for bit, whichever thread runs first."""
    case = make_case(6, 9, 40, 2, dtype=small, layout="lengths", resets=True, num_reversed=1)
    native.seed = 0
    first = cuda.forward(*case.arguments)
    native.seed = seed + 1
    again = cuda.forward(*case.arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    rest = (case.weight, first[0], case.rows)
    grads = torch.randn_like(first[0]), torch.randn_like(first[1])
    native.seed = 0
    first = cuda.backward(*grads, *rest, case.rule)
    native.seed = seed + 1
    again = cuda.backward(*grads, *rest, case.rule)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_long_sequence(native, small):
    check_sweeps(cuda.forward, cuda.backward, make_case(65, 2, 33, dtype=small))


@pytest.mark.parametrize("steps", range(1, 7))
def test_sequences_shorter_than_what_is_read_ahead(native, small, steps):
    case = make_case(steps, 2, 10, 2, dtype=small, layout="lengths", resets=True, num_reversed=1, seed=steps)
    check_sweeps(cuda.forward, cuda.backward, case)


def test_no_steps(native, small):
    case = make_case(0, 3, 10, dtype=small)
    out, h_n = cuda.forward(*case.arguments)
    assert out.shape == (0, 3, 1, 10)
    assert torch.equal(h_n, case.h0)
    grad_pre, grad_h0 = cuda.backward(None, case.h0, case.weight, out, ALL_ROWS, case.rule)
    assert grad_pre.shape == out.shape
    assert torch.equal(grad_h0, case.h0)


def test_nan_goes_through_relu_and_reaches_every_unit(native, small):
    case = make_case(3, 1, 12, dtype=small)
    case.pre[1, 0, 0, 5] = float("nan")
    out, h_n = cuda.forward(*case.arguments)
    assert out[1].isnan().nonzero().tolist() == [[0, 0, 5]]
    assert h_n.isnan().all()


@pytest.mark.parametrize("which", ["bf16", "fp16", "fp32 fma"])  # splitting an infinity for 3xTF32 makes a NaN
def test_without_a_skip_an_infinite_state_makes_no_nan(native, force, which):
    dtype, kernel = SMALL[which]
    force(kernel)
    case = make_case(2, 1, 8, dtype=dtype, skip=0.0)
    case.weight.fill_(1)
    case.h0.fill_(1)[0, 0, 0] = float("inf")
    out, _ = cuda.forward(*case.arguments)
    assert out.isposinf().all()


def test_unaligned_tensors_are_copied(native, small):
    case = make_case(3, 2, 10, dtype=small)
    case.pre = torch.cat([case.pre.new_zeros(1), case.pre.flatten()])[1:].view_as(case.pre)
    assert case.pre.data_ptr() % (2 * case.pre.element_size())
    check_sweeps(cuda.forward, cuda.backward, case)


def test_an_output_that_is_not_aligned_is_copied(native, small):
    case = make_case(3, 5, 24, dtype=small)
    target = torch.empty(case.pre.numel() + 1, dtype=small)[1:].view(case.pre.shape)
    assert target.data_ptr() % 16
    out, h_n = cuda.forward(*case.arguments, out=target)
    assert out.data_ptr() == target.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip((out, h_n), cuda.forward(*case.arguments), strict=True))


def test_a_lying_size_is_caught_with_coordinates(native, small, monkeypatch):
    """The guard around the tensors is real: told of one row too many, a kernel reads outside and is stopped."""
    case = make_case(4, 2, 10, dtype=small, h0=False)
    monkeypatch.setattr(type(native), "rows_of", staticmethod(lambda steps, batch, *_: steps * batch - 1))
    with pytest.raises(KernelError, match=r"thread \d+ \(warp \d+, lane \d+\): global .* outside every tensor"):
        cuda.forward(*case.arguments)


def test_rows_longer_than_32_bit_offsets_reach_are_refused(native):
    """Within a tile of up to 64 rows, offsets have 32 bits."""
    groups = (1 << 21) + 1
    pre, weight = torch.zeros(1, 1, groups, 8, dtype=BF16), torch.zeros(1, 8, 8, dtype=BF16).expand(groups, 8, 8)
    with pytest.raises(KernelError, match=r"groups x hidden must be at most 2\^24, got 2097153 x 8"):
        cuda.forward(pre, weight, None, ALL_ROWS, Rule())


def test_the_planner_picks_the_kernel_that_runs(native):
    case = make_case(2, 3, 100, dtype=BF16)
    cuda.forward(*case.arguments)
    assert native.kernels == {(MATH["mma"], 128, 8, 1)}
    assert "128 x 128" in cuda_plan.plan(3, 1, 100, BF16, cuda._place(case.pre)[0]).describe()


def test_the_output_may_lie_over_the_input(native, small, monkeypatch):
    """As problem.h promises: the same result when every sweep writes where it reads."""
    case = make_case(6, 5, 24, 2, dtype=small, layout="lengths", resets=True, num_reversed=1)
    apart = cuda.forward(*case.arguments)
    sweep_block = native.sweep_block
    size = case.pre.numel() * case.pre.element_size()

    def in_place(*arguments):
        weight, in_, saved, state_in, out, state_out = arguments[3]
        sweep_block(*arguments[:3], (weight, in_, saved, state_in, in_, state_out), *arguments[4:])
        ctypes.memmove(out, in_, size)

    monkeypatch.setattr(native, "sweep_block", in_place)
    over = cuda.forward(*case.to(small).arguments)
    assert all(torch.equal(a, b) for a, b in zip(apart, over, strict=True))


def test_lengths_out_of_range_are_clamped(native, small):
    """On a GPU nobody has looked at them."""
    case = make_case(4, 3, 10, dtype=small)
    case.lengths = torch.tensor([9, -2, 4])
    out, h_n = cuda.forward(*case.arguments)
    case.lengths = torch.tensor([4, 0, 4])
    expected = cuda.forward(*case.arguments)
    assert torch.equal(out, expected[0])
    assert torch.equal(h_n, expected[1])


@pytest.mark.parametrize("capturing", [False, True])
def test_a_first_launch_inside_a_capture_says_what_to_do(native, monkeypatch, capturing):
    def refused(*arguments):
        raise RuntimeError("CUDA: kernel launch: operation not permitted when stream is capturing")

    monkeypatch.setattr(native, "sweep_block", refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(RuntimeError, match="operation not permitted") as error:
        cuda.forward(*make_case(2, 1, 8, dtype=BF16).arguments)
    assert ("call the model once with these sizes before the capture" in str(error.value)) == capturing
