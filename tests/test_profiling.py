"""Profilers see the kernels by name, and FlopCounterMode counts what it counts for torch.nn.RNN."""

import fused_rin
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def ranges(call):
    """(name, shapes of the tensors) of our ranges in a call, in order."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return [(e.name, e.input_shapes) for e in events if e.name.startswith("fused_rin::")]


def test_a_layer_has_ranges_with_shapes():
    rin, x, hx = fused_rin.RIN(3, 8, num_layers=2), torch.randn(20, 4, 3), torch.randn(2, 4, 8)
    expected = ("fused_rin::layer_forward", [[20, 4, 3], [8, 3], [8, 8], [8], [8], [4, 1, 8]])
    second = ("fused_rin::layer_forward", [[20, 4, 8], [8, 8], [8, 8], [8], [8], [4, 1, 8]])
    with torch.no_grad():
        assert ranges(lambda: rin(x, hx)) == [expected, second]
    out, _ = rin(x, hx)
    names = [name for name, _ in ranges(lambda: out.sum().backward())]
    assert names == ["fused_rin::layer_backward"] * 2


def test_steps_have_ranges_with_shapes():
    rin, cell = fused_rin.RIN(3, 8, num_layers=2), fused_rin.RINCell(3, 8)
    with torch.no_grad():
        assert ranges(lambda: rin(torch.randn(1, 1, 3))) == [("fused_rin::step_forward", [[1, 1, 3]])] * 2
        step = ranges(lambda: cell(torch.randn(2, 3), torch.randn(2, 8)))
        assert step == [("fused_rin::step_forward", [[2, 3], [2, 8]])]


@pytest.mark.parametrize("observed", [False, True])
def test_a_sweep_has_one_range_either_way(observed):
    """By the direct way we name it, by the operators torch's dispatcher does."""
    pre, weight = torch.randn(5, 2, 1, 4, requires_grad=True), torch.randn(1, 4, 4)

    def call():
        if observed:
            torch.ops.fused_rin.sweep_forward(pre, weight, None, None, None, None, 1.0, "relu", 0, "auto")
        else:
            fused_rin.recurrence(pre, weight)[0].sum().backward()

    found = ranges(call)
    assert [name for name, _ in found] == ["fused_rin::sweep_forward", "fused_rin::sweep_backward"][
        : 1 + (not observed)
    ]
    assert found[0][1][:2] == [[5, 2, 1, 4], [1, 4, 4]]


def test_ranges_for_other_profilers_than_torchs(monkeypatch):
    """emit_itt hands torch's ranges on, as emit_nvtx does where there is a GPU."""
    seen = []
    enter = fused_rin.profiling._enter
    monkeypatch.setattr(fused_rin.profiling, "_enter", lambda name, *rest: (seen.append(name), enter(name, *rest))[1])
    rin, x = fused_rin.RIN(3, 8), torch.randn(20, 4, 3)
    rin(x)
    assert not seen
    with torch.autograd.profiler.emit_itt():
        rin(x)
    assert seen == ["fused_rin::layer_forward"]


def test_an_error_closes_its_range():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with pytest.raises(RuntimeError, match="out of order") as caught:
            fused_rin.profiling.in_range("test", (), _fail)
        torch.ones(3).add(1)
    assert caught.tb  # alive until here, and with it the frame that holds the range
    (failed,) = (e for e in profiler.events() if e.name == "fused_rin::test")
    (after,) = (e for e in profiler.events() if e.name == "aten::add")
    assert failed.time_range.start <= failed.time_range.end <= after.time_range.start


def _fail():
    raise RuntimeError("out of order")


def counted(module, x, hx=None, back=True):
    with FlopCounterMode(display=False) as counter:
        out, _ = module(x, hx)
        if back:
            (out.data if isinstance(out, nn.utils.rnn.PackedSequence) else out).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_flops_are_those_of_nn_rnn(bidirectional, layers):
    rnn = nn.RNN(5, 6, layers, bidirectional=bidirectional)
    rin = fused_rin.RIN.from_rnn(rnn, skip=0.0)
    x, hx = torch.randn(7, 3, 5), torch.randn(layers * (1 + bidirectional), 3, 6)
    calls = [
        (x,),
        (x, hx, False),
        (x, hx.clone().requires_grad_()),
        (x.clone().requires_grad_(),),
        (x[:1],),
        (x, None, False),
    ]
    for call in calls:
        assert counted(rin, *call) == counted(rnn, *call) > 0
    # A kernel that goes back takes all steps, torch leaves one out whose gradient nobody needs.
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 4, 2]))
    assert counted(rin, packed, None, False) == counted(rnn, packed, None, False)
    steps_more = counted(rin, x, hx) - counted(rnn, x, hx)
    assert steps_more == layers * (1 + bidirectional) * 3 * 2 * 6 * 6
