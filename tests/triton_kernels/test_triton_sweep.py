"""Forward and backward sweep against the float64 reference, in Triton's interpreter."""

from functools import partial

import pytest
import torch
from fused_rin import reference, triton_kernels
from fused_rin.problem import ACTIVATIONS, FORMS
from fused_rin.triton_kernels import Plan, backward, forward

from tests.conftest import Case, check_sweeps, make_case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(case: Case, plan: Plan | None = None) -> None:
    check_sweeps(partial(forward, plan=plan), partial(backward, plan=plan), case)


def run_forward(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(*case.arguments)


def run_backward(case: Case, out: torch.Tensor, grad_out, grad_h_n) -> tuple[torch.Tensor, torch.Tensor]:
    return backward(grad_out, grad_h_n, case.weight, out, case.rows, case.rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("steps", "batch", "groups", "hidden"),
    [(1, 1, 1, 1), (2, 3, 1, 17), (3, 33, 1, 16), (3, 2, 3, 100), (2, 9, 1, 128)],
)
def test_sizes(steps: int, batch: int, groups: int, hidden: int, dtype: torch.dtype) -> None:
    check(make_case(steps, batch, hidden, groups, dtype=dtype, num_reversed=groups // 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_sequence(dtype: torch.dtype) -> None:
    check(make_case(65, 2, 17, dtype=dtype))


def test_a_16_bit_state_of_256_units_is_one_block() -> None:
    check(make_case(2, 3, 129, dtype=torch.float16))


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("skip", [1.0, 0.0, -0.25])
def test_activations_and_skips(activation: str, skip: float) -> None:
    check(make_case(9, 3, 17, 2, activation=activation, skip=skip, num_reversed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_reversed", [0, 1, 2])
@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
@pytest.mark.parametrize("resets", [False, True])
def test_lengths_and_resets(dtype: torch.dtype, num_reversed: int, layout: str, resets: bool) -> None:
    check(make_case(8, 5, 5, 2, dtype=dtype, layout=layout, resets=resets, num_reversed=num_reversed))


def one_program(tile_k: int, matrix: str) -> Plan:
    """The plan "sliced" with a single slice, for which the barrier is a formality."""
    return Plan("sliced", 64, 16, 2, tile_k, 1, 4, matrix, "ieee", 0, wave=1)


@pytest.mark.parametrize(
    "plan", [one_program(32, "registers"), one_program(16, "streamed")], ids=["on chip", "streamed"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sliced_plan_with_one_program(plan: Plan, dtype: torch.dtype) -> None:
    """The sum split over warps, the exchange through memory and, streamed, several chunks of U (43 = 32 + 11)."""
    check(make_case(4, 18, 43, 2, dtype=dtype, num_reversed=1), plan)
    check(make_case(4, 3, 43, 2, dtype=dtype, num_reversed=1, layout="packed", resets=True, activation="tanh"), plan)


def test_absent_inputs_are_zeros() -> None:
    case = make_case(4, 3, 5, 2, h0=False, num_reversed=1)
    check(case)
    for grad in run_backward(case, run_forward(case)[0], None, None):
        assert (grad == 0).all()


@pytest.mark.parametrize("sizes", [(0, 3), (4, 0)])
def test_empty_problems(sizes: tuple[int, int]) -> None:
    check(make_case(*sizes, 5, 2))


def test_rows_past_a_length_are_neither_read_nor_left_unwritten() -> None:
    case = make_case(6, 4, 5, layout="lengths")
    outside = torch.arange(6)[:, None] >= case.lengths
    assert outside.any()
    case.pre[outside] = float("nan")
    out, h_n = run_forward(case)
    assert not out.isnan().any()
    assert not h_n.isnan().any()
    assert (out[outside] == 0).all()
    grad_out = torch.ones_like(out).masked_fill(outside[..., None, None], float("nan"))
    grad_pre, grad_h0 = run_backward(case, out, grad_out, None)
    assert not grad_h0.isnan().any()
    assert (grad_pre[outside] == 0).all()


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
def test_nan_comes_through(activation: str) -> None:
    case = make_case(3, 2, 4, activation=activation)
    case.pre[1, 0, 0, 2] = float("nan")
    out = run_forward(case)[0]
    assert out[:, 0, 0].isnan().tolist() == [[False] * 4, [False, False, True, False], [True] * 4]
    assert not out[:, 1].isnan().any()
    # A NaN output is not an inactive unit: relu's gradient goes through it, as in torch.
    got = run_backward(case, out, torch.ones_like(out), None)
    expected = reference.backward(torch.ones_like(out), None, case.weight, out, case.rows, case.rule)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_no_skip_means_no_product_with_it() -> None:
    """With skip = 0 an infinite state meets only U: 0 * inf would make it NaN, in padding too."""
    case = make_case(4, 1, 2, skip=0.0, activation="none")
    case.weight.fill_(1.0)
    case.pre[0] = float("inf")
    out = run_forward(case)[0]
    assert (out == float("inf")).all()
    assert (run_backward(case, out, torch.full_like(out, float("inf")), None)[0] == float("inf")).all()


def test_the_state_is_carried_in_float32() -> None:
    """128 additions of 2^-9 to 1: a bfloat16 state would stay at 1."""
    case = make_case(128, 1, 1, dtype=torch.bfloat16, activation="none")
    case.weight.zero_()
    case.pre.fill_(2.0**-9)
    case.h0.fill_(1.0)
    assert run_forward(case)[1].item() == 1.25
    assert run_backward(case, case.pre, case.pre, torch.ones_like(case.h0))[1].item() == 1.25


def test_tanh_is_accurate_everywhere() -> None:
    special = torch.tensor([0.0, 1e-20, -1e-6, 0.625, -0.625, 100.0, -1e30, float("inf"), float("-inf")])
    a = torch.cat([torch.linspace(-12, 12, 3991), special]).reshape(1, 250, 1, 16)
    case = Case(a, torch.zeros(1, 16, 16), None, None, None, None, 0.0, "tanh", 0)
    exact = a.double().tanh()
    error = (run_forward(case)[0].double() - exact).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all()


def test_misaligned_inputs() -> None:
    case = make_case(3, 2, 8, dtype=torch.float16)
    storage = torch.zeros(case.pre.numel() + 1, dtype=torch.float16)
    case.pre = storage[1:].view_as(case.pre).copy_(case.pre)
    check(case)


def test_results_are_bitwise_the_same() -> None:
    case = make_case(5, 9, 33, 2)
    assert all(torch.equal(a, b) for a, b in zip(run_forward(case), run_forward(case), strict=True))


def test_a_width_that_needs_several_programs_raises_in_the_interpreter() -> None:
    """It runs one program after the other, so programs that wait for each other never would end."""
    with pytest.raises(ValueError, match=r"hidden size of 300 .* use backend"):
        run_forward(make_case(1, 1, 300))
    assert "hidden size of 300" in triton_kernels.unavailable_reason(torch.device("cpu"), torch.float32, 300)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_units_with_factors_of_their_own(form: str, activation: str) -> None:
    check(make_case(5, 3, 17, 2, activation=activation, form=form, num_reversed=1, noise=True))
    check(make_case(3, 3, 17, dtype=torch.bfloat16, activation=activation, form=form, h0=False))


@pytest.mark.parametrize("num_reversed", [0, 1])
@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_units_in_all_layouts(form: str, layout: str, num_reversed: int) -> None:
    """With softplus, which is not 0 where a state is."""
    check(
        make_case(
            6, 5, 5, layout=layout, resets=True, num_reversed=num_reversed, form=form, activation="softplus", noise=True
        )
    )


@pytest.mark.parametrize("form", FORMS)
def test_units_in_the_sliced_plan(form: str) -> None:
    case = make_case(4, 3, 43, 2, num_reversed=1, resets=True, form=form, activation="sigmoid", noise=True)
    for tile_k, matrix in ((32, "registers"), (16, "streamed")):
        check(case, one_program(tile_k, matrix))
