"""How a problem is told: packed batches unpacked, under tracers and default devices too."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from fused_rin import RIN, load_rnn_state_dict, recurrence
from fused_rin.problem import directions, unpack_batch_sizes
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def test_batch_sizes_unpack_as_every_step_compared_with_every_sequence():
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        steps = int(torch.randint(1, 9, (1,), generator=draw))
        sizes = torch.randint(1, 7, (steps,), generator=draw).sort(descending=True)[0]
        lengths, offsets = unpack_batch_sizes(sizes, torch.empty(int(sizes.sum()), 1))
        assert torch.equal(lengths, (sizes[:, None] > torch.arange(int(sizes[0]))).sum(0))
        assert torch.equal(offsets, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]]))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_long_sequence_among_short_ones_takes_memory_for_its_rows(bidirectional):
    """T * B = 4e6 here, some 8,000 rows: a table of all steps and sequences would be 4 MB a byte."""
    steps, batch = 4000, 1000
    sizes = torch.ones(steps, dtype=torch.int64)
    sizes[:5] = batch
    data = torch.randn(int(sizes.sum()), 2)
    rin = RIN(2, 3, bidirectional=bidirectional)
    out, h_n = rin(PackedSequence(data, sizes))
    with torch.profiler.profile(profile_memory=True) as profile:
        out, h_n = rin(PackedSequence(data, sizes))
        (out.data.sum() + h_n.sum()).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 100 * len(data), largest
    tracemalloc.start()
    rin(PackedSequence(data, sizes))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


class Packing(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        out, h = self.rnn(pack_padded_sequence(x, lengths))
        return pad_packed_sequence(out)[0], h


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_a_trace_of_a_packing_model_serves_other_batches(options):
    net = Packing(RIN.from_rnn(nn.RNN(3, 4, **options))).eval()
    traced = torch.jit.trace(net, (torch.randn(6, 2, 3), torch.tensor([6, 3])))
    for steps, lengths in ((6, [6, 3, 2]), (9, [9]), (4, [4, 4, 1, 1])):
        x = torch.randn(steps, len(lengths), 3)
        for got, want in zip(traced(x, torch.tensor(lengths)), net(x, torch.tensor(lengths)), strict=True):
            torch.testing.assert_close(got, want)


def test_under_a_default_device():
    """Whatever it is: what lies on the CPU is unpacked, checked and converted there."""
    theirs = nn.RNN(3, 4)
    packed = pack_padded_sequence(torch.randn(6, 3, 3), torch.tensor([6, 4, 2]))
    x, ours = torch.randn(6, 3, 3), RIN.from_rnn(theirs)
    pre, weight = torch.randn(6, 3, 1, 4), torch.randn(1, 4, 4)
    fresh = RIN(3, 4, nonlinearity="tanh")

    def run():
        return [
            ours(packed)[0].data,
            ours(x, lengths=[6, 4, 2])[0],
            recurrence(pre, weight, lengths=[6, 0, 2])[0],
            recurrence(packed.data[:, None, :1].expand(-1, 1, 4), weight, batch_sizes=packed.batch_sizes)[0],
            RIN.from_rnn(theirs).weight_hh_l0,
            RIN.from_rnn(theirs).to_rnn().weight_hh_l0,
            ours.skip,
        ]

    expected = run()
    with torch.device("meta"):
        for got, want in zip(run(), expected, strict=True):
            assert got.device.type == "cpu"
            assert torch.equal(got, want)
        load_rnn_state_dict(fresh, theirs.state_dict())
    torch.testing.assert_close(fresh(x)[0], theirs(x)[0])


def test_the_mark_has_one_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert RIN.from_rnn(nn.RNN(2, 3, dtype=torch.float32)).skip.dtype == torch.float32
        assert RIN(2, 3).state_dict()["skip"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_directions():
    assert directions(0, 0) == []
    assert directions(3, 0) == [(None, False)]
    assert directions(3, 3) == [(None, True)]
    assert directions(3, 1) == [(slice(None, 2), False), (slice(2, None), True)]
