"""The model of a step (benchmarks/gpu/predict.py) on code whose cycles can be counted by hand."""

from __future__ import annotations

import pytest

from benchmarks.gpu.predict import (
    BARRIER,
    LOAD_LATENCIES,
    OTHER_LATENCY,
    SHARED_LATENCY,
    WARPGROUP_MMA,
    Scheduler,
)
from benchmarks.gpu.sass import NO_BOARD, Instruction, functions, longest_loop, loops


def line(text: str, stall: int = 1, writes: int = NO_BOARD, reads: int = NO_BOARD, waits: tuple = ()) -> Instruction:
    return Instruction(text, stall, writes, reads, waits)


def listing(*code: Instruction | str) -> str:
    """As nvdisasm -c -hex prints it."""
    out = ['\t.section\t.text._Z4stepv,"ax",@progbits']
    for i, item in enumerate(code):
        if isinstance(item, str):
            out.append(f"{item}:")
            continue
        bits = item.stall | item.writes << 5 | item.reads << 8 | sum(1 << b for b in item.waits) << 11
        out.append(f"        /*{16 * i:04x}*/                   {item.text} ;       /* 0x0000000000007918 */")
        out.append(f"                                                          /* 0x{bits << 41:016x} */")
    return "\n".join([*out, '\t.section\t.nv.info,"",@"SHT_CUDA_INFO"', "        /*0000*/   .word 0"])


BAR = line("BAR.SYNC.DEFER_BLOCKING 0x0")


def test_code_and_control_bits_are_read():
    code = [".L_x_0", line("@P0 LDS.128 R4, [R2]", 4, writes=2, reads=1, waits=(0, 5)), line("BRA `(.L_x_0)", 5)]
    assert functions(listing(*code)) == {"_Z4stepv": code}
    assert code[1].opcode == "LDS.128"


def test_loops_go_from_barrier_to_barrier_by_the_shortest_way():
    load, add, product, store = map(
        line, ("LDG.E R8, [R6]", "IADD3 R8, R8, 0x1, RZ", "HMMA.16816 R12", "STS [R3], R12")
    )
    skip, back, again = line("@!P0 BRA `(.L_x_1)"), line("BRA `(.L_x_0)"), line("@P2 BRA `(.L_x_2)")
    out = line("@P1 EXIT")
    first = [".L_x_0", BAR, skip, load, add, ".L_x_1", product, out, store, back]
    second = [".L_x_2", BAR, add, again]
    found = loops(functions(listing(BAR, *first, *second))["_Z4stepv"])
    assert found == [[BAR, skip, product, out, store, back], [BAR, add, again]]
    assert loops([BAR, add, line("EXIT")]) == []


# Of a cluster: the wait for the peers, asked until it is over; a part of the sums given away or taken and sent.
ASK, AGAIN = line("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2", writes=0), line("@!P0 BRA `(.L_ask)", waits=(0,))
GIVER, GIVE, JOIN = map(line, ("@P1 BRA `(.L_give)", "BAR.ARV R5, 0x40", "BRA `(.L_join)"))
TAKE, SEND = line("BAR.SYNC.DEFER_BLOCKING R5, 0x40"), line("STAS.128 [R8.64], R4")
ARRIVE, NEXT = line("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R1], RZ"), line("@P2 BRA `(.L_ask)")
PRODUCT, FAULT, END = line("HMMA.16816 R12"), line("@P3 BRA `(.L_trap)"), line("EXIT")
CLUSTER = [
    ".L_ask", ASK, FAULT, AGAIN, PRODUCT, GIVER, TAKE, SEND, ".L_join", ARRIVE, NEXT, END,
    ".L_give", GIVE, JOIN, ".L_trap", line("BPT.TRAP 0x1"), SEND, line("BRA `(.L_ask)"),
]  # fmt: skip


def test_a_clusters_loop_goes_from_the_wait_to_itself_past_what_is_sent():
    """Not back to the question alone, nor through the trap, after which nothing runs."""
    way = [ASK, FAULT, AGAIN, PRODUCT, GIVER, TAKE, SEND, ARRIVE, NEXT]
    assert loops(CLUSTER) == [way]
    assert loops(CLUSTER, giving=True) == [
        [ASK, FAULT, AGAIN, PRODUCT, GIVER, GIVE, JOIN, ARRIVE, NEXT],
    ]


