"""Training in two processes equals training in one: DDP and FSDP2 over gloo."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import in_processes
from torch import Tensor, nn

import pyfused

pytestmark = [
    pytest.mark.thresholds,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
    pytest.mark.skipif(
        torch.__version__ < "2.12", reason="torch 2.11's DTensor lacks one of the redistributions"
    ),
]

STEPS, ROWS, CLASSES = 4, 1 << 14, 6  # half of the rows exceed the size limit of kernels


def build() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda: torch.randn(ROWS, 5, generator=generator)  # noqa: E731
    return [(x := draw(), (x.abs().sum(1) * 10).long() % CLASSES) for _ in range(STEPS)]


def train(model: nn.Module, criterion: nn.Module, part: slice) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, target in batches():
        optimizer.zero_grad()
        loss = criterion(model(x[part]), target[part])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def in_one_process() -> list[float]:
    return train(build(), nn.CrossEntropyLoss(), slice(None))


def rank_of_two(rank: int, folder: str, pipe: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    part = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    results: dict[str, Any] = {}
    with pyfused.patch():
        criterion = nn.CrossEntropyLoss()
        results["DDP"] = train(DistributedDataParallel(build()), criterion, part)
        sharded = build()
        pyfused.convert(sharded)
        results["FSDP2"] = train(fully_shard(sharded, mesh=mesh), criterion, part)
        x, target = batches()[0]
        results["backend"] = pyfused.explain(F.cross_entropy, build()(x), target).backend
    dist.barrier()
    dist.destroy_process_group()
    pipe.send_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("store"))
    return [pickle.loads(found) for found in in_processes(rank_of_two, 2, folder)]


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_two_processes_train_like_one(wrapper: str, ranks: list[dict[str, Any]]) -> None:
    halves = zip(*(found[wrapper] for found in ranks), strict=True)
    assert [sum(half) / 2 for half in halves] == pytest.approx(in_one_process(), rel=1e-4)
    assert all(found["backend"] == "cpu" for found in ranks)
