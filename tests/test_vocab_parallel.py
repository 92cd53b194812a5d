"""Logits with sharded classes give the results of one process, over gloo."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import catalogue
import pytest
import torch
import torch.distributed as dist
from conftest import fused_always
from processes import in_processes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfused import VocabShard, explain, functional, nn
from pyfused.functional import cross_entropy, linear_cross_entropy, linear_log_probs, log_probs
from pyfused.ops.cross_entropy import CrossEntropy
from pyfused.ops.shards import _merged
from pyfused.types import SMOOTHING_FIELDS

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
    pytest.mark.cpu,
]

ROWS, FEATURES, CLASSES = 13, 6, 150
CUTS = [0, 1, 70, 70, CLASSES]  # uneven shards, one of them empty
SIZE = len(CUTS) - 1
WIDE = (torch.float32, torch.float64)


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns input, head, bias and target; a third of the targets are ignored."""
    generator = torch.Generator().manual_seed(3)
    input = torch.randn(ROWS, FEATURES, generator=generator).to(dtype)
    head = torch.randn(CLASSES, FEATURES, generator=generator).to(dtype)
    bias = torch.randn(CLASSES, generator=generator).to(dtype)
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    target[::3] = -100
    return input, head, bias, target


def upstream_of(loss: Tensor) -> Tensor:
    return torch.linspace(1, 2, max(1, loss.numel())).reshape(loss.shape).to(loss.dtype)


DERIVED: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.1, "scale": 0.5}),
    "none": ("cross_entropy", {"reduction": "none", "weight": True, "token_weight": True}),
    "divided": ("cross_entropy", {"denominator": torch.tensor(5.0)}),
    "linear": ("linear_cross_entropy", {"softcap": 4.0, "token_weight": True, "weight": True}),
    "linear_sum": ("linear_cross_entropy", {"reduction": "sum", "label_smoothing": 0.1}),
    "with_metrics": ("cross_entropy_with_metrics", {"reduction": "sum"}),
    "linear_with_metrics": ("linear_cross_entropy_with_metrics", {"z_loss": 0.1}),
    "log_probs": ("log_probs", {"softcap": 4.0, "temperature": 2.0}),
    "linear_log_probs": (
        "linear_log_probs",
        {"softcap": 4.0, "temperature": 0.5, "return_metrics": True},
    ),
}


def derivatives_of(case: str, own: slice, **shard: Any) -> list[list[Tensor]]:
    """Returns three derivatives by the leaves, each of the previous one times random numbers.

    From the second on, grad_output of the value is a leaf, too, the last one.
    """
    name, given = DERIVED[case][0], dict(DERIVED[case][1])
    if "weight" in given:
        given["weight"] = torch.linspace(0.5, 2, CLASSES).double()
    if "token_weight" in given:
        given["token_weight"] = torch.linspace(0, 1, ROWS)
    if of_log_probs := "log_probs" in name:
        given |= {"return_entropy": True, "return_lse": True}
    input, head, bias, target = draw(torch.float64)
    whole = {"input": input, "linear_weight": head, "linear_bias": bias}
    if "linear" not in name:
        whole = {"logits" if of_log_probs else "input": input @ head.t() + bias}

    def own_part(key: str, tensor: Tensor) -> Tensor:
        if "linear" in name:
            return (tensor if key == "input" else tensor[own]).clone()
        return tensor[:, own].clone()

    parts = {key: own_part(key, tensor).requires_grad_() for key, tensor in whole.items()}
    results = getattr(functional, name)(**parts, target=target, **given, **shard)
    value = results if isinstance(results, Tensor) else results[0]
    value = torch.stack([*results]) if of_log_probs else value
    above = upstream_of(value).requires_grad_()
    generator = torch.Generator().manual_seed(11)
    outputs, factors, leaves, found = [value], [above], [*parts.values()], []
    for _ in range(3):
        outputs = [*torch.autograd.grad(outputs, leaves, factors, create_graph=True)]
        assert all(output.requires_grad for output in outputs)
        found.append([output.detach() for output in outputs])
        random = {k: torch.randn(x.shape, generator=generator) for k, x in whole.items()}
        factors = [own_part(key, x).double() for key, x in random.items()]
        if len(leaves) > len(parts):
            factors.append(torch.linspace(-1, 1, above.numel()).view_as(above).double())
        leaves = [*parts.values(), above]
    return found


