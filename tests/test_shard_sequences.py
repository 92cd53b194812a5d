"""Random calls with sharded classes, compared with one process; collectives stay paired."""

from __future__ import annotations

import contextlib
import datetime
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import fused_always
from processes import in_processes
from torch import Tensor, nn

from pyfused import VocabShard, functional

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
    pytest.mark.cpu,
]

SIZE, STEPS = 4, 24
GROUPS = ([0, 1, 2, 3], [0, 1], [2, 3], [1, 3], [0, 1, 2], [1, 2, 3])
NAMES = ("cross_entropy", "cross_entropy_with_metrics", "log_probs")
OPTIONS: dict[str, Callable[[random.Random], Any]] = {
    "softcap": lambda rng: rng.uniform(1, 9),
    "temperature": lambda rng: rng.uniform(0.5, 2),
    "ignore_index": lambda rng: rng.randint(-3, 3),
}
OF_LOSSES: dict[str, Callable[[random.Random], Any]] = {
    "reduction": lambda rng: rng.choice(["none", "sum", "mean"]),
    "label_smoothing": lambda rng: rng.uniform(0, 0.9),
    "z_loss": lambda rng: rng.uniform(0, 0.5),
    "scale": lambda rng: rng.uniform(0.5, 2),
}


class Call(NamedTuple):
    """A call with all classes.

    Attributes:
        tensors: Tensors by name, which may require grad; the first is the input or the logits.
        options: The other arguments.
    """

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def classes(self) -> int:
        tensors = [*self.tensors.values()]
        return tensors[1].shape[0] if "linear" in self.name else tensors[0].shape[1]

    def ignored(self) -> Tensor:
        """Returns which rows do not count."""
        ignored: Tensor = self.options["target"] == self.options.get("ignore_index", -100)
        weight = self.options.get("token_weight")
        return ignored if weight is None else ignored | (weight == 0)

    def part(self, name: str, tensor: Tensor, own: slice) -> Tensor:
        """Returns the classes of this process of a tensor or of its gradient."""
        if "linear" in self.name:
            return tensor if name == "input" else tensor[own]
        return tensor[:, own]

    def leaves(self, own: slice = slice(None), frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
        return {
            name: self.part(name, tensor, own).clone().requires_grad_(name not in frozen)
            for name, tensor in self.tensors.items()
        }

    def results(self, leaves: dict[str, Tensor], **shard: Any) -> list[Tensor]:
        return flat(getattr(functional, self.name)(**leaves, **self.options, **shard))

    def total(self, results: list[Tensor]) -> Tensor:
        """Returns a scalar that depends on all differentiable results."""
        differentiated = results[: 3 if "log_probs" in self.name else 1]
        terms = [x * torch.linspace(-1, 2, x.numel()).view_as(x) for x in differentiated]
        return torch.cat([term.flatten() for term in terms]).sum()


def flat(found: Any) -> list[Tensor]:
    if found is None or isinstance(found, Tensor):
        return [] if found is None else [found]
    return [x for each in found for x in flat(each)]


def random_call(rng: random.Random, dtype: torch.dtype, infinite: bool) -> Call:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    linear, name, rows = rng.random() < 0.5, rng.choice(NAMES), rng.randint(1, 6)
    classes, more = rng.randint(1, 30), (2,) * (rng.random() < 0.3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype) * rng.choice([1, 5])

    tensors, options = {}, {}
    if linear:
        features, several = rng.randint(1, 5), rng.random() < 0.5
        leading, positions = ((rows,), more) if several else ((*more, rows), ())
        tensors["input"] = normal(*leading, features)
        tensors["linear_weight"] = normal(classes, *positions, features)
        if rng.random() < 0.5:
            tensors["linear_bias"] = normal(classes, *positions)
        shape = *leading, *positions
    else:
        logits, shape = normal(rows, classes, *more), (rows, *more)
        if infinite and classes > 1 and rng.random() < 0.2:  # torch has NaN for one class
            logits[0, rng.randrange(classes)] = rng.choice([-1, 1, torch.nan]) * torch.inf
        tensors["logits" if name == "log_probs" else "input"] = logits
    chosen = dict(OPTIONS) if name == "log_probs" else OPTIONS | OF_LOSSES
    options = {key: draw(rng) for key, draw in chosen.items() if rng.random() < 0.3}
    target = torch.randint(0, classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.2] = options.get("ignore_index", -100)
    options["target"] = target
    if name == "log_probs":
        options |= {"return_entropy": True, "return_lse": True}
        options |= {} if linear else {"dim": 1}
        options["return_metrics"] = rng.random() < 0.3
    else:
        if rng.random() < 0.3:
            options["weight"] = normal(classes).abs()
        if rng.random() < 0.3:
            options["token_weight"] = normal(*shape).relu()
        if rng.random() < 0.3 and options.get("reduction", "mean") == "mean":
            denominator = rng.uniform(1, 9)
            options["denominator"] = rng.choice([denominator, torch.tensor(denominator)])
    call = Call(f"{'linear_' * linear}{name}", tensors, options)
    if rng.random() < 0.3:
        scores, ignored = next(iter(tensors.values())), call.ignored()
        rows = scores if linear else scores.movedim(1, -1)
        positions = ignored.dim() >= rows.dim()
        rows[ignored.flatten(rows.dim() - 1).all(-1) if positions else ignored] = torch.nan
    return call


def random_shards(rng: random.Random, classes: int, size: int) -> list[slice]:
    """Draws the classes of each process: any number of them, including none, in any order."""
    cuts = sorted([0, classes, *[rng.randint(0, classes) for _ in range(size - 1)]])
    return rng.sample([slice(*cuts[i : i + 2]) for i in range(size)], size)


def largest(shards: list[slice]) -> int:
    return max(range(len(shards)), key=lambda i: shards[i].stop - shards[i].start)


@contextlib.contextmanager
def comparing(enabled: bool = True) -> Iterator[None]:
    """Makes processes compare their calls, as TORCH_DISTRIBUTED_DEBUG=INFO does."""
    dist.set_debug_level(dist.DebugLevel.INFO if enabled else dist.DebugLevel.OFF)
    try:
        yield
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


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
        self.mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
        self.errors: dict[int, tuple[str, str]] = {}
        self.step = self.calls = 0

    def draw(
        self, dtype: torch.dtype = torch.float64, infinite: bool = False
    ) -> tuple[Call, list[slice], Any, int]:
        """Returns a call, the classes of each process of a group, the group and this one's rank."""
        call = random_call(self.rng, dtype, infinite)
        ranks, group = self.rng.choice(self.groups)
        self.calls += 1
        rank = ranks.index(self.rank) if self.rank in ranks else -1
        return call, random_shards(self.rng, call.classes, len(ranks)), group, rank

    def differentiated_together(self) -> None:
        """Runs some calls in several groups, and one backward pass for the sum of their results."""
        rng, total, calls, alone = self.rng, torch.zeros((), dtype=torch.float64), [], False
        grad, create_graph = rng.random() < 0.9, rng.random() < 0.2
        for _ in range(rng.randint(1, 3)):
            dtype = rng.choice([torch.float64] * 9 + [torch.float32])
            autocast = dtype is torch.float64 and rng.random() < 0.2  # not affected by autocast
            call, shards, group, mine = self.draw(dtype, not create_graph)
            frozen = [tuple(x for x in call.tensors if rng.random() < 0.3) for _ in shards]
            frozen = frozen if rng.random() < 0.3 else frozen[:1] * len(shards)
            totals, alike = [rng.choice([None, call.classes]) for _ in shards], rng.random() < 0.3
            totals = totals[:1] * len(shards) if alike else totals  # otherwise compared
            if mine < 0:
                continue
            own, leaves = shards[mine], call.leaves(shards[mine], frozen[mine])
            modes = torch.autocast("cpu", enabled=autocast), torch.set_grad_enabled(grad)
            with modes[0], modes[1], comparing(not alike):
                results = call.results(leaves, shard=VocabShard(own.start, totals[mine], group))
            whole = call.leaves()
            expected = call.results(whole)
            for result, exact in zip(results, expected, strict=True):
                close(result, exact)
            assert results[0].requires_grad == grad
            if grad:
                total = total + call.total(results)
                alone |= len(frozen[mine]) == len(leaves)
                exact = torch.autograd.grad(call.total(expected), [*whole.values()])
                calls.append((call, own, leaves, exact))
        if not total.requires_grad:
            return
        asked = [x for _, _, leaves, _ in calls for x in leaves.values() if x.requires_grad]
        if alone or rng.random() < 0.5:
            total.backward(create_graph=create_graph)
            found = [x.grad for x in asked]
        else:
            found = [*torch.autograd.grad(total, asked, create_graph=create_graph)]
        for call, own, leaves, exact in calls:
            for (name, leaf), whole_gradient in zip(leaves.items(), exact, strict=True):
                if leaf.requires_grad:
                    close(found.pop(0), call.part(name, whole_gradient, own))

    def second_derivatives(self) -> None:
        call, shards, group, mine = self.draw()
        if mine < 0:
            return
        own, alike, found = shards[mine], self.rng.random() < 0.5, []
        for part, shard in ((slice(None), None), (own, VocabShard(own.start, None, group))):
            leaves, generator = call.leaves(part), torch.Generator().manual_seed(1)
            with comparing(not alike):
                total = call.total(call.results(leaves, shard=shard))
            first = torch.autograd.grad(total, [*leaves.values()], create_graph=True)
            factors = [
                call.part(name, torch.randn(x.shape, generator=generator, dtype=x.dtype), part)
                for name, x in call.tensors.items()
            ]
            found.append(torch.autograd.grad(first, [*leaves.values()], factors))
        for name, expected, got in zip(call.tensors, *found, strict=True):
            close(got, call.part(name, expected, own))

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

    def refused(self) -> None:
        """One process has an argument that does not match the others: all processes raise."""
        (call, shards, group, mine), kind = self.draw(), self.rng.choice([*REFUSED])
        if mine < 0:
            return
        own, classes = shards[mine], self.rng.choice([None, call.classes])
        given, leaves = call.options | {"first": own.start, "classes": classes}, call.leaves(own)
        if mine == largest(shards):
            for name, change in REFUSED[kind].items():
                given[name] = change(given.get(name))
            if kind == "no tensor":
                leaves[[*leaves]["linear" in call.name]] = None  # type: ignore[assignment]
        shard = VocabShard(given.pop("first"), given.pop("classes"), group)
        try:
            grad = kind != "grad mode" or mine != largest(shards)
            with torch.set_grad_enabled(grad), comparing():
                call._replace(options=given).results(leaves, shard=shard)
        except (RuntimeError, TypeError, ValueError) as error:
            self.errors[self.step] = kind, f"{type(error).__name__}: {error}"
        else:
            raise AssertionError(f"no error of {kind}: {call}")

    def run_on_dtensors(self) -> None:
        """Tests few classes, of which some processes have none, and frozen tensors."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        self.calls += 1
        generator = torch.Generator().manual_seed(self.rng.getrandbits(32))
        input, weight = (
            torch.randn(rows, 3, generator=generator, dtype=torch.float64)
            for rows in (5, self.rng.randint(1, 9))
        )
        target = torch.arange(5) % len(weight)
        frozen = [self.rng.random() < 0.5 for _ in range(2)]
        given = [
            distribute_tensor(tensor, self.mesh, [placement]).detach().requires_grad_(not constant)
            for tensor, placement, constant in zip(
                (input, weight), (Replicate(), Shard(0)), frozen, strict=True
            )
        ]
        loss = functional.linear_cross_entropy(*given, target)
        whole = input.requires_grad_(), weight.requires_grad_()
        expected = functional.linear_cross_entropy(*whole, target)
        close(loss.full_tensor(), expected)
        exact = torch.autograd.grad(expected, whole)
        if loss.requires_grad:
            loss.backward()
        for tensor, constant, gradient in zip(given, frozen, exact, strict=True):
            assert (tensor.grad is None) == constant
            if not constant:
                close(tensor.grad.full_tensor(), gradient)

    def under_autocast(self) -> None:
        """Results equal those of input, weight and bias converted to half precision."""
        call = random_call(self.rng, torch.float32, False)
        own = random_shards(self.rng, call.classes, SIZE)[self.rank]
        self.calls += 1
        if "linear" not in call.name:
            return
        # Processors without bfloat16 products do not round the weight. These values are exact in
        # both dtypes.
        tensors = {name: x.bfloat16().float() for name, x in call.tensors.items()}
        call = call._replace(tensors=tensors)
        shard = VocabShard(own.start)
        leaves = call.leaves(own)
        with torch.autocast("cpu", torch.bfloat16):
            results = call.results(leaves, shard=shard)
            whole = call.leaves()
            alike = call.results(whole)
        assert [x.dtype for x in results] == [x.dtype for x in alike]
        call.total(results).backward()
        call.total(alike).backward()
        for name, leaf in leaves.items():
            assert leaf.grad.dtype is torch.float32
            exact = call.part(name, whole[name].grad, own)
            largest = max(1.0, float(whole[name].grad.abs().max()))
            torch.testing.assert_close(
                leaf.grad, exact, rtol=0.05, atol=0.05 * largest, equal_nan=True
            )
        halves = {name: tensor.detach().bfloat16() for name, tensor in leaves.items()}
        if "weight" in call.options:
            call.options["weight"] = call.options["weight"].bfloat16()
        if "log_probs" not in call.name:
            call.options["loss_dtype"] = torch.float32
        for got, expected in zip(results, call.results(halves, shard=shard), strict=True):
            torch.testing.assert_close(got, expected, rtol=0.01, atol=1e-4, equal_nan=True)


REFUSED: dict[str, dict[str, Callable[[Any], Any]]] = {
    "overlap or gap": {"first": lambda first: first + 1},
    "before": {"first": lambda first: first - 1},
    "total": {"classes": lambda _: 99},
    "target": {"target": lambda target: target + 1},
    "options": {"softcap": lambda _: 3.14},
    "shape": {"target": lambda _: torch.zeros(1, 2, 3, 4, dtype=torch.int64)},
    "type": {"target": lambda _: None},
    "number": {"first": lambda _: 0.5},
    "no tensor": {},
    "grad mode": {},
}


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
    kinds = [process.differentiated_together] * 6 + [process.refused] * 2
    kinds += [process.second_derivatives, process.data_parallel]
    kinds += [process.run_on_dtensors, process.under_autocast]
    warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
    with fused_always():
        for step in range(steps):
            process.rng, process.step = random.Random(f"{seed} {step}"), step
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
    pipe.send_bytes(pickle.dumps((process.calls, process.errors)))


def test_sequences_of_calls(tmp_path: Any) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    found = [pickle.loads(x) for x in in_processes(sequence, SIZE, seed, STEPS, str(tmp_path))]
    check(found)


def check(found: list[tuple[int, dict[int, tuple[str, str]]]]) -> None:
    """Checks that all processes of a call raise the same error, or refer to the error of one."""
    assert len({calls for calls, _ in found}) == 1
    for step in {step for _, errors in found for step in errors}:
        raised = [errors[step] for _, errors in found if step in errors]
        (kind,) = {kind for kind, _ in raised}
        messages = [message for _, message in raised]
        assert len(messages) > 1
        others = [message for message in messages if "got invalid ones in ranks" in message]
        if others:  # a wrong number of classes also does not match the weight
            assert kind in ("shape", "type", "no tensor", "number", "total")
            assert len(others) == len(messages) - 1
        else:
            others = messages
            assert kind not in ("shape", "type", "no tensor", "number")
        assert len({*others}) == 1
        assert others[0].startswith(("ValueError: shard", "ValueError: target", "RuntimeError: sh"))
