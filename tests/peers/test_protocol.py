"""The benchmark's peers: each that is installed computes the same network; one that does not is found and not timed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.harness import PEER, Case
from benchmarks.peers import cases, install, native, roofline
from benchmarks.peers.block import Block
from benchmarks.peers.protocol import SHORT, NotEqual, Run, check, make_job
from benchmarks.peers.registry import OURS, PEERS
from benchmarks.peers.torch_rnn import reference

PLAIN = Case("float32", 3, 16, "training", 6, input_size=16, threads=1)
KINDS = {
    "plain": {},
    "other input size": {"input_size": 5},
    "both directions": {"directions": 2},
    "layers": {"layers": 2},
    "both directions, layers": {"directions": 2, "layers": 2},
    "packed": {"layout": "packed"},
    "packed both ways": {"layout": "packed", "directions": 2},
    "batch_first": {"layout": "batch_first"},
    "tanh": {"activation": "tanh"},
    "heads": {"heads": 4},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16", "start": "rnn"},
    "float16": {"dtype": "float16", "start": "rnn"},
    "a step from a state": {"steps": 1, "batch": 1, "state": True},
    "steps from a state, both ways": {"steps": 3, "state": True, "directions": 2},
}
COMPILED = "torch.compile"


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(name: str, case: Case) -> tuple[Run, dict[str, torch.Tensor]]:
    """(the peer's call, what nn.RNN in float64 gives); skips what is not installed or not its own."""
    peer = PEERS[name](1)
    if reason := peer.missing():
        pytest.skip(reason)
    if reason := peer.refuses(case):
        pytest.skip(reason)
    job = make_job(case)
    want = reference(job)
    return peer.start(job), want


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in PEERS if name != COMPILED])
def test_outputs_and_gradients_are_equal(name, kind, mode):
    case = dataclasses.replace(PLAIN, **KINDS[kind], mode=mode)
    run, want = start(name, case)
    expected = {"output"}
    if mode == "training":
        weights = ("weight_ih", "weight_hh", "bias")
        suffixes = [suffix for suffix, _, _ in make_job(case).parts()]
        expected |= {"x", *(f"{weight}_{suffix}" for weight in weights for suffix in suffixes)}
    assert want.keys() == expected
    for _ in range(3):  # gradients of calls do not add up
        distance = check(case, run.tensors(run.call()), want)
    assert 0 <= distance < 0.1


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("size", [(3, 6, 16), (1, 40, 128)], ids=str)
def test_the_loop_that_is_compiled_is_equal(monkeypatch, size, mode):
    """Not compiled: that takes 20 seconds, and is checked in every run of the benchmark."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    batch, steps, hidden = size
    case = Case("float32", batch, hidden, mode, steps, input_size=hidden, threads=1)
    run, want = start(COMPILED, case)
    run.call()
    check(case, run.tensors(run.call()), want)


def spoil_v(job):
    job.rnn.weight_hh_l0.data[0, 1] += 0.05


def spoil_w(job):
    job.rnn.weight_ih_l0.data.copy_(job.rnn.weight_ih_l0.data.t().clone())


def spoil_bias(job):
    job.rnn.bias_hh_l0.data[3] -= 0.02


def spoil_input(job):
    job.x[-1, 0, 0] += 0.5


@pytest.mark.parametrize("spoil", [spoil_v, spoil_w, spoil_bias, spoil_input])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_weight_is_found(spoil, dtype):
    case = dataclasses.replace(PLAIN, dtype=dtype)
    job = make_job(case)
    want = reference(job)
    spoil(job)
    run = PEERS[PEER](1).start(job)
    with pytest.raises(NotEqual, match=r"output: .* at most 1e-\d+ is equal"):
        check(case, run.tensors(run.call()), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_transposed_matrix_is_found_in_16_bits(dtype):
    case = dataclasses.replace(PLAIN, dtype=dtype, start="rnn")
    job = make_job(case)
    want = reference(job)
    job.rnn.weight_hh_l0.data.copy_(job.rnn.weight_hh_l0.data.t().clone())
    run = PEERS[PEER](1).start(job)
    with pytest.raises(NotEqual, match="output"):
        check(case, run.tensors(run.call()), want)


FLOAT32 = [case for group in cases.GROUPS for case in cases.group(group) if case.dtype == "float32"]


@pytest.mark.parametrize(
    "case", [case for case in FLOAT32 if case.mode == "training" and case.steps > 3], ids=cases.label
)
def test_a_wrong_term_of_one_step_is_found(case):
    """As oneDNN had one: a product of the first step's gradient with a state, 0.3 in size, that is not there."""
    job = make_job(dataclasses.replace(case, steps=SHORT, threads=1))
    want = reference(job)
    run = PEERS[PEER](1).start(job)
    check(job.case, run.tensors(run.call()), want)
    wrong = dict(want)
    term = want["x"][0].norm() / case.hidden**0.5 * 0.3
    wrong["weight_hh_l0"] = want["weight_hh_l0"] + torch.randn(want["weight_hh_l0"].shape) * term
    with pytest.raises(NotEqual, match="weight_hh_l0"):
        check(job.case, wrong, want)


