"""Logits of which each process has some classes: as in one process, over gloo."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import fused_always
from processes import in_processes
from torch import Tensor

from pyfused import explain
from pyfused.functional import cross_entropy, linear_cross_entropy, linear_log_probs, log_probs

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
    pytest.mark.cpu,
]

ROWS, FEATURES, CLASSES = 13, 6, 150
CUTS = {
    1: [0, CLASSES],
    2: [0, 40, CLASSES],
    4: [0, 1, 70, 70, CLASSES],
}  # uneven, and an empty one
CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum_smoothed": {"reduction": "sum", "label_smoothing": 0.1},
    "none_weighted": {"reduction": "none", "weight": True, "label_smoothing": 0.2},
    "tokens": {"token_weight": True, "z_loss": 0.1, "weight": True},
    "divided": {"denominator": 5.0, "vocab_size": CLASSES},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EVERY = [(name, dtype) for name, dtype in itertools.product(CASES, DTYPES)]


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, head, bias and target; a third of the targets ignored."""
    generator = torch.Generator().manual_seed(3)
    input = torch.randn(ROWS, FEATURES, generator=generator).to(dtype)
    head = torch.randn(CLASSES, FEATURES, generator=generator).to(dtype)
    bias = torch.randn(CLASSES, generator=generator).to(dtype)
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    target[::3] = -100
    return input, head, bias, target


def options(name: str, dtype: torch.dtype) -> dict[str, Any]:
    given = dict(CASES[name])
    if "weight" in given:
        given["weight"] = torch.linspace(0.5, 2, CLASSES).to(dtype)
    if "token_weight" in given:
        given["token_weight"] = torch.linspace(0, 1, ROWS)
    return given


def upstream_of(loss: Tensor) -> Tensor:
    return torch.linspace(1, 2, max(1, loss.numel())).reshape(loss.shape).to(loss.dtype)


Found = dict[tuple[str, torch.dtype], list[Tensor]]


def in_one_process() -> Found:
    found = {}
    for name, dtype in EVERY:
        input, head, bias, target = draw(dtype)
        given = options(name, dtype)
        given.pop("vocab_size", None)
        leaves = [x.double().requires_grad_() for x in (input, head, bias)]
        logits = leaves[0] @ leaves[1].t() + leaves[2]
        logits = logits.detach().to(dtype).double().requires_grad_()
        given |= {"weight": given["weight"].double()} if "weight" in given else {}
        loss = cross_entropy(logits, target, **given)
        (of_logits,) = torch.autograd.grad(loss, logits, upstream_of(loss))
        linear = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], **given)
        of_head = torch.autograd.grad(linear, leaves, upstream_of(linear))
        found[name, dtype] = [loss.detach(), of_logits, linear.detach(), *of_head]
    return found


def log_probs_of(functions: Any, own: slice, **shard: Any) -> list[list[Tensor]]:
    """Results and gradients, of logits and of a head, whose classes `own` are."""
    input, head, bias, target = draw(torch.float32)
    leaves = [x.requires_grad_() for x in (input, head[own].clone(), bias[own].clone())]
    logits = (input @ head.t() + bias)[:, own].detach().requires_grad_()
    options: dict[str, Any] = {"softcap": 4.0, "return_entropy": True, "return_lse": True, **shard}
    of_logits, of_head = functions
    found = of_logits(logits, target, **options)
    of_head = of_head(*leaves[:2], target, linear_bias=leaves[2], memory_budget=4000, **options)
    weights = torch.linspace(-1, 1, 3 * ROWS).view(3, ROWS)
    return [
        [torch.stack([*x]).detach(), *torch.autograd.grad((torch.stack([*x]) * weights).sum(), of)]
        for x, of in ((found, [logits]), (of_head, leaves))
    ]


def rank_of(rank: int, size: int, folder: str, pipe: Any) -> None:
    from pyfused import distributed

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    own = slice(*CUTS[size][rank : rank + 2])
    found: dict[Any, Any] = {}
    with fused_always():
        for name, dtype in EVERY:
            input, head, bias, target = draw(dtype)
            given = options(name, dtype) | {"vocab_start": own.start}
            wide = (input.double() @ head.double().t() + bias.double())[:, own]
            logits = wide.to(dtype).requires_grad_()
            sent.clear()
            loss = distributed.vocab_parallel_cross_entropy(logits, target, **given)
            (of_logits,) = torch.autograd.grad(loss, logits, upstream_of(loss))
            found[name, dtype, "sent"] = sum(sent)
            leaves = [input.requires_grad_()]
            leaves += [x[own].clone().requires_grad_() for x in (head, bias)]
            linear = distributed.vocab_parallel_linear_cross_entropy(
                *leaves[:2], target, linear_bias=leaves[2], memory_budget=4000, **given
            )
            of_head = torch.autograd.grad(linear, leaves, upstream_of(linear))
            found[name, dtype] = [loss.detach(), of_logits, linear.detach(), *of_head]
        functions = (
            distributed.vocab_parallel_log_probs,
            distributed.vocab_parallel_linear_log_probs,
        )
        sent.clear()
        found["log_probs"] = log_probs_of(functions, own, vocab_start=own.start, vocab_size=CLASSES)
        found["log_probs", "sent"] = sum(sent)
        found["dtensor"] = of_dtensors(sent)
        found["errors"] = [
            told(
                lambda given=given: distributed.vocab_parallel_cross_entropy(
                    torch.zeros(2, 5), torch.tensor([0, 9]), **given
                )
            )
            for given in (
                {"vocab_start": 6, "vocab_size": 10},
                {"vocab_start": -1, "vocab_size": 10},
                {"vocab_start": 0, "vocab_size": 9},
                {"vocab_start": 0, "vocab_size": 10, "weight": torch.ones(5)},
            )
        ]
    dist.barrier()
    dist.destroy_process_group()
    file = io.BytesIO()
    torch.save(found, file)  # a tensor itself would be gone with its process
    pipe.send_bytes(file.getvalue())