METRICS_OPTIONS: dict[str, Any] = {"scale": 0.5, "z_loss": 0.1, "reduction": "none"}


def special_logits(dtype: torch.dtype, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns rows with ties, NaN, masked and equal classes; every third target is ignored."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(ROWS * 4, CLASSES, generator=generator)
    logits[1, [10, 60, 120]] = 50.0
    logits[2, [30, 100]] = torch.nan
    logits[4, :70] = -torch.inf
    logits[5] = 3.0
    logits[7] = -torch.inf
    logits[8, 1:] = -torch.inf
    logits[10, [0, 149]] = 50.0
    target = torch.randint(0, CLASSES, (ROWS * 4,), generator=generator)
    target[1], target[8], target[10] = 10, 0, 149
    target[::3] = -100
    logits = logits.view(ROWS * 4 // math.prod(dims), *dims, CLASSES).movedim(-1, 1)
    return logits.to(dtype), target.view(-1, *dims)


def metrics_of(own: slice, dtype: torch.dtype, **shard: Any) -> list[list[Tensor]]:
    """Returns losses, metrics and gradients of logits with more dimensions, and of a head."""
    found = []
    for dims in ((), (2,)):
        logits, target = special_logits(dtype, dims)
        logits = logits[:, own].clone().requires_grad_()
        loss, metrics = functional.cross_entropy_with_metrics(
            logits, target, **METRICS_OPTIONS, **shard
        )
        (gradient,) = torch.autograd.grad(loss, logits, upstream_of(loss))
        found.append([loss.detach(), *metrics, gradient])
    input, head, bias, target = draw(dtype)
    leaves = [x.requires_grad_() for x in (input, head[own].clone(), bias[own].clone())]
    options = {"linear_bias": leaves[2], "softcap": 4.0, "memory_budget": 4000, **METRICS_OPTIONS}
    loss, metrics = functional.linear_cross_entropy_with_metrics(
        *leaves[:2], target, **options, **shard
    )
    gradients = torch.autograd.grad(loss, leaves, upstream_of(loss))
    return [*found, [loss.detach(), *metrics, *gradients]]


def log_probs_metrics_of(own: slice, dtype: torch.dtype, **shard: Any) -> list[Tensor]:
    """Returns is_top1, mean logits, and the gradient of the other results."""
    logits, target = special_logits(dtype, ())
    logits = logits[:, own].clone().requires_grad_()
    results = functional.log_probs(logits, target, return_metrics=True, temperature=0.5, **shard)
    (gradient,) = torch.autograd.grad(results[0].sum(), logits)
    return [results.is_top1, results.mean_logit, gradient]


EMPTY_SIZES = (0, FEATURES), (ROWS, 0)  # rows and features


def of_empty_sizes(own: slice, rows: int, features: int) -> list[Tensor]:
    """Returns losses and gradients of heads without rows or without features."""
    *_, bias, target = draw(torch.float32)
    leaves = torch.ones(rows, features), torch.ones(CLASSES, features)[own], bias[own].clone()
    input, head, bias = (x.requires_grad_() for x in leaves)
    shard, found = VocabShard(own.start, CLASSES), list[Tensor]()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    for function in (linear_cross_entropy, linear_log_probs):
        options: dict[str, Any] = {"linear_bias": bias, "shard": shard}
        if function is linear_cross_entropy:
            options["reduction"] = "none"
        loss = function(input, head, target[:rows], **options)
        loss = loss if isinstance(loss, Tensor) else loss.log_probability
        found += [loss.detach(), *torch.autograd.grad(loss.sum(), (input, head, bias))]
    torch.use_deterministic_algorithms(False)
    return found


def rank_of(rank: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE
    )
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    def counted_gather(out: list[Tensor], tensor: Tensor, *args: Any) -> Any:
        gathered.append(tensor.numel())
        return all_gather(out, tensor, *args)

    gathered: list[int] = []
    all_gather, dist.all_gather = dist.all_gather, counted_gather
    dist.all_reduce = counted
    own = slice(*CUTS[rank : rank + 2])
    found: dict[Any, Any] = {}
    with fused_always():
        input, head, *_, target = draw(torch.float32)
        logits, shard = input @ head[own].t(), VocabShard(own.start, CLASSES)
        for name, call in (
            ("plain", lambda: cross_entropy(logits, target, shard=shard)),
            ("smoothed", lambda: cross_entropy(logits, target, shard=shard, label_smoothing=0.1)),
            ("log_probs", lambda: log_probs(logits, target, shard=shard)),
        ):
            sent.clear()
            call()
            found["sent", name] = sum(sent) / ROWS
        found["gathered"] = [list(gathered)]
        for in_order, dtype in itertools.product((True, False), WIDE):
            place = rank if in_order else SIZE - 1 - rank
            classes = slice(*CUTS[place : place + 2])
            gathered.clear()
            found["metrics", in_order, dtype] = metrics_of(
                classes, dtype, shard=VocabShard(classes.start)
            )
            found["gathered"].append(list(gathered))
            found["log_probs metrics", in_order, dtype] = log_probs_metrics_of(
                classes, dtype, shard=VocabShard(classes.start)
            )
        for case in DERIVED:
            found["derivatives", case] = derivatives_of(case, own, shard=VocabShard(own.start))
        found["modules"] = of_modules(own)
        found["empty"] = [of_empty_sizes(own, *sizes) for sizes in EMPTY_SIZES]
        found["not differentiable"] = not_differentiable(own)
        found["dtensor"] = run_on_dtensors(sent)
        found["dtensors"] = [each for dtype in WIDE for each in of_every_operator(dtype)]
        found["others"] = of_other_placements()
        found["other options"] = of_other_options()
        first, total = 5 * rank, 5 * SIZE
        found["errors"] = [
            told(
                lambda shard=shard, option=option: cross_entropy(
                    torch.zeros(2, 5), torch.tensor([0, total]), shard=shard, **option
                )
            )
            for shard, option in (
                (VocabShard(first + 1, total), {}),
                (VocabShard(first - 1), {}),
                (VocabShard(first, total + 1), {}),
                (VocabShard(first, total), {}),
                (VocabShard(first, total), {"weight": torch.ones(3)}),
                (VocabShard(first), {"gamma": 2.0}),
                (VocabShard(first, -1), {}),
                (VocabShard("0"), {}),
                (0, {}),
            )
        ]
    dist.barrier()
    dist.destroy_process_group()
    file = io.BytesIO()
    torch.save(found, file)  # shared memory of tensors would be lost with the process
    pipe.send_bytes(file.getvalue())


def not_differentiable(own: slice) -> list[Any]:
    """Returns batched gradients, and the errors of calls that have no derivatives."""
    input, head, _, target = draw(torch.float64)
    input, head = input.requires_grad_(), head[own].clone().requires_grad_()
    logits, batch = (input @ head.t()).detach().requires_grad_(), torch.tensor([1.0, -2.0])
    given: dict[str, Any] = {"shard": VocabShard(own.start, CLASSES)}
    loss = cross_entropy(logits, target, **given)
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (each,) = torch.autograd.grad(loss, logits, batch.double(), is_grads_batched=True)
    linear = linear_cross_entropy(input, head, target, **given)
    return [
        torch.allclose(each, torch.stack([one, -2 * one])),
        told(lambda: torch.autograd.grad(linear, input, batch.double(), is_grads_batched=True)),
        *[
            told(lambda option=option: cross_entropy(logits, target, **given, **option))
            for option in (
                {"weight": torch.ones(CLASSES).double().requires_grad_()},
                {"token_weight": torch.ones(ROWS, requires_grad=True)},
                {"denominator": torch.tensor(2.0, requires_grad=True)},
            )
        ],
    ]


def run_on_dtensors(sent: list[int]) -> list[Any]:
    """Returns the path of calls, the numbers sent per row, and the difference to one process."""
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


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found if part is not None for tensor in flat(part)]


def results_of(
    name: str, tensors: dict[str, Tensor], options: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns results of a function, and the gradients of first and second order."""
    leaves = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]
    found = flat(getattr(functional, name)(**tensors, **options))
    total = sum(x.square().sum() for x in found if x.requires_grad)
    gradients = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves, create_graph=True)
    assert all(gradient.requires_grad for gradient in again)
    second = torch.autograd.grad(sum(x.square().sum() for x in again), leaves)
    return found, [*gradients, *second]


def of_every_operator(dtype: torch.dtype) -> list[Any]:
    """Returns paths, results and gradients of calls with DTensors, and of the same plain calls."""
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (2, SIZE // 2))
    whole = [Replicate()] * mesh.ndim
    input, head, bias, target = draw(dtype)
    logits = torch.randn(6, CLASSES, 2, generator=torch.Generator().manual_seed(7)).to(dtype)
    of_logits = torch.arange(12).view(6, 2) * 13
    of_logits[0] = -100
    found = []

    def compare(name: str, given: dict[str, tuple[Tensor, Any]], **options: Any) -> None:
        """Returns tensors with their placements, None for plain tensors."""
        plain = {key: x.clone() for key, (x, _) in given.items()}
        tensors = {
            key: x.clone() if p is None else distribute_tensor(x, mesh, p)
            for key, (x, p) in given.items()
        }
        dim = {key: value for key, value in options.items() if key == "dim"}
        path = explain(name.removesuffix("_with_metrics"), **tensors, **dim)
        results, gradients = results_of(name, tensors, options)
        leaves = [x for x in tensors.values() if x.requires_grad]
        as_leaves = all(
            getattr(grad, "placements", None) == getattr(leaf, "placements", None)
            for grad, leaf in zip(gradients, [*leaves, *leaves], strict=True)
        )
        kinds = {type(x) is type(next(iter(tensors.values()))) for x in results}
        got = [x.full_tensor() if isinstance(x, DTensor) else x for x in (*results, *gradients)]
        expected = [x for part in results_of(name, plain, options) for x in part]
        pairs = [(x.detach(), y.detach()) for x, y in zip(got, expected, strict=True)]
        found.append((path.backend, path.reason, as_leaves, kinds, pairs))

    columns, rows = ([*whole[1:], Shard(dim)] for dim in (1, 0))
    everything = {"return_entropy": True, "return_lse": True}
    for other in (None, whole):
        of_target = of_logits, other
        compare(
            "cross_entropy_with_metrics",
            {"input": (logits, columns), "target": of_target},
            scale=0.5,
        )
        of_tokens = {"logits": (logits, columns), "target": of_target}
        compare("log_probs", of_tokens, dim=1, softcap=4, **everything)
        layer = {"input": (input, whole), "linear_weight": (head, rows), "target": (target, other)}
        compare("linear_cross_entropy", layer, softcap=4, token_weight=torch.linspace(0, 1, ROWS))
        shaped = layer | {"input": (input[None], whole), "target": (target[None], other)}
        compare("linear_cross_entropy_with_metrics", shaped, reduction="none")
        compare("linear_log_probs", shaped, **everything)
        compare("linear_log_probs", layer, memory_budget=4000, **everything)
        compare("linear_log_probs", shaped, return_metrics=True)
        compare("log_probs", of_tokens, dim=1, return_metrics=True, **everything)
        layer["linear_bias"] = bias, rows
        compare("linear_cross_entropy_with_metrics", layer, label_smoothing=0.1, reduction="none")
        compare("linear_log_probs", layer, temperature=2.0)
    return found


def of_other_options() -> list[Any]:
    """Returns paths and results of sharded calls with options that no kernel supports."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    input, head, _, target = draw(torch.float64)
    mask, found = torch.arange(ROWS) % 2, []
    for reduction in ("none", "mean"):
        logits = distribute_tensor(input @ head.t(), mesh, [Shard(1)]).requires_grad_()
        shared = [distribute_tensor(x, mesh, [Replicate()]) for x in (target, mask)]
        options: dict[str, Any] = {"token_weight": shared[1], "reduction": reduction}
        loss = cross_entropy(logits, shared[0], **options)
        loss.sum().backward()
        whole = (input @ head.t()).requires_grad_()
        expected = cross_entropy(whole, target, token_weight=mask, reduction=reduction)
        expected.sum().backward()
        pairs = (loss.full_tensor(), expected), (logits.grad.full_tensor(), whole.grad)
        reason = explain("cross_entropy", logits, shared[0], **options).reason
        found.append((reason, all(torch.allclose(*pair) for pair in pairs)))
    return found


def of_other_placements() -> list[Any]:
    """Returns the reasons of fallbacks for other placements, and their results."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    input, head, _, target = draw(torch.float32)
    input, target = input[:12], target[:12]  # divisible by the number of processes
    whole, rows, columns = ([each] for each in (Replicate(), Shard(0), Shard(1)))
    found: list[Any] = []
    for of_input, of_head, of_target in (
        (rows, whole, rows),  # data-parallel
        (columns, columns, whole),
        (whole, whole, whole),
    ):
        tensors = [
            distribute_tensor(x, mesh, p)
            for x, p in ((input, of_input), (head, of_head), (target, of_target))
        ]
        for name in ("linear_cross_entropy", "linear_log_probs"):
            result = flat(getattr(functional, name)(*tensors))[0].full_tensor()
            expected = flat(getattr(functional, name)(input, head, target))[0]
            far = float((result - expected).abs().max())
            found.append((explain(name, *tensors).reason, far))
    sharded = distribute_tensor(head, mesh, rows)
    shared = distribute_tensor(input, mesh, whole)
    found.append(told(lambda: linear_log_probs(shared, sharded, None)))
    # As with FSDP, where the batch is sharded.
    for call in (linear_cross_entropy, linear_log_probs):
        found.append(explain(call.__name__, input, sharded, target).reason)
        found.append(told(lambda call=call: call(input, sharded, target)))
    return found


def told(call: Any) -> str:
    try:
        call()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = str(tmp_path_factory.mktemp("store"))
    sent = in_processes(rank_of, SIZE, folder)
    return [torch.load(io.BytesIO(found), weights_only=False) for found in sent]


def test_the_numbers_sent_per_row(ranks: list[Any]) -> None:
    """log_probs also sends the entropy."""
    for rank in ranks:
        numbers = [rank["sent", name] for name in ("plain", "smoothed", "log_probs")]
        assert numbers == [3, 4, 4]


@pytest.mark.parametrize("case", DERIVED)
def test_derivatives_of_processes_together(case: str, ranks: list[Any]) -> None:
    """Compares three derivatives with those of the definition on all classes."""
    expected = derivatives_of(case, slice(None))
    linear = "linear" in DERIVED[case][0]
    for order, exact in enumerate(expected):
        for place, exactly in enumerate(exact):
            parts = [rank["derivatives", case][order][place] for rank in ranks]
            if place in ((1, 2) if linear else (0,)):
                parts = [torch.cat(parts, 0 if linear else 1)]
            for part in parts:
                torch.testing.assert_close(part, exactly, rtol=1e-9, atol=1e-9)


def test_metrics_of_processes_together(ranks: list[Any]) -> None:
    """Metrics are correct for any order of the shards, and have the same bits in every process."""
    for in_order, dtype in itertools.product((True, False), WIDE):
        with fused_always():
            expected = metrics_of(slice(None), dtype)
        found = [rank["metrics", in_order, dtype] for rank in ranks]
        for case, *parts in zip(expected, *(found if in_order else found[::-1]), strict=True):
            head = len(case) > 7  # has gradients of input, weight and bias
            for part in parts:
                torch.testing.assert_close(part[: 6 + head], case[: 6 + head], equal_nan=True)
                same = zip(part[1:6], parts[0][1:6], strict=True)
                assert all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in same)
            for place in (7, 8) if head else (6,):
                joined = torch.cat([part[place] for part in parts], 0 if head else 1)
                torch.testing.assert_close(joined, case[place], equal_nan=True)


def test_metrics_of_log_probs_of_processes_together(ranks: list[Any]) -> None:
    for in_order, dtype in itertools.product((True, False), WIDE):
        found = [rank["log_probs metrics", in_order, dtype] for rank in ranks]
        expected = log_probs_metrics_of(slice(None), dtype)
        logits, target = special_logits(dtype, ())
        counted = target != -100
        exact = (logits.argmax(1) == target) & counted, logits.mean(1).where(counted, 0) / 0.5
        for *metrics, _ in (*found, expected):
            torch.testing.assert_close(metrics, [*exact], equal_nan=True)
        gradients = [gradient for *_, gradient in (found if in_order else found[::-1])]
        torch.testing.assert_close(torch.cat(gradients, 1), expected[-1], equal_nan=True)


def test_definition_of_metrics(ranks: list[Any]) -> None:
    for in_order, dims in itertools.product((True, False), ((), (2,))):
        logits, target = special_logits(torch.float64, dims)
        _, expected = catalogue.cross_entropy(
            logits, target, scale=METRICS_OPTIONS["scale"], with_metrics=True
        )
        for rank in ranks:
            own = rank["metrics", in_order, torch.float64][len(dims)][1:6]
            for mine, best in zip(own, expected, strict=True):
                torch.testing.assert_close(mine, best, equal_nan=True)


def test_metrics_are_gathered_once(ranks: list[Any]) -> None:
    """Metrics gather two numbers per row, in addition to the numbers that check each call."""
    for rank in ranks:
        without, *each = rank["gathered"]
        (few,) = {*without}
        assert without == [few] * 3
        assert each == [[few, 2 * ROWS * 4, few, 2 * ROWS * 4, few, 2 * ROWS]] * 4


def tolerance_of(expected: Tensor) -> dict[str, float]:
    """The error of a sum is relative to its largest term; second derivatives are large."""
    if not expected.is_floating_point():
        return {}
    rounding = 1e-5 if expected.dtype is torch.float32 else 1e-11
    return {"rtol": rounding, "atol": rounding * max(1.0, float(expected.abs().max()))}


def test_every_operator_supports_dtensors(ranks: list[Any]) -> None:
    """Gradients have the placements of their tensors, results those of the input."""
    for rank in ranks:
        assert len(rank["dtensors"]) == 40
        for backend, strategy, as_leaves, kinds, pairs in rank["dtensors"]:
            assert (backend, strategy) == ("cpu", "each process computes its classes")
            assert as_leaves
            assert kinds == {True}
            for got, expected in pairs:
                torch.testing.assert_close(got, expected, **tolerance_of(expected))


def test_other_placements_fall_back(ranks: list[Any]) -> None:
    for rank in ranks:
        *of_torch, no_target, reason, error, other_reason, other_error = rank["others"]
        for why, far in of_torch:
            assert why == "input is a DTensor"
            assert far < 1e-4
        assert no_target == "TypeError: target: expected a Tensor, got NoneType"
        assert reason == other_reason == "linear_weight is a DTensor"
        assert all("mixed torch.Tensor and DTensor" in each for each in (error, other_error))


def test_unsupported_options_fall_back(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["other options"] == [("input is a DTensor", True)] * 2


def of_modules(own: slice) -> list[Any]:
    """Compares modules with a shard to modules with all classes."""
    input, head, bias, target = draw(torch.float32)
    logits, shard = input @ head.t() + bias, VocabShard(own.start, CLASSES)
    found = []
    whole: torch.nn.Module
    part: torch.nn.Module
    for whole, part in (
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(shard=shard)),
        (nn.LogProbs(), nn.LogProbs(shard=shard)),
    ):
        far = flat(part(logits[:, own], target))[0] - flat(whole(logits, target))[0]
        found.append((float(far.abs().max()), "VocabShard" in repr(part)))
    size = own.stop - own.start
    for module in (nn.LinearCrossEntropyLoss, nn.LinearLogProbs):
        kinds: list[Any] = [(CLASSES, slice(None), {}), (size, own, {"shard": shard})]
        results = []
        for classes, rows, more in kinds:
            layer = module(FEATURES, classes, bias=True, **more)
            layer.linear.weight.data, layer.linear.bias.data = head[rows], bias[rows]
            results.append(flat(layer(input, target))[0])
        found.append((float((results[1] - results[0]).abs().max()), "VocabShard" in repr(layer)))
    found.append(explain("cross_entropy", logits[:, own], target, shard=shard).reason)
    return found


def test_modules_with_a_shard(ranks: list[Any]) -> None:
    for rank in ranks:
        *modules, said = rank["modules"]
        assert all(far < 1e-5 and shown for far, shown in modules)
        assert said == "each process computes its classes"


@pytest.mark.parametrize("index", range(len(EMPTY_SIZES)))
def test_heads_without_rows_or_features(index: int, ranks: list[Any]) -> None:
    rows, _ = EMPTY_SIZES[index]
    *_, bias, target = draw(torch.float32)
    logits = bias.expand(rows, -1).clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits, target[:rows], reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    for rank, (start, end) in zip(ranks, itertools.pairwise(CUTS), strict=True):
        for sign, found in ((1, rank["empty"][index][:4]), (-1, rank["empty"][index][4:])):
            loss, grad_input, grad_head, grad_bias = found
            torch.testing.assert_close(sign * loss, expected.detach())
            torch.testing.assert_close(sign * grad_bias, gradient.sum(0)[start:end])
            assert not grad_input.any()
            assert not grad_head.any()


class NoIndices(TorchDispatchMode):
    """Raises for indices that are not slices: those of a list would be copied to the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put_)
        return func(*args, **(kwargs or {}))


def test_calls_on_gpus_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of meta tensors cannot be read."""
    gathered: list[torch.device] = []

    def merged(_: Any, arguments: Any, shard: Any) -> Tensor:
        state = torch.empty(SMOOTHING_FIELDS, 2, device="meta", dtype=torch.float64)
        return _merged(state, arguments[1], shard, False)

    for name, function in (
        ("all_reduce", lambda *_: None),
        ("all_gather", lambda _, tensor, group: gathered.append(tensor.device)),
        ("get_rank", lambda _: 0),
        ("get_world_size", lambda _: 1),
        ("get_backend", lambda _: "gloo"),
    ):
        monkeypatch.setattr(dist, name, function)
    monkeypatch.setattr(CrossEntropy, "compute_shard", merged)
    monkeypatch.setattr(CrossEntropy, "unsupported_tensor", lambda *_: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    logits, target = torch.empty(2, 5, device="meta"), torch.zeros(2, device="meta").long()
    with NoIndices():
        cross_entropy(logits, target, shard=VocabShard(0, 5))
        cross_entropy(logits, target, torch.empty(5, device="meta"), shard=VocabShard(0))
    with pytest.raises(ValueError, match=r"shard: expected classes in \[0, 5\) .*, got \[1, 6\)"):
        cross_entropy(logits, target, shard=VocabShard(1, 5))
    with pytest.raises(RuntimeError, match="meta"):  # the sum over the processes is read
        cross_entropy(logits, target, shard=VocabShard(0))
    assert not gathered
    monkeypatch.setattr(dist, "get_debug_level", lambda: dist.DebugLevel.INFO)
    with pytest.raises(RuntimeError, match="meta"):
        cross_entropy(logits, target, shard=VocabShard(0, 5))
    assert gathered == [logits.device]


def test_dtensors_take_the_same_path(ranks: list[Any]) -> None:
    for rank in ranks:
        *shared, other = rank["dtensor"]
        for backend, strategy, numbers, far in shared:
            assert (backend, strategy, numbers) == ("cpu", "each process computes its classes", 4)
            assert far < 1e-5
        assert other == "input is a DTensor"


def test_missing_derivatives_raise(ranks: list[Any]) -> None:
    for rank in ranks:
        batch_is_right, batched, *constants = rank["not differentiable"]
        assert batch_is_right
        assert batched.startswith(
            "RuntimeError: Batching rule not implemented for c10d::allreduce_"
        )
        for name, error in zip(("weight", "token_weight", "denominator"), constants, strict=True):
            assert error == (
                f"RuntimeError: {name}: expected a tensor that the kernels support with a "
                f"shard, but {name} requires grad"
            )


def test_bad_input(ranks: list[Any]) -> None:
    total = 5 * len(ranks)
    for rank in ranks:
        late, early, short, index, weight, gamma, negative, number, no_shard = rank["errors"]
        for of_all, shift, end in ((late, 1, total), (early, -1, total), (short, 0, total + 1)):
            parts = ", ".join(f"[{i + shift}, {i + shift + 5})" for i in range(0, total, 5))
            assert of_all == (
                f"ValueError: shard: expected each class of [0, {end}) in exactly one process, "
                f"got {parts}"
            )
        assert f"IndexError: target: expected class indices in [0, {total})" in index
        assert f"RuntimeError: weight: expected shape ({total},)" in weight
        assert gamma == "ValueError: gamma: expected 0.0 with a shard, got 2.0"
        assert negative == "ValueError: classes: expected a number of at least 0.0, got -1.0"
        assert number == "TypeError: first: expected an int, got str '0'"
        assert no_shard == "TypeError: shard: expected a VocabShard, got int"
