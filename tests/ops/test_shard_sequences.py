"""Random sequences of calls with sharded classes: the collectives of all processes stay paired."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import pickle
import random
import traceback
import warnings
from typing import Any, NamedTuple

import pytest
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
                with pytest.raises(ValueError, match="a group that this process is a member of"):
                    results_of(
                        case, leaves_of(case, shards[0]), shard=VocabShard(0, classes, group)
                    )
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


# ---- weights of other dtypes ---------------------------------------------------------------------

# A sum of as many weights in half precision is inf, or loses most of its digits.
TOKENS = 70000
# The relative errors of gradients by the dtype of the input. Losses are float32 or float64.
TOLERANCES = {
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


class Weighted(NamedTuple):
    """A call whose weights have a dtype; `names` are the arguments that are given."""

    function: str
    input_dtype: torch.dtype
    dtype: torch.dtype
    names: tuple[str, ...]
    reduction: str = "mean"

    @property
    def id(self) -> str:
        dtypes = [str(x).removeprefix("torch.") for x in (self.input_dtype, self.dtype)]
        return "-".join([self.function, *dtypes, *self.names, self.reduction])


def weighted_calls() -> list[Weighted]:
    """Class weights have the dtype of the input; other weights may have any."""
    halves, functions = (torch.float16, torch.bfloat16), ("cross_entropy", "linear_cross_entropy")
    found: list[Weighted] = []
    for function, input_dtype in itertools.product(functions, (torch.float32, torch.float64)):
        call = Weighted(function, input_dtype, torch.bool, ("token_weight",))
        found += [call._replace(dtype=dtype) for dtype in (*TOLERANCES, torch.bool)]
        found += [call._replace(dtype=dtype, names=("denominator",)) for dtype in halves]
        if input_dtype is torch.float32:
            unreduced = call._replace(reduction="none")
            found += [unreduced._replace(dtype=dtype) for dtype in (*halves, torch.bool)]
    for function, dtype in itertools.product(functions, TOLERANCES):
        call = Weighted(function, dtype, dtype, ("weight",))
        found += [call, call._replace(names=("weight", "token_weight"))]
    return found


def draw_weights(call: Weighted, generator: torch.Generator) -> dict[str, Tensor]:
    kept = torch.rand(TOKENS, generator=generator) < 0.97
    factors = torch.rand(TOKENS, generator=generator)
    weights = {
        "weight": torch.rand(8, generator=generator) + 0.5,
        "token_weight": kept if call.dtype is torch.bool else kept * (1 + factors),
        "denominator": torch.tensor(3001.0),
    }
    return {name: weights[name].to(call.dtype) for name in call.names}


def weighted_loss(
    logits: Tensor, target: Tensor, weights: dict[str, Tensor], reduction: str
) -> Tensor:
    """Returns the loss with smoothing of float64 logits, computed in float64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    class_weight, token_weight = weights.get("weight"), weights.get("token_weight", 1.0)
    rows = token_weight * nn.functional.cross_entropy(
        logits, target, class_weight, reduction="none", label_smoothing=0.1
    )
    if reduction == "none":
        return rows
    divisors = (target != -100) * token_weight
    if class_weight is not None:
        divisors = divisors * class_weight[target.clamp(0)]
    return rows.sum() / weights.get("denominator", divisors.sum())


def check_weights(call: Weighted, own: slice, group: Any) -> None:
    """Compares the loss and the gradients of a process with those of all classes in float64."""
    generator = torch.Generator().manual_seed(8)
    x, head = (torch.randn(n, 4, generator=generator).to(call.input_dtype) for n in (TOKENS, 8))
    target = torch.randint(8, (TOKENS,), generator=generator)
    target[::7] = -100
    weights = draw_weights(call, generator)
    if call.function == "linear_cross_entropy":
        parts, whole = [x, head[own]], [x.double(), head.double()]
        take = [slice(None), own]
    else:
        logits = x @ head.t()
        parts, whole, take = [logits[:, own]], [logits.double()], [(slice(None), own)]
    whole = [x.requires_grad_() for x in whole]
    scores = whole[0] @ whole[1].t() if len(whole) > 1 else whole[0]
    exact = weighted_loss(scores, target, weights, call.reduction)
    grad = 4096 * torch.linspace(1, 2, exact.numel(), dtype=torch.float64).view_as(exact)
    gradients = torch.autograd.grad(exact, whole, grad)
    expected = [x[part] for x, part in zip(gradients, take, strict=True)]
    tolerance = TOLERANCES[call.input_dtype]
    of_loss = min(tolerance, 1e-6)
    if call.function == "linear_cross_entropy" and call.input_dtype.itemsize == 2:
        # Some processors round the logits to half precision, with a random error in each row.
        of_loss = 2 * torch.finfo(call.input_dtype).eps / TOKENS**0.5
    dtype = torch.float64 if call.input_dtype is torch.float64 else torch.float32
    options: Any = {"label_smoothing": 0.1, "reduction": call.reduction, "loss_dtype": dtype}
    options["shard"] = VocabShard(own.start, 8, group)
    for create_graph in (False, True):
        leaves = [x.clone().requires_grad_() for x in parts]
        given = (*leaves, target)
        loss = getattr(functional, call.function)(*given, **options, **weights)
        got = torch.autograd.grad(loss, leaves, grad.to(dtype), create_graph=create_graph)
        bounds = of_loss, *[tolerance] * len(got)
        for value, right, bound in zip((loss, *got), (exact, *expected), bounds, strict=True):
            error = (value.double() - right).norm() / right.norm()
            assert error <= bound, f"{error:.3g} with create_graph={create_graph}"


def weights_in_processes(rank: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    alone = [dist.new_group([i]) for i in range(2)][rank]
    sizes = {1: (slice(0, 8), alone), 2: (slice(4 * rank, 4 * rank + 4), None)}
    failures = {}
    with fused_always():
        for call, size in itertools.product(weighted_calls(), sizes):
            try:
                check_weights(call, *sizes[size])
            except Exception:  # noqa: PERF203
                failures[call.id, size] = traceback.format_exc()
    dist.barrier()
    dist.destroy_process_group()
    pipe.send_bytes(pickle.dumps(failures))


@pytest.fixture(scope="module")
def failures_of_weights(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, str]]:
    folder = str(tmp_path_factory.mktemp("store"))
    return [pickle.loads(found) for found in in_processes(weights_in_processes, 2, folder)]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", [call.id for call in weighted_calls()])
def test_weights_of_other_dtypes(
    name: str, size: int, failures_of_weights: list[dict[Any, str]]
) -> None:
    for rank, failures in enumerate(failures_of_weights):
        assert (name, size) not in failures, f"rank {rank}: {failures[name, size]}"