def of_dtensors(sent: list[int]) -> list[Any]:
    """How a call goes, what it sends, and how far its results are from those of one process."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for shape in ((ROWS, CLASSES), (4, 5), (3, 7, 2)):
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        target = torch.arange(shape[0] * math.prod(shape[2:])).reshape(shape[0], *shape[2:]) % 5
        target[0] = -100
        for reduction, shared in (("mean", False), ("none", True), ("sum", False)):
            whole = logits.clone().requires_grad_()
            parts = distribute_tensor(logits, mesh, [Shard(1)])
            parts.requires_grad_()
            given = distribute_tensor(target, mesh, [Replicate()]) if shared else target
            options = {
                "reduction": reduction,
                "label_smoothing": 0.1,
                "weight": torch.ones(shape[1]),
            }
            path = explain("cross_entropy", parts, given, **options)
            sent.clear()
            loss = cross_entropy(parts, given, **options)
            numbers = sum(sent)
            expected = cross_entropy(whole, target, **options)
            loss.sum().backward()
            expected.sum().backward()
            far = (loss.full_tensor() - expected).abs().max()
            far = max(far, (parts.grad.full_tensor() - whole.grad).abs().max())
            found.append((path.backend, path.reason, numbers / target.numel(), float(far)))
    replicated = distribute_tensor(torch.randn(4, 5), mesh, [Shard(0)])
    found.append(explain("cross_entropy", replicated, torch.arange(4)).reason)
    return found


def told(call: Any) -> str:
    try:
        call()
    except (IndexError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module", params=CUTS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = str(tmp_path_factory.mktemp("store"))
    sent = in_processes(rank_of, request.param, request.param, folder)
    return [torch.load(io.BytesIO(found), weights_only=False) for found in sent]


@pytest.fixture(scope="module")
def expected() -> Found:
    return in_one_process()


@pytest.mark.parametrize(("name", "dtype"), EVERY, ids=str)
def test_processes_together_are_one(
    name: str, dtype: torch.dtype, ranks: list[Any], expected: Found
) -> None:
    loss, of_logits, linear, of_input, of_head, of_bias = expected[name, dtype]
    found = [rank[name, dtype] for rank in ranks]

    def close(got: Tensor, exactly: Tensor) -> None:
        assert got.dtype == dtype
        exact = {}
        if dtype is torch.bfloat16:  # in which some CPUs multiply
            exact = {"rtol": 0.02, "atol": 4e-3 * max(1.0, float(exactly.abs().max()))}
        torch.testing.assert_close(got, exactly.to(dtype), **exact)

    for rank in found:
        close(rank[0], loss)
        close(rank[2], linear)
        close(rank[3], of_input)
    close(torch.cat([rank[1] for rank in found], 1), of_logits)
    close(torch.cat([rank[4] for rank in found]), of_head)
    close(torch.cat([rank[5] for rank in found]), of_bias)
    sent = {rank[name, dtype, "sent"] for rank in ranks}
    assert sent == {3 * ROWS + ("vocab_size" not in CASES[name])}


def test_log_probs_of_processes_together(ranks: list[Any]) -> None:
    with fused_always():
        expected = log_probs_of((log_probs, linear_log_probs), slice(None))
    for (results, of_logits), (linear, *of_head) in [rank["log_probs"] for rank in ranks]:
        torch.testing.assert_close(results, expected[0][0])
        torch.testing.assert_close(linear, expected[1][0])
        torch.testing.assert_close(of_head[0], expected[1][1])
        assert of_logits.shape[1] == len(of_head[1]) == len(of_head[2])
    parts = [rank["log_probs"] for rank in ranks]
    torch.testing.assert_close(torch.cat([part[0][1] for part in parts], 1), expected[0][1])
    for place in (2, 3):
        joined = torch.cat([part[1][place] for part in parts])
        torch.testing.assert_close(joined, expected[1][place])
    sent = 2 * 4 * ROWS + ROWS * FEATURES  # of logits and of the head, and the input's gradient
    assert {rank["log_probs", "sent"] for rank in ranks} == {sent}


def test_dtensors_go_the_same_way(ranks: list[Any]) -> None:
    for rank in ranks:
        *shared, other = rank["dtensor"]
        for backend, strategy, numbers, far in shared:
            assert (backend, strategy, numbers) == ("cpu", "some classes a process", 3)
            assert far < 1e-5
        assert other == "input is a DTensor"


def test_bad_input(ranks: list[Any]) -> None:
    for rank in ranks:
        beyond, before, index, weight = rank["errors"]
        assert "ValueError: vocab_start: expected 5 classes within [0, 10), got" in beyond
        assert "ValueError: vocab_start: expected 5 classes within [0, 10), got" in before
        assert "IndexError: target: expected class indices in [0, 9)" in index
        assert "RuntimeError: weight: expected shape (10,)" in weight
