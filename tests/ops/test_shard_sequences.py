"""Random sequences of calls with sharded classes: the collectives of all processes stay paired."""

from __future__ import annotations

import contextlib
import datetime
import pickle
import random
import warnings
from typing import Any

import test_vocab_parallel
import torch
import torch.distributed as dist
from conftest import fused_always
from processes import in_processes
from test_vocab_parallel import CLASSES, DERIVED, METRICS, SIZE, Case, flat
from torch import Tensor, nn

from pyfused import VocabShard, functional

pytestmark = test_vocab_parallel.pytestmark
STEPS = 24
GROUPS = ([0, 1, 2, 3], [0, 1], [2, 3], [1, 3], [0, 1, 2], [1, 2, 3])
CASES = [*DERIVED.values(), *METRICS.values()]


def leaves_of(case: Case, own: slice, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Returns the tensors of a call with the classes of one process."""
    whole, _ = case.tensors()
    return {n: case.part(n, x, own).requires_grad_(n not in frozen) for n, x in whole.items()}


def results_of(case: Case, leaves: dict[str, Tensor], **changed: Any) -> list[Tensor]:
    given = leaves | {"target": case.tensors()[1]} | case.options | changed
    return flat(getattr(functional, case.name)(**given))


def total_of(results: list[Tensor]) -> Tensor:
    """Returns a scalar that depends on all results that require grad."""
    terms = [x * torch.linspace(-1, 2, x.numel()).view_as(x) for x in results if x.requires_grad]
    return torch.cat([torch.zeros(1), *[term.flatten() for term in terms]]).sum()


def random_shards(rng: random.Random, classes: int, size: int) -> list[slice]:
    """Draws the classes of each process: any number of them, including none, in any order."""
    cuts = sorted([0, classes, *[rng.randint(0, classes) for _ in range(size - 1)]])
    return rng.sample([slice(*cuts[i : i + 2]) for i in range(size)], size)


def close(got: Tensor, expected: Tensor) -> None:
    finite = expected.detach()[expected.isfinite()].double()
    largest = float(finite.abs().max()) if len(finite) else 0.0
    rounding = 2e-4 if expected.dtype is torch.float32 else 1e-10
    rounding = {"rtol": rounding, "atol": rounding * max(1.0, largest)}
    torch.testing.assert_close(got, expected, equal_nan=True, **rounding)


# ---- steps: every process draws the same numbers -------------------------------------------------


class Process:
    def __init__(self, seed: int) -> None:
        self.rng, self.rank = random.Random(seed), dist.get_rank()
        self.groups = [(ranks, dist.new_group(ranks)) for ranks in GROUPS]
        self.model = nn.parallel.DistributedDataParallel(nn.Linear(3, 5, dtype=torch.float64))
        self.calls = 0

    def draw(self) -> tuple[Case, list[slice], Any, int]:
        """Returns a call, the classes of each process of a group, the group and this one's rank."""
        case, (ranks, group) = self.rng.choice(CASES), self.rng.choice(self.groups)
        self.calls += 1
        rank = ranks.index(self.rank) if self.rank in ranks else -1
        return case, random_shards(self.rng, CLASSES, len(ranks)), group, rank

    def differentiated_together(self) -> None:
        """Runs some calls in several groups, and one backward pass for the sum of their results."""
        rng, total, calls, alone = self.rng, torch.zeros((), dtype=torch.float64), [], False
        grad, create_graph = rng.random() < 0.9, rng.random() < 0.2
        for _ in range(rng.randint(1, 3)):
            case, shards, group, mine = self.draw()
            names = [*case.tensors()[0]]
            frozen = [tuple(x for x in names if rng.random() < 0.3) for _ in shards]
            frozen = frozen if rng.random() < 0.3 else frozen[:1] * len(shards)
            classes = rng.choice([None, CLASSES])
            if mine < 0:
                continue
            own, leaves = shards[mine], leaves_of(case, shards[mine], frozen[mine])
            shard = VocabShard(own.start, classes, group)
            with torch.set_grad_enabled(grad):
                results = results_of(case, leaves, shard=shard)
            whole = leaves_of(case, slice(None))
            expected = results_of(case, whole)
            for result, exact in zip(results, expected, strict=True):
                close(result, exact)
            assert results[0].requires_grad == grad
            if grad:
                total = total + total_of(results)
                alone |= len(frozen[mine]) == len(leaves)
                exact = torch.autograd.grad(total_of(expected), [*whole.values()])
                calls.append((case, own, leaves, exact))
        if not total.requires_grad:
            return
        asked = [x for _, _, leaves, _ in calls for x in leaves.values() if x.requires_grad]
        if alone or rng.random() < 0.5:
            total.backward(create_graph=create_graph)
            found = [x.grad for x in asked]
        else:
            found = [*torch.autograd.grad(total, asked, create_graph=create_graph)]
        for case, own, leaves, exact in calls:
            for (name, leaf), whole_gradient in zip(leaves.items(), exact, strict=True):
                if leaf.requires_grad:
                    close(found.pop(0), case.part(name, whole_gradient, own))

    def data_parallel(self) -> None:
        """The input is the output of a model whose gradients are averaged, or accumulated."""
        rng, generator = self.rng, torch.Generator().manual_seed(self.rng.getrandbits(32))
        x, weight, bias = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((4, 3), (9, 5), (9,))
        )
        target, steps = torch.tensor([0, 8, -100, 3]), rng.randint(1, 3)
        own = random_shards(rng, 9, SIZE)[self.rank]
        self.model.zero_grad()
        for step in range(steps):
            syncs = contextlib.nullcontext() if step == steps - 1 else self.model.no_sync()
            with syncs:
                hidden = self.model(x)
                shard = VocabShard(own.start, rng.choice([None, 9]))
                functional.linear_cross_entropy(
                    hidden, weight[own], target, linear_bias=bias[own], shard=shard
                ).backward()
            self.calls += 1
        layer = self.model.module
        expected = functional.linear_cross_entropy(layer(x), weight, target, linear_bias=bias)
        exact = torch.autograd.grad(expected, [*layer.parameters()])
        for parameter, gradient in zip(layer.parameters(), exact, strict=True):
            close(parameter.grad, steps * gradient)


def sequence(rank: int, seed: int, steps: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=SIZE,
        timeout=datetime.timedelta(seconds=120),
    )
    process = Process(seed)
    kinds = [process.differentiated_together] * 6 + [process.data_parallel]
    warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
    with fused_always():
        for step in range(steps):
            process.rng = random.Random(f"{seed} {step}")
            kind = process.rng.choice(kinds)
            try:
                kind()
            except Exception:
                print(f"seed {seed}, step {step}, {kind.__name__}", flush=True)
                raise
            if step % 3 == 0:  # would hang if a process had made an unpaired collective
                known = torch.tensor([rank + step])
                dist.all_reduce(known)
                assert known.item() == sum(range(SIZE)) + SIZE * step, (seed, step)
    dist.barrier()
    dist.destroy_process_group()
    pipe.send_bytes(pickle.dumps(process.calls))


def test_sequences_of_calls(tmp_path: Any) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    found = [pickle.loads(x) for x in in_processes(sequence, SIZE, seed, STEPS, str(tmp_path))]
    assert len({*found}) == 1
