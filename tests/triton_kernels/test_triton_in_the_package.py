"""The backend behind the package's public functions, in Triton's interpreter on CPU tensors."""

import fused_rin
import pytest
import torch
from fused_rin import BackendError, explain, recurrence

from tests.conftest import make_case


def test_recurrence_and_its_gradients_agree_with_the_reference() -> None:
    case = make_case(6, 3, 17, 2, layout="lengths", resets=True)
    inputs = [case.pre, case.weight, case.h0]

    def run(backend: str) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        pre, weight, h0 = leaves
        masks = {"lengths": case.lengths, "resets": case.resets, "reverse": [False, True]}
        out, h_n = recurrence(pre, weight, h0, **masks, backend=backend)
        return out, h_n, *torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)

    for got, expected in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_module_trains_with_it() -> None:
    torch.manual_seed(0)
    module = fused_rin.RIN(5, 16, bidirectional=True, backend="triton")
    x = torch.randn(4, 3, 5)
    with fused_rin.use_backend("triton"):
        out, _ = module(x)
        out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_compiles_to_one_graph_that_serves_every_length_and_batch() -> None:
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(pre, weight, h0):
        return recurrence(pre, weight, h0, skip=1.0, backend="triton")[0].sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for steps, batch in ((3, 2), (4, 2), (5, 3), (6, 7)):
        case = make_case(steps, batch, 8)
        case.weight.requires_grad_()
        torch.testing.assert_close(compiled(case.pre, case.weight, case.h0), step(case.pre, case.weight, case.h0))
    assert len(graphs) == 1


@pytest.mark.parametrize("layout", ["full", "lengths", "packed"])
def test_the_operators_pass_opcheck(layout: str) -> None:
    case = make_case(3, 2, 4, layout=layout)
    constants = (case.skip, case.activation, case.num_reversed, "triton")
    torch.library.opcheck(torch.ops.fused_rin.sweep_forward, (*case.tensors, *constants))
    out, h_n = torch.ops.fused_rin.sweep_forward(*case.tensors, *constants)
    given = (out, h_n, case.weight, out, case.lengths, case.offsets, case.resets, *constants)
    torch.library.opcheck(torch.ops.fused_rin.sweep_backward, given)


def test_explain_says_the_plan() -> None:
    choice = explain((9, 2, 1, 100), dtype=torch.bfloat16, backend="triton")
    assert choice.backend == "triton"
    assert "U padded to 128 x 128 in registers" in choice.plan


def test_asked_for_by_name_it_says_what_it_cannot_do() -> None:
    with pytest.raises(BackendError, match=r"'triton' was asked for .* no kernel for float64"):
        recurrence(torch.zeros(2, 1, 1, 3).double(), torch.zeros(1, 3, 3).double(), backend="triton")
    with pytest.raises(BackendError, match=r"hidden size of 3000 .* use backend=\"reference\""):
        recurrence(torch.zeros(2, 1, 1, 3000), torch.zeros(1, 3000, 3000), backend="triton")


def test_a_first_compilation_inside_a_capture_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_rin.triton_kernels import launch

    class Refusing:
        def __getitem__(self, grid: object) -> object:
            def refuse(*args: object, **kwargs: object) -> None:
                raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

            return refuse

    case = make_case(2, 1, 8)
    monkeypatch.setattr(launch, "sweep", Refusing())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the model once with these sizes before the capture"):
        launch.run(case.pre, None, case.h0, case.weight, case.rows, case.rule)