def test_a_loop_is_found_whose_way_out_to_a_barrier_is_the_shorter_one():
    """The last state's coming is waited for behind the loop."""
    last, over = line("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R9], R2"), line("@P4 BRA `(.L_last)")
    code = [".L_ask", ASK, AGAIN, SEND, over, ARRIVE, PRODUCT, NEXT, END, ".L_last", last, SEND, END]
    assert loops(code) == [[ASK, AGAIN, SEND, over, ARRIVE, PRODUCT, NEXT]]


# Of a grid: a barrier, part of the sums given away or taken and published, then everybody's polled for.
POLL, MORE = line("@P5 LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64]", writes=1), line("@P5 BRA `(.L_poll)", waits=(1,))
PUBLISH, KEEP = line("STG.E.128.STRONG.GPU desc[UR4][R2.64], R8"), line("STS [R3], R8")
FIRST, ROUND = line("@!P6 BRA `(.L_step)"), line("BRA `(.L_begin)")
GRID = [
    ".L_begin", FIRST, ".L_poll", POLL, MORE, KEEP, ".L_step", BAR, PRODUCT, GIVER, TAKE, PUBLISH, ".L_join",
    line("@P2 EXIT"), ROUND, ".L_give", GIVE, JOIN,
]  # fmt: skip


def test_a_grids_loop_publishes_and_polls():
    """Though a shorter way leads past the first step's poll, which is none."""
    out = GRID[13]
    assert loops(GRID) == [[BAR, PRODUCT, GIVER, TAKE, PUBLISH, out, ROUND, FIRST, POLL, MORE, KEEP]]
    assert loops(GRID, giving=True) == [[BAR, PRODUCT, GIVER, GIVE, JOIN, out, ROUND, FIRST, POLL, MORE, KEEP]]


def test_what_is_polled_for_is_there_when_everybody_has_sent():
    product = line("MOV R3, R3", 100)
    owner, giver = [BAR, product, PUBLISH, POLL, MORE, KEEP], [BAR, POLL, MORE, KEEP]
    cycles = [Scheduler(ways, 30, arch=90, exchange=700.0).play() for ways in ([owner], [owner, giver])]
    assert cycles[0] == pytest.approx(BARRIER + 100 + 700, abs=30)
    assert cycles[1] == pytest.approx(cycles[0], abs=30)  # who asks before that waits as long


def test_a_warp_that_is_divided_takes_no_detour():
    code = [".L_ask", ASK, line("BRA.DIV UR4, `(.L_trap)"), *CLUSTER[3:]]
    (way,) = loops(code)
    assert way[:3] == [ASK, code[2], AGAIN]


def test_nothing_goes_on_before_what_the_peers_send_is_there():
    product, wait = line("MOV R3, R3", 100), line("MOV R3, R3", waits=(0,))
    sender = [ASK, wait, product, SEND]
    alone = Scheduler([sender], 30, arch=90, exchange=450.0).play()
    assert alone == pytest.approx(450 + 100 + 16, abs=5)
    # Another warp sends later: the phase ends with the last of what is sent. Half as many senders, half the traffic.
    late = [ASK, wait, product, product, SEND]
    assert Scheduler([sender, late], 30, arch=90, exchange=450.0).play() == pytest.approx(450 + 200 + 16, abs=5)
    half = Scheduler([sender], 30, arch=90, senders=0.5, exchange=450.0).play()
    assert half == pytest.approx(450 + 100 + 8, abs=5)


def cycles(*code: Instruction, warps: int = 1) -> list[float]:
    return [Scheduler([[BAR, *code]] * warps, load, arch=90).play() for load in LOAD_LATENCIES]


def test_stalls_and_waits_are_counted():
    assert cycles(line("MOV R1, R2", 7), line("MOV R1, R2", 9)) == [BARRIER] * 3  # what is longer
    assert cycles(line("MOV R1, R2", 15), line("MOV R1, R2", 15)) == [31] * 3
    # The load waits for the barrier, its result for 16 cycles of the load-store unit.
    wait = cycles(line("LDS.128 R4, [R2]", 1, writes=0), line("MOV R1, R4", 1, waits=(0,)))
    assert wait == [BARRIER + 16 + SHARED_LATENCY + 1] * 3


