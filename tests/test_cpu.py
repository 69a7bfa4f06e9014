"""The CPU sweeps: every instruction set of this machine, against the float64 reference."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from fused_rin import cpu, recurrence
from fused_rin.problem import ALL_ROWS, Rule

from tests import warm
from tests.conftest import check_sweeps, layouts, make_case, name_of, use_threads

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SETS = cpu.instruction_sets()
pytestmark = pytest.mark.usefixtures("poisoned")


def test_every_set_that_the_processor_has_is_built_in():
    """Otherwise the tests below would quietly test less."""
    assert SETS[-1] == "baseline"
    assert ("avx2" in SETS) == torch.cpu._is_avx2_supported()
    assert ("avx512" in SETS) == torch.cpu._is_avx512_supported()
    assert ("avx512_bf16" in SETS) == torch.cpu._is_avx512_bf16_supported()
    assert ("amx" in SETS) == torch.cpu._is_amx_tile_supported()
    if hasattr(torch.cpu, "_is_amx_fp16_supported"):  # not in torch's older releases
        assert ("amx_fp16" in SETS) == torch.cpu._is_amx_fp16_supported()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 15, 17, 64, 100, 129])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 3), (5, 33)])
def test_sizes(isa, dtype, hidden, steps, batch):
    check_sweeps(cpu.forward, cpu.backward, make_case(steps, batch, hidden, dtype=dtype, seed=hidden))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "hidden"), [(1, 129), (3, 17)])
def test_long_sequences(isa, dtype, batch, hidden):
    check_sweeps(cpu.forward, cpu.backward, make_case(257, batch, hidden, dtype=dtype))


@pytest.mark.parametrize("layout", ["full", "lengths"])
def test_a_matrix_beyond_the_cache(isa, layout):
    """Its blocks serve bands of rows, here of 96 and of 7."""
    check_sweeps(cpu.forward, cpu.backward, make_case(3, 103, 600, dtype=torch.float32, layout=layout))


LAYOUTS = layouts((1, 0), (1, 1), (3, 1))


@pytest.mark.parametrize("options", LAYOUTS, ids=name_of)
def test_layouts(isa, options):
    for dtype in (torch.float32, torch.bfloat16):
        check_sweeps(cpu.forward, cpu.backward, make_case(4, 7, 18, dtype=dtype, **options))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("options", LAYOUTS, ids=name_of)
def test_layouts_over_threads(threads, options):
    check_sweeps(cpu.forward, cpu.backward, make_case(5, 9, 18, seed=threads, **options), threads=threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "tanh", "none"])
@pytest.mark.parametrize("skip", [0.0, 1.0, -0.5])
def test_activations_and_skips(isa, dtype, activation, skip):
    check_sweeps(cpu.forward, cpu.backward, make_case(9, 4, 37, dtype=dtype, activation=activation, skip=skip))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("layout", ["full", "lengths"])
@pytest.mark.parametrize("hidden", [400, 517])
@pytest.mark.parametrize("num_reversed", [0, 1])
def test_outputs_shared_by_threads(threads, layout, resets, hidden, num_reversed):
    """The team plan, where threads meet once a step."""
    case = make_case(65, 1, hidden, layout=layout, resets=resets, num_reversed=num_reversed, seed=threads)
    with use_threads(threads):
        assert "share the outputs" in cpu.describe(65, 1, 1, hidden, torch.float32)
    check_sweeps(cpu.forward, cpu.backward, case, threads=threads)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_values_propagate_as_in_the_reference(isa, activation, dtype):
    from fused_rin import reference

    for hidden, batch in ((5, 3), (40, 1), (160, 1)):
        for place in ("pre", "weight", "h0"):
            for value in (float("nan"), float("inf"), -float("inf")):
                for skip in (1.0, 0.0):
                    case = make_case(4, batch, hidden, dtype=dtype, activation=activation, skip=skip)
                    getattr(case, place).view(-1)[-1] = value
                    got = cpu.forward(*case.arguments)
                    want = reference.forward(*case.arguments)
                    for a, b in zip(got, want, strict=True):
                        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_tanh_is_accurate_to_two_last_places(isa):
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.logspace(-30, 0, 2_000), torch.tensor([0.0, -0.0])])
    for dtype, ulps in ((torch.float32, 2), (torch.float64, 2)):
        pre = x.to(dtype).view(1, -1, 1, 1).expand(1, -1, 1, 16).contiguous()
        out, _ = cpu.forward(pre, pre.new_zeros(1, 16, 16), None, ALL_ROWS, Rule(0.0, "tanh"))
        want = torch.tanh(pre.double())
        spacing = torch.finfo(dtype).eps * want.abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((out.double() - want).abs() / spacing).max() <= ulps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_survives_the_conversions(isa, dtype):
    """In and out through float32 (NaN stays NaN), and rounding of float32 states as torch rounds."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1, 1, 16)
    rest = (ALL_ROWS, Rule(0.0, "none"))
    out, _ = cpu.forward(values, values.new_zeros(1, 16, 16), None, *rest)
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(out.nan_to_num(0.0), values.nan_to_num(0.0))
    # h = x / 3 is not a 16-bit number: U = 1/3 I, state x.
    third = (torch.eye(16) / 3).to(dtype)[None]
    zeros = torch.zeros_like(values)
    finite = torch.where(values.isfinite(), values, 0)
    out, _ = cpu.forward(zeros, third, finite[0], *rest)
    want = finite.float() * third[0, 0, 0].float()
    pairs = "pairs of bfloat16" in cpu.describe(1, values.shape[1], 1, 16, dtype)
    if pairs:  # the unit takes subnormal numbers, and leaves them, as zero
        tiny = torch.finfo(dtype).tiny
        want = torch.where((finite.abs() < tiny) | (want.abs() < tiny), 0, want)
    assert torch.equal(out, want.to(dtype))


