"""Training in two processes equals training in one: DDP and FSDP2 over gloo."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_checks
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


def check(wrapper: str, rank: int) -> None:
    """Compares losses with those of one process; its gradients are the mean of both halves'."""
    from torch.distributed.fsdp import fully_shard

    part, criterion = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2), nn.CrossEntropyLoss()
    expected = train(build(), criterion, slice(None))
    with pyfused.patch():
        model = build()
        if wrapper == "DDP":
            losses = train(nn.parallel.DistributedDataParallel(model), criterion, part)
        else:
            mesh = dist.init_device_mesh("cpu", (2,))
            losses = train(fully_shard(pyfused.convert(model), mesh=mesh), criterion, part)
        x, target = batches()[0]
        assert pyfused.explain(F.cross_entropy, build()(x), target).backend == "cpu"
    halves: list[Any] = [None, None]
    dist.all_gather_object(halves, losses)
    means = [sum(pair) / 2 for pair in zip(*halves, strict=True)]
    assert means == pytest.approx(expected, rel=1e-4)


WRAPPERS = "DDP", "FSDP2"


def checks_of(rank: int) -> dict[str, Callable[[], None]]:
    return {wrapper: partial(check, wrapper, rank) for wrapper in WRAPPERS}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run_checks(checks_of, 2, small_calls=True)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_like_one(wrapper: str, failures: dict[str, str]) -> None:
    assert wrapper not in failures, failures[wrapper]
