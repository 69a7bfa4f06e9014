"""Forward and backward sweep against float64, in Triton's interpreter."""

import pytest
import torch
from fused_rin.triton_kernels import Plan
from triton_cases import Case, check_backward, check_forward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def one_program(tile_n: int, split_k: int, tile_k: int, matrix: str) -> Plan:
    """The plan "sliced" with a single slice, for which the barrier is a formality."""
    return Plan("sliced", tile_n, 16, split_k, tile_k, 1, 4, matrix, "ieee", 0, wave=1)


def both(case: Case, plan: Plan | None = None) -> None:
    check_forward(case, plan)
    check_backward(case, plan)


def test_the_backward_oracle_is_autograds() -> None:
    """The loop the other tests compare with, against autograd through the recurrence."""
    everything = {"lengths": True, "resets": True, "num_reversed": 1}
    for options in ({}, {"lengths": True}, {"packed": True, "resets": True}, everything):
        case = Case.build(7, 4, 2, 3, torch.float64, seed=3, activation="tanh", **options)
        case.pre.requires_grad_()
        case.h0.requires_grad_()
        out, h_n = case.reference_forward()
        grad_out, grad_h_n = torch.randn_like(out), torch.randn_like(h_n)
        expected = torch.autograd.grad((out, h_n), (case.pre, case.h0), (grad_out, grad_h_n))
        got = case.reference_backward(out.detach(), grad_out, grad_h_n)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("steps", "batch", "groups", "hidden"),
    [(1, 1, 1, 1), (2, 3, 1, 17), (5, 33, 2, 16), (3, 2, 3, 100), (2, 9, 1, 128)],
)
def test_sizes(steps: int, batch: int, groups: int, hidden: int, dtype: torch.dtype) -> None:
    both(Case.build(steps, batch, groups, hidden, dtype, num_reversed=groups // 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_sequence(dtype: torch.dtype) -> None:
    both(Case.build(257, 2, 1, 17, dtype))


def test_a_16_bit_state_of_256_units_is_one_block() -> None:
    both(Case.build(2, 3, 1, 129, torch.float16))


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("skip", [1.0, 0.0, -0.25])
def test_activations_and_skips(activation: str, skip: float) -> None:
    both(Case.build(9, 3, 2, 17, torch.float32, activation=activation, skip=skip, num_reversed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_reversed", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("resets", [False, True])
def test_lengths_and_resets(dtype: torch.dtype, num_reversed: int, packed: bool, resets: bool) -> None:
    for seed in range(2):
        case = Case.build(
            8, 11, 2, 5, dtype, lengths=not packed, packed=packed, resets=resets, num_reversed=num_reversed, seed=seed
        )
        both(case)


@pytest.mark.parametrize("num_reversed", [0, 2])
def test_resets_alone(num_reversed: int) -> None:
    both(Case.build(8, 5, 2, 7, torch.float32, resets=True, num_reversed=num_reversed))


@pytest.mark.parametrize("plan", [one_program(64, 2, 32, "registers"), one_program(64, 2, 16, "streamed")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sliced_plan_with_one_program(plan: Plan, dtype: torch.dtype) -> None:
    """The sum split over warps, the exchange through memory and, streamed, several chunks of U (43 = 32 + 11)."""
    both(Case.build(4, 18, 2, 43, dtype, num_reversed=1), plan)
    both(Case.build(4, 18, 2, 43, dtype, num_reversed=1, packed=True, resets=True, activation="tanh"), plan)


def test_absent_inputs_are_zeros() -> None:
    case = Case.build(4, 3, 2, 5, torch.float32, h0=False, num_reversed=1)
    check_forward(case)
    check_backward(case, with_out=False)
    check_backward(case, with_state=False)
    check_backward(case, with_out=False, with_state=False)


@pytest.mark.parametrize("sizes", [(0, 3, 2, 5), (4, 0, 2, 5)])
def test_empty_problems(sizes: tuple[int, int, int, int]) -> None:
    both(Case.build(*sizes, torch.float32))


def test_rows_past_a_length_are_neither_read_nor_left_unwritten() -> None:
    case = Case.build(6, 4, 1, 5, torch.float32, lengths=True)
    outside = torch.arange(6)[:, None] >= case.lengths
    case.pre[outside] = float("nan")
    out, h_n = case.kernel_forward()
    assert not out.isnan().any()
    assert not h_n.isnan().any()
    assert (out[outside] == 0).all()
    grad_out = torch.ones_like(out).masked_fill(outside[..., None, None], float("nan"))
    grad_pre, grad_h0 = case.kernel_backward(out, grad_out, None)
    assert not grad_h0.isnan().any()
    assert (grad_pre[outside] == 0).all()


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
def test_nan_comes_through(activation: str) -> None:
    case = Case.build(3, 2, 1, 4, torch.float32, activation=activation)
    case.pre[1, 0, 0, 2] = float("nan")
    check_forward(case)
    out = case.kernel_forward()[0]
    assert out[:, 0, 0].isnan().tolist() == [[False] * 4, [False, False, True, False], [True] * 4]
    assert not out[:, 1].isnan().any()
    check_backward(case)


def test_no_skip_means_no_product_with_it() -> None:
    """With skip = 0 an infinite state meets only U: 0 * inf would make it NaN, in padding too."""
    case = Case.build(4, 1, 1, 2, torch.float32, skip=0.0, activation="none")
    case.weight[:] = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    case.pre[0] = float("inf")
    assert (case.kernel_forward()[0] == float("inf")).all()
    assert (case.kernel_backward(torch.ones_like(case.pre), case.pre.abs(), None)[0][0] == float("inf")).all()


def test_the_state_is_carried_in_float32() -> None:
    """128 additions of 2^-9 to 1: a bfloat16 state would stay at 1."""
    case = Case.build(128, 1, 1, 1, torch.bfloat16, activation="none")
    case.weight.zero_()
    case.pre.fill_(2.0**-9)
    case.h0.fill_(1.0)
    assert case.kernel_forward()[1].item() == 1.25
    grad = case.kernel_backward(case.pre, case.pre, torch.ones_like(case.h0))[1]
    assert grad.item() == 1.25


def test_tanh_is_accurate_everywhere() -> None:
    special = torch.tensor([0.0, 1e-20, -1e-6, 0.625, -0.625, 100.0, -1e30, float("inf"), float("-inf")])
    a = torch.cat([torch.linspace(-12, 12, 3991), special]).reshape(1, 250, 1, 16)
    case = Case(a, torch.zeros(1, 16, 16), None, None, None, None, 0.0, "tanh", 0)
    exact = a.double().tanh()
    error = (case.kernel_forward()[0].double() - exact).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all()


def test_misaligned_inputs() -> None:
    case = Case.build(3, 2, 1, 8, torch.float16)
    storage = torch.empty(case.pre.numel() + 1, dtype=torch.float16)
    case.pre = storage[1:].view_as(case.pre).copy_(case.pre)
    both(case)


def test_results_are_bitwise_the_same() -> None:
    case = Case.build(5, 9, 2, 33, torch.float32)
    first, second = case.kernel_forward(), case.kernel_forward()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_width_that_needs_several_programs_raises_in_the_interpreter() -> None:
    """It runs one program after the other, so programs that wait for each other never would end."""
    with pytest.raises(ValueError, match=r"hidden size of 300 .* use backend"):
        Case.build(1, 1, 1, 300, torch.float32).kernel_forward()