def test_results_do_not_depend_on_threads_or_repetition(isa):
    for steps, batch, hidden, groups in ((50, 1, 300, 1), (20, 7, 48, 1), (9, 2, 260, 2), (30, 16, 100, 3)):
        case = make_case(steps, batch, hidden, groups, num_reversed=groups // 2)
        results = []
        for threads in (1, 2, 3, 4, 1, 2):
            with use_threads(threads):
                results.append(cpu.forward(*case.arguments))
        assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_streaming_equals_the_whole_sequence_bit_for_bit(isa):
    for batch, hidden in ((1, 64), (1, 200), (5, 50)):
        case = make_case(40, batch, hidden, dtype=torch.float32)
        whole, h_n = cpu.forward(*case.arguments)
        h, outs = case.h0, []
        for t in range(40):
            out, h = cpu.forward(case.pre[t : t + 1], case.weight, h, ALL_ROWS, case.rule)
            outs.append(out)
        assert torch.equal(torch.cat(outs), whole)
        assert torch.equal(h, h_n)


def test_a_row_does_not_depend_on_its_batch(isa):
    case = make_case(11, 13, 70)
    whole, _ = cpu.forward(*case.arguments)
    for first, last in ((0, 2), (3, 9), (11, 13)):
        part, _ = cpu.forward(
            case.pre[:, first:last].contiguous(), case.weight, case.h0[first:last], ALL_ROWS, case.rule
        )
        assert torch.equal(part, whole[:, first:last])


@pytest.mark.parametrize("hidden", [97, 130, 200, 513])
def test_zero_states_are_skipped_without_a_trace(isa, hidden):
    """Half of the states 0: the rows of U that are listed, by eights and what is left of them, in chunks."""
    case = make_case(30, 1, hidden, skip=0.0)
    one, _ = cpu.forward(*case.arguments)
    assert 0.3 < (one == 0).float().mean() < 0.7
    exact, _ = (t for t in cpu.forward(*case.to(torch.float64).arguments))
    torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-5)


def test_empty_batches_and_sequences():
    for steps, batch, groups, hidden in ((0, 2, 1, 3), (3, 0, 1, 3), (3, 2, 1, 0), (3, 2, 0, 4)):
        pre, weight = torch.randn(steps, batch, groups, hidden), torch.randn(groups, hidden, hidden)
        h0 = torch.randn(batch, groups, hidden)
        out, h_n = recurrence(pre, weight, h0)
        assert out.shape == pre.shape
        if steps == 0:
            assert torch.equal(h_n, h0)
            assert torch.equal(recurrence(pre, weight)[1], torch.zeros_like(h0))


def test_the_instruction_set_can_be_chosen_and_is_named():
    for name in SETS:
        with cpu.use_instruction_set(name):
            assert cpu.describe(10, 1, 1, 64, torch.float32).startswith(name)
    with (
        pytest.raises(ValueError, match="'sse9' is not available here; expected one of"),
        cpu.use_instruction_set("sse9"),
    ):
        pass
    environment = {**os.environ, "FUSED_RIN_CPU_ISA": "baseline"}
    code = "import fused_rin; print(fused_rin.explain((4, 1, 64)).plan)"
    done = subprocess.run([*warm.PYTHON, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("baseline")


@pytest.mark.parametrize("hidden", [5, 40, 129])
@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
def test_the_output_may_overwrite_the_input(isa, hidden, layout):
    case = make_case(9, 3, hidden, layout=layout)
    want = cpu.forward(*case.arguments)
    pre = case.pre.clone()
    got = cpu.forward(pre, *case.arguments[1:], out=pre)
    assert got[0] is pre
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
