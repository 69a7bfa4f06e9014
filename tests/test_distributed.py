"""DDP, FSDP2 and distributed checkpoints: two gloo processes against one."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fused_rin import RIN, RINCell
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

WORLD = 2
# torch 2.6 cannot run fully_shard on CPUs, whatever the module: its torch.cpu.Stream has no record_event.
FULLY_SHARD_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
needs_fully_shard = pytest.mark.skipif(not FULLY_SHARD_ON_CPU, reason="this torch cannot run fully_shard on CPUs")
STEPS, BATCH = 6, 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rin = RIN(5, 8, num_layers=2, bidirectional=True, skip=0.5)
        self.cell = RINCell(16, 8, nonlinearity="tanh", skip=0.5)
        self.head = nn.Linear(8, 2)

    def forward(self, x, hx=None):
        out, h_n = self.rin(x, hx)
        return self.head(self.cell(out[-1], h_n[0]))


def _model():
    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def _batch():
    torch.manual_seed(1)
    return torch.randn(STEPS, WORLD * BATCH, 5)


def _losses_and_gradients(model, x):
    """Two steps of SGD: losses, and the gradients of the second, as full tensors."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.detach().clone())
        optimizer.step()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        gradients[name.removeprefix("module.")] = gradient.clone()
    return losses, gradients


def _worker(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    x = _batch()[:, rank * BATCH : (rank + 1) * BATCH]
    results = {"ddp": _losses_and_gradients(nn.parallel.DistributedDataParallel(_model()), x)}

    if FULLY_SHARD_ON_CPU:
        _fully_shard(folder, x, results)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    losses = {kind: torch.stack(results[kind][0]) for kind in ("ddp", "fsdp") if kind in results}
    for loss in losses.values():
        dist.all_reduce(loss)
        loss /= WORLD
    if rank == 0:
        torch.save(losses, f"{folder}/losses.pt")
    gc.collect()  # models hold the group, whose threads must not outlive the interpreter: see cli._leave_group
    dist.destroy_process_group()


def _fully_shard(folder: str, x: torch.Tensor, results: dict) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (model.rin, model.cell, model):
        fully_shard(part, mesh=mesh)
    assert not isinstance(model.rin.skip, torch.distributed.tensor.DTensor)
    results["fsdp"] = _losses_and_gradients(model, x)
    with torch.no_grad():
        results["one step"] = model(x[:1, :1])  # the direct way must meet whole weights, not shards
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/checkpoint")
    results["weights"] = {name: p.full_tensor() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One pair of processes for all tests of this file: starting them is most of the time."""
    import subprocess

    from tests import warm

    folder = tmp_path_factory.mktemp("distributed")
    workers = [
        subprocess.Popen([*warm.PYTHON, __file__, str(folder), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * WORLD, "\n".join(errors)
    return folder


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=needs_fully_shard)])
def test_gradients_are_those_of_one_process(run: Path, kind: str):
    losses, gradients = _losses_and_gradients(_model(), _batch())
    results = torch.load(run / "results.pt")
    _, distributed = results[kind]
    assert distributed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(distributed[name], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.load(run / "losses.pt")[kind], torch.stack(losses), rtol=1e-4, atol=1e-6)


@needs_fully_shard
def test_a_sharded_checkpoint_loads_in_one_process(run: Path):
    weights = torch.load(run / "results.pt")["weights"]
    model = Model()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=run / "checkpoint", no_dist=True)
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
    with torch.no_grad():
        expected = torch.load(run / "results.pt")["one step"]
        torch.testing.assert_close(model(_batch()[:1, :1]), expected)


@needs_fully_shard
def test_the_mark_in_a_sharded_checkpoint_still_guards(run: Path):
    model = Model()
    model.rin = RIN(5, 8, num_layers=2, bidirectional=True)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=run / "checkpoint", no_dist=True)
    state = {name: value.clone() for name, value in state.items()}
    model = Model()
    model.rin = RIN(5, 8, num_layers=2, bidirectional=True)
    with pytest.raises(RuntimeError, match=r"rin.skip: the checkpoint has skip=0.5"):
        model.load_state_dict(state)


if __name__ == "__main__":
    _worker(sys.argv[1], int(sys.argv[2]))