def test_what_is_not_there_not_finite_or_of_another_shape_is_found():
    want = reference(make_job(PLAIN))
    assert check(PLAIN, want, want) == 0
    with pytest.raises(NotEqual, match="tensors"):
        check(PLAIN, {"output": want["output"]}, want)
    with pytest.raises(NotEqual, match=r"x: shape \(3, 6, 16\), expected \(6, 3, 16\)"):
        check(PLAIN, {**want, "x": want["x"].transpose(0, 1)}, want)
    spoiled = want["output"].clone()
    spoiled[0, 0, 0] = float("nan")
    with pytest.raises(NotEqual, match="output: inf"):
        check(PLAIN, {**want, "output": spoiled}, want)


def test_the_padding_of_packed_sequences_is_zero_and_lengths_fall():
    job = make_job(dataclasses.replace(PLAIN, layout="packed", steps=8))
    assert job.lengths.tolist() == [8, 5, 2]
    want = reference(job)
    for name in ("output", "x"):
        assert want[name][5:, 1].abs().sum() == want[name][2:, 2].abs().sum() == 0
        assert want[name][4, 1].abs().sum() > 0


class WrongRNN(PEERS[PEER]):
    def start(self, job):
        spoil_v(job)
        return super().start(job)


def test_a_block_does_not_time_what_is_not_equal(tmp_path):
    right = Block(PEER, 1, [PLAIN], tmp_path / "rows", implementation=PEERS[PEER](1))
    with right.row(PLAIN) as row:
        right.checked(PLAIN, row)
    wrong = dataclasses.replace(right, implementation=WrongRNN(1))
    with pytest.raises(NotEqual), wrong.row(PLAIN) as row:
        wrong.checked(PLAIN, row)
    first, second = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert first["note"] == ""
    assert first["distance"] < 1e-4
    assert 0 <= first["zero_states"] < 1
    assert second["us"] is None
    assert "NotEqual: output" in second["note"]


def test_every_case_has_a_name_of_its_own_and_ours_runs_all():
    everything = [case for group in cases.GROUPS for case in cases.group(group)]
    assert len({cases.label(case) for case in everything}) == len(everything)
    assert {group for groups in cases.BLOCKS for group in groups} == set(cases.GROUPS)
    assert len(cases.SHAPES) == 20
    for name, peer in PEERS.items():
        refused = [case for case in everything if peer(1).refuses(case)]
        assert (len(refused) == 0) == (name in (OURS, PEER, "JAX lax.scan"))
        assert len(refused) < len(everything), f"{name} runs nothing"
    for group in cases.GROUPS:
        assert set(cases.quick(group)) <= set(cases.group(group))