def test_products_of_all_warps_share_one_tensor_core():
    products = [line(f"HMMA.16816.F32.BF16 R{i}, R0, R1, RZ", 1) for i in range(16)]
    one, two = cycles(*products)[0], cycles(*products, warps=2)[0]
    assert one == pytest.approx(16 * 6.2, abs=2)
    assert two == pytest.approx(2 * one, abs=2)


def test_loads_ahead_on_one_scoreboard_are_not_ahead():
    """A scoreboard is a counter and a wait is for zero: read a step ahead, and still wait for the load just issued."""
    ahead = [line("MOV R1, R2", 4, waits=(1,)), line("LDG.E R2, [R4]", 4, writes=1), *[line("MOV R3, R3", 15)] * 20]
    near, _, far = cycles(*ahead)
    assert near == BARRIER + 4 + 300
    assert far == pytest.approx(650 + 4, abs=BARRIER)


@pytest.mark.parametrize(("pending", "hidden"), [(0, False), (1, False), (3, True)])
def test_copies_into_a_ring_hide_what_it_has_slots_for(pending, hidden):
    """A step of 200 cycles: 650 take four, so three groups have to be under way."""
    copy = [line("LDGSTS.E.128 [R2], [R4.64]", 1), line("LDGDEPBAR", 1, writes=0)]
    near, _, far = cycles(*copy, line(f"DEPBAR.LE SB0, {hex(pending)}", 4), *[line("MOV R3, R3", 10)] * 20)
    assert (far <= near * 1.15) == hidden


def test_a_loop_of_several_barriers():
    """As long as its parts, each of which waits for the warps' slowest."""
    first, second = [line("MOV R1, R2", 15)] * 10, [line("MOV R1, R2", 15)] * 4
    assert cycles(*first, BAR, *second) == [150 + 60 + 2] * 3
    first, second = ([line("STS [R3], R8"), *part] for part in (first, second))  # which waits for the barrier
    ways = [[BAR, *first, BAR, *second], [BAR, *second, BAR, *first]]
    times = [Scheduler(ways, 30, arch=90).play(rounds) for rounds in (7, 14)]
    assert times == [pytest.approx(2 * (BARRIER + 150), abs=BARRIER)] * 2
    with pytest.raises(ValueError, match=r"at least one, got \{0\}"):
        Scheduler([first], 30, arch=90)
    with pytest.raises(ValueError, match=r"as many barriers, and at least one, got \{1, 2\}"):
        Scheduler([[BAR, *first], [BAR, BAR]], 30, arch=90)


def test_what_nobody_sends_is_not_waited_for():
    with pytest.raises(ValueError, match="every warp waits for what nobody sends"):
        Scheduler([[BAR, POLL, MORE, KEEP]], 30, arch=90).play()
    # Where blocks exchange nothing by packets, such a load is one like others.
    far = Scheduler([[BAR, POLL, line("MOV R1, R2", waits=(1,))]], 650, arch=90, senders=0.0).play()
    assert far == pytest.approx(650, abs=30)


def test_products_of_a_warp_group_are_awaited():
    products = [line("HGMMA.64x8x16.F32.BF16 R24, R28, gdesc[UR4], R24", 1)] * 8
    done = line("WARPGROUP.DEPBAR.LE gsb0, 0x0", 2)
    (times,) = set(cycles(*products, done, line("MOV R3, R3", 15)))
    assert times == pytest.approx(7 * WARPGROUP_MMA + OTHER_LATENCY + 17, abs=3)
    assert cycles(*products, line("MOV R3, R3", 15))[0] == pytest.approx(8 * WARPGROUP_MMA, abs=10)


def test_programs_that_meet_by_an_atomic_wait_there_and_back():
    meet = [line("ATOMG.E.ADD.64.STRONG.GPU PT, R4, [R2], R6", 1, writes=0), line("MOV R1, R4", waits=(0,))]
    assert [b - a for a, b in zip(cycles(*meet), cycles(*meet)[1:], strict=False)] == [250, 370]


def test_the_longest_loop_has_what_lies_within_it():
    inner = [".L_in", line("IADD3 R1, R1, 0x1, RZ"), line("@P0 BRA `(.L_in)")]
    outer = [".L_out", BAR, *inner, line("MOV R1, R2"), line("@P1 BRA `(.L_out)")]
    found = longest_loop([line("MOV R0, R0"), *outer, line("BRA `(.L_end)"), ".L_end", line("EXIT")])
    assert found == [each for each in outer if isinstance(each, Instruction)]
    assert longest_loop([line("EXIT")]) == []