def test_a_block_is_read_as_it_was_written(tmp_path):
    block = Block(OURS, 2, cases.group("modes"), tmp_path / "rows", 0.5)
    block.save(tmp_path / "job")
    assert Block.load(tmp_path / "job") == block


# ---- the roof ----

RATES = {
    "gflops": {"float32": 100.0, "float64": 50.0, "bfloat16": 200.0},
    "read_gbs": {"16384": 200.0, "262144": 100.0, "67108864": 10.0},
}


def test_operations_are_counted():
    case = Case("float32", 4, 32, "forward", 10, input_size=8, threads=1)
    assert roofline.flops(case) == 2 * 4 * 32 * (8 + 32)
    assert roofline.flops(dataclasses.replace(case, mode="training")) == 3 * roofline.flops(case)
    assert roofline.flops(dataclasses.replace(case, heads=4)) == 2 * 4 * 32 * (8 + 8)
    packed = dataclasses.replace(case, layout="packed")  # of 10, 8, 5 and 2 steps
    assert roofline.flops(packed) == pytest.approx(roofline.flops(case) * (10 + 8 + 5 + 2) / 40)
    both = dataclasses.replace(case, layers=2, directions=2)
    assert roofline.flops(both) == 2 * (2 * 4 * 32 * (8 + 32) + 2 * 4 * 32 * (64 + 32))


def test_the_roof_is_the_slowest_of_three():
    one = Case("float32", 1, 256, "forward", 100, input_size=8, threads=1)  # 256 KB at 100 GB/s, 0.14 MFLOP
    assert roofline.seconds(one, RATES) == (pytest.approx(256 * 256 * 4 / 100e9), "reading U")
    many = Case("float32", 64, 256, "forward", 100, input_size=256, threads=1)
    assert roofline.seconds(many, RATES) == (pytest.approx(2 * 64 * 256 * 512 / 100e9), "multiply-adds")
    wide = Case("float32", 4, 16, "forward", 10**6, input_size=1, threads=1)
    assert roofline.seconds(wide, RATES) == (pytest.approx(4 * 17 * 4 / 10e9), "sequences")
    half = roofline.seconds(dataclasses.replace(many, dtype="bfloat16"), RATES)
    assert half[0] == pytest.approx(roofline.seconds(many, RATES)[0] / 2)
    assert roofline.seconds(dataclasses.replace(many, dtype="float16"), RATES) == roofline.seconds(many, RATES)
    assert roofline.share(many, 1e6 * roofline.seconds(many, RATES)[0] * 2, {"1": RATES}) == pytest.approx(0.5)
    assert roofline.share(many, 1.0, {"missing": "no compiler"}) is None


@pytest.mark.skipif(not native.compiler(), reason="no C++ compiler")
def test_the_roof_is_measured():
    found = roofline.measure(1, seconds=0.0005)
    assert {"float32", "float64"} <= found["gflops"].keys()
    assert len(found["read_gbs"]) == 8
    assert all(value > 0 for rates in found.values() for value in rates.values())


def test_a_source_that_does_not_compile_says_where(tmp_path):
    if not native.compiler():
        pytest.skip("no C++ compiler")
    source = tmp_path / "wrong.cpp"
    source.write_text("int main() { return nothing; }\n")
    with pytest.raises(native.CannotBuild, match=r"^wrong\.cpp:1:\d+: .*nothing"):
        native.build(source, [])


def test_why_a_package_was_not_installed_is_said_without_addresses():
    text = "WARNING: x\nERROR: Could not find a version\nERROR: No matching distribution found for jax at https://a.b/c"
    assert install.reason(text) == "No matching distribution found for jax at ..."
    text = "ERROR: Cannot install jax==0 because of conflicts.\nERROR: ResolutionImpossible: for help visit https://a"
    assert install.reason(text) == "Cannot install jax==0 because of conflicts."
    assert install.reason("") == "pip failed"
