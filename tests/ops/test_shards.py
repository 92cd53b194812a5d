"""Logits with sharded classes give the results of one process, over gloo.

Every process runs all checks, in one order; a test fails if its check fails in one of them.
"""

from __future__ import annotations

import gc
import inspect
import math
import random
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from compare import Recording, flattened, outcome
from processes import run_checks
from torch import Tensor
from torch.autograd import forward_ad

from pyfused import VocabShard, explain, functional
from pyfused.dispatch import run as dispatch
from pyfused.functional import cross_entropy, linear_cross_entropy
from pyfused.ops import shards
from pyfused.ops.cross_entropy import CrossEntropy
from pyfused.types import SMOOTHING_FIELDS

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not dist.is_available(), reason="no distributed")]

ROWS, FEATURES, CLASSES = 13, 6, 150
CUTS = [0, 1, 70, 70, CLASSES]  # uneven shards, one of them empty
SIZE = len(CUTS) - 1
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Process:
    """A process, and the sizes of the tensors that it has sent."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.classes = slice(*CUTS[SIZE - 1 - rank :][:2])  # the last process has the first classes
        self.groups = [(ranks, dist.new_group(ranks)) for ranks in GROUPS]
        self.reduced: list[int] = []
        self.gathered: list[int] = []
        self.record("all_reduce", 0, self.reduced)
        self.record("all_gather", 1, self.gathered)

    def record(self, name: str, position: int, sizes: list[int]) -> None:
        original = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            sizes.append(args[position].numel())
            return original(*args, **kwargs)

        setattr(dist, name, collective)

    def sent(self) -> tuple[list[int], list[int]]:
        """Returns the sizes of the tensors reduced and gathered since the last call."""
        sizes = list(self.reduced), list(self.gathered)
        self.reduced.clear()
        self.gathered.clear()
        return sizes


CHECKS: dict[str, Callable[[Process], None]] = {}


def check(**cases: Any) -> Any:
    """Registers a function, which every process calls with each case."""

    def register(function: Any) -> Any:
        for name, case in cases.items():
            CHECKS[f"{function.__name__}-{name}"] = partial(function, case=case)
        return function

    return register


def error_of(call: Any) -> str:
    error = outcome(call)
    return f"{type(error).__name__}: {error}"


# ---- calls ---------------------------------------------------------------------------------------


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns input, head, bias and target; a third of the targets are ignored."""
    generator = torch.Generator().manual_seed(3)
    input = torch.randn(ROWS, FEATURES, generator=generator).to(dtype)
    head = torch.randn(CLASSES, FEATURES, generator=generator).to(dtype)
    bias = torch.randn(CLASSES, generator=generator).to(dtype)
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    target[::3] = -100
    return input, head, bias, target


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


class Case(NamedTuple):
    """A call. `dims` are the dimensions after the classes of logits with special values."""

    name: str
    options: dict[str, Any]
    twice: bool = False  # whether to differentiate the gradients, too
    dtype: torch.dtype = F64
    dims: tuple[int, ...] | None = None

    def tensors(self) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the tensors with all classes, and the target."""
        input, head, bias, target = draw(self.dtype)
        if "linear" in self.name:
            return {"input": input, "linear_weight": head, "linear_bias": bias}, target
        logits = input @ head.t() + bias
        if self.dims is not None:
            logits, target = special_logits(self.dtype, self.dims)
        return {"logits" if "log_probs" in self.name else "input": logits}, target

    def part(self, key: str, tensor: Tensor, classes: slice) -> Tensor:
        if "linear" in self.name:
            return (tensor if key == "input" else tensor[classes]).clone()
        return tensor[:, classes].clone()

    def leaves(self, classes: slice, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
        whole = self.tensors()[0].items()
        return {n: self.part(n, x, classes).requires_grad_(n not in frozen) for n, x in whole}

    def results(self, leaves: dict[str, Tensor], **shard: Any) -> list[Tensor]:
        given = leaves | {"target": self.tensors()[1]} | self.options | shard
        return flattened(getattr(functional, self.name)(**given))

    def outcome(self, classes: slice, **shard: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Returns the results, the gradients, and the second derivatives, also by grad_output."""
        parts = self.leaves(classes)
        results, leaves = self.results(parts, **shard), [*parts.values()]
        value = results[0]
        if "log_probs" in self.name:
            value = torch.stack(results[: 1 + 2 * ("return_lse" in self.options)])
        above = torch.linspace(1, 2, value.numel()).view_as(value).to(value.dtype).requires_grad_()
        found = [[*torch.autograd.grad(value, leaves, above, retain_graph=self.twice)]]
        if self.twice:
            first = torch.autograd.grad(value, leaves, above, create_graph=True)
            whole, generator = self.tensors()[0].items(), torch.Generator().manual_seed(11)
            random = {k: torch.randn(x.shape, generator=generator).double() for k, x in whole}
            factors = [self.part(k, x, classes) for k, x in random.items()]
            second = torch.autograd.grad(first, [*leaves, above], factors)
            found += [[x.detach() for x in first], [*second]]
        return [result.detach() for result in results], found


WEIGHT, TOKEN_WEIGHT = torch.linspace(0.5, 2, CLASSES), torch.linspace(0, 1, ROWS)
TOKEN_WEIGHT[[1, 4]] = 0
WEIGHTED: dict[str, Any] = {"weight": WEIGHT.double(), "token_weight": TOKEN_WEIGHT}
RESULTS, LOGIT_METRICS = {"return_entropy": True, "return_lse": True}, {"return_metrics": True}
OPTIONS: dict[str, Any] = {"scale": 0.5, "z_loss": 0.1, "reduction": "none"}
IN_BLOCKS = OPTIONS | {"softcap": 4.0, "memory_budget": 4000}
OF_LOGITS = {"softcap": 4.0, "temperature": 0.5, **RESULTS, **LOGIT_METRICS}
DERIVED = {
    "mean": Case("cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.1, "scale": 0.5}, True),
    "none": Case("cross_entropy", {"reduction": "none", **WEIGHTED}, True),
    "divided": Case("cross_entropy", {"denominator": torch.tensor(5.0)}, True),
    "linear": Case("linear_cross_entropy", {"softcap": 4.0, **WEIGHTED}, True),
    "linear_sum": Case("linear_cross_entropy", {"reduction": "sum", "label_smoothing": 0.1}, True),
    "with_metrics": Case("cross_entropy_with_metrics", {"reduction": "sum"}, True),
    "linear_with_metrics": Case("linear_cross_entropy_with_metrics", {"z_loss": 0.1}, True),
    "weighted_with_metrics": Case("linear_cross_entropy_with_metrics", WEIGHTED),
    "log_probs": Case("log_probs", {"softcap": 4.0, "temperature": 2.0, **RESULTS}, True),
    "linear_log_probs": Case("linear_log_probs", OF_LOGITS, True),
}
METRICS = {
    f"{kind}_{str(dtype)[6:]}": case._replace(dtype=dtype)
    for kind, case in {
        "metrics": Case("cross_entropy_with_metrics", OPTIONS, dims=()),
        "metrics_of_dims": Case("cross_entropy_with_metrics", OPTIONS, dims=(2,)),
        "metrics_of_head": Case("linear_cross_entropy_with_metrics", IN_BLOCKS),
        "metrics_of_log_probs": Case("log_probs", {"temperature": 0.5, **LOGIT_METRICS}, dims=()),
    }.items()
    for dtype in (F32, F64)
}
CASES = [*DERIVED.values(), *METRICS.values()]


def test_all_functions_with_shards_are_compared() -> None:
    takes_shard = lambda name: "shard" in inspect.signature(getattr(functional, name)).parameters  # noqa: E731
    sharded = set(filter(takes_shard, functional.__all__))
    assert sharded == {case.name for case in CASES}


@check(**DERIVED, **METRICS)
def results(process: Process, case: Case) -> None:
    """Results and gradients equal those of one process, and are bitwise equal in all processes.

    The processes reduce three numbers per row, and others for smoothing and the entropy. Metrics
    gather two numbers per row.
    """
    classes, rows = process.classes, case.tensors()[1].numel()
    process.sent()
    with torch.no_grad():
        case.results(case.leaves(classes), shard=VocabShard(classes.start, CLASSES))
    reduced, gathered = process.sent()
    has_metrics, is_log_probs = "metrics" in str(case), "log_probs" in case.name
    smooth = "label_smoothing" in case.options or (is_log_probs and has_metrics)
    assert sum(reduced) == rows * (3 + smooth + (has_metrics or is_log_probs))
    assert gathered == [2 * rows] * has_metrics
    found, gradients = case.outcome(classes, shard=VocabShard(classes.start))
    expected, whole_gradients = case.outcome(slice(None))
    everywhere: list[Any] = [None] * SIZE
    dist.all_gather_object(everywhere, [x.numpy().tobytes() for x in found])
    assert everywhere == everywhere[:1] * SIZE
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9} if case.twice else {}
    torch.testing.assert_close(found, expected, equal_nan=True, **close)
    for own_part, exact in zip(gradients, whole_gradients, strict=True):
        names = case.tensors()[0]
        parts = [case.part(key, x, classes) for key, x in zip(names, exact, strict=False)]
        torch.testing.assert_close(own_part, parts + exact[len(parts) :], equal_nan=True, **close)


@check(**{f"{shift:g}": shift for shift in (1e4, -1e8, 1e16, 3e38, -3e38)})
def smoothing_far_from_zero(process: Process, case: float) -> None:
    """Compares with torch's results for all classes in float64."""
    classes, (*_, target) = process.classes, draw(F32)
    steps = torch.rand(ROWS, CLASSES, generator=torch.Generator().manual_seed(3))
    logits = case * (1 - 1e-6 * steps) - 4 * steps
    options: Any = {"label_smoothing": 0.1, "reduction": "sum"}
    whole = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(whole, target, WEIGHT.double(), **options)
    (gradient,) = torch.autograd.grad(exact, whole)
    shard = VocabShard(classes.start, CLASSES)
    for create_graph in (False, True):
        part = logits[:, classes].clone().requires_grad_()
        loss = cross_entropy(part, target, WEIGHT, **options, shard=shard)
        got = loss, *torch.autograd.grad(loss, part, create_graph=create_graph)
        expected = exact.float(), gradient[:, classes].float()
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    found = functional.log_probs(part, target, return_metrics=True, shard=shard).mean_logit
    mean = whole.detach().mean(1).where(target != -100, 0).float()
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=0)


WITH_MODES: dict[str, Any] = {
    "cross_entropy": {"label_smoothing": 0.1, "reduction": "none"},
    "linear_cross_entropy": {"softcap": 2.0, "z_loss": 0.1, "token_weight": TOKEN_WEIGHT},
    "log_probs": {},
    "linear_log_probs": RESULTS,
}


@check(**{name: name for name in WITH_MODES})
def modes_and_compilers(process: Process, case: str) -> None:
    """A mode sees torch's operators; a compiled program breaks its graph."""
    call = Case(case, WITH_MODES[case], dtype=F32)
    options = {"shard": VocabShard(process.classes.start, CLASSES)}
    leaves = call.leaves(process.classes)

    def run() -> list[Tensor]:
        results = call.results(leaves, **options)
        total = sum(x.double().sum() for x in results)
        return [*results, *torch.autograd.grad(total, [*leaves.values()])]

    expected = run()
    with Recording() as mode:
        found = run()
    assert "aten.sum.dim_IntList" in mode.seen
    torch.testing.assert_close(found, expected)
    if case == "cross_entropy":
        compiled = torch.compile(lambda: run()[0], backend="eager")
        assert torch.equal(compiled(), expected[0])
        with forward_ad.dual_level():
            assert "expected no forward-mode AD with a shard" in error_of(run)
        given = leaves["input"], call.tensors()[1]
        metrics = partial(functional.cross_entropy_with_metrics, *given, **options)
        with Recording():
            reason = explain("cross_entropy", *given, **options).reason
            assert reason == "a torch dispatch or function mode"
            assert "mode around a call with a shard and metrics" in error_of(metrics)


TOTAL = 5 * SIZE
SUPPORTED = "RuntimeError: weight: expected a tensor that the kernels support with a shard"
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "weight": (TOTAL, {"weight": torch.ones(3)}, "RuntimeError: weight: expected shape"),
    "constant": (TOTAL, {"weight": torch.ones(TOTAL, requires_grad=True)}, SUPPORTED),
    "gamma": (None, {"gamma": 2.0}, "ValueError: gamma: expected 0.0 with a shard, got 2.0"),
    "negative": (-1, {}, "ValueError: classes: expected"),
    "no_shard": (None, {"shard": 0}, "TypeError: shard: expected a VocabShard, got int"),
    "first": (None, {"shard": VocabShard(0.5)}, "TypeError: first: expected an int"),  # type: ignore[arg-type]
    "shape": (None, {"target": torch.zeros(1, 2, 3).long()}, "ValueError: target: expected"),
    "type": (None, {"target": None}, "TypeError: target: expected a Tensor"),
}


@check(**BAD)
def bad_input(process: Process, case: Any) -> None:
    """An invalid argument raises before anything is sent, so that no other process waits."""
    classes, options, expected = case
    shard, target = VocabShard(5 * process.rank, classes), torch.tensor([0, 1])
    process.sent()
    given: Any = {"target": target, "shard": shard} | options
    assert error_of(lambda: cross_entropy(torch.zeros(2, 5), **given)).startswith(expected)
    assert process.sent() == ([], [])


@check(below=-1, above=TOTAL)
def invalid_targets(process: Process, case: int) -> None:
    """A target that is the class of no process raises in every process."""
    target, shard = torch.tensor([0, case]), VocabShard(5 * process.rank, TOTAL)
    error = error_of(lambda: cross_entropy(torch.zeros(2, 5), target, shard=shard))
    assert error.startswith("IndexError: ")
    assert str(case) in error


@check(dtensors=None)
def subclasses(process: Process, case: None) -> None:
    """DTensors take the path of tensor subclasses, and cannot be combined with a shard."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    input, head, _, target = draw(F64)
    features, targets = (distribute_tensor(x, mesh, [Replicate()]) for x in (input, target))
    logits = distribute_tensor(input @ head.t(), mesh, [Shard(1)]).requires_grad_()
    weight = distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()
    whole = [x.full_tensor().detach().requires_grad_() for x in (logits, weight)]
    losses = cross_entropy(logits, targets), linear_cross_entropy(features, weight, targets)
    expected = cross_entropy(whole[0], target), linear_cross_entropy(input, whole[1], target)
    found = [*losses, *torch.autograd.grad(sum(losses), [logits, weight])]
    exact = [*expected, *torch.autograd.grad(sum(expected), whole)]
    torch.testing.assert_close([x.full_tensor() for x in found], exact)
    error = error_of(lambda: linear_cross_entropy(input, weight, target))  # as with FSDP
    assert "mixed torch.Tensor and DTensor" in error
    shard = VocabShard(-(-CLASSES // SIZE) * process.rank, CLASSES)
    error = error_of(lambda: cross_entropy(logits, target, shard=shard))
    assert error.endswith("that the kernels support with a shard, but input is a DTensor")
    local_loss = cross_entropy(logits.to_local(), target, shard=shard)
    gradient = torch.autograd.grad(local_loss, logits)[0].full_tensor()
    torch.testing.assert_close([local_loss, gradient], [exact[0], exact[2]])


# ---- random sequences: every process draws the same numbers --------------------------------------

GROUPS = ([0, 1, 2, 3], [0, 1], [2, 3], [1, 3], [0, 1, 2], [1, 2, 3])


def random_shards(rng: random.Random, classes: int, size: int) -> list[slice]:
    """Draws the classes of each process: any number of them, including none, in any order."""
    cuts = sorted([0, classes, *[rng.randint(0, classes) for _ in range(size - 1)]])
    return rng.sample([slice(*cuts[i : i + 2]) for i in range(size)], size)


def close(got: Tensor, expected: Tensor) -> None:
    finite = expected.detach()[expected.isfinite()].double()
    largest = float(finite.abs().max()) if len(finite) else 0.0
    rounding = 2e-4 if expected.dtype is F32 else 1e-10
    rounding = {"rtol": rounding, "atol": rounding * max(1.0, largest)}
    torch.testing.assert_close(got, expected, equal_nan=True, **rounding)


def total_of(results: list[Tensor]) -> Tensor:
    """Returns a scalar that depends on all results that require grad."""
    terms = [x * torch.linspace(-1, 2, x.numel()).view_as(x) for x in results if x.requires_grad]
    return torch.cat([torch.zeros(1), *[term.flatten() for term in terms]]).sum()


def differentiated_together(process: Process, rng: random.Random) -> None:
    """Runs some calls in several groups, and one backward pass for the sum of their results."""
    total, calls, alone = torch.zeros((), dtype=F64), [], False
    grad, create_graph = rng.random() < 0.9, rng.random() < 0.2
    for _ in range(rng.randint(1, 3)):
        case, (ranks, group) = rng.choice(CASES), rng.choice(process.groups)
        pieces = random_shards(rng, CLASSES, len(ranks))
        names = [*case.tensors()[0]]
        frozen = [tuple(x for x in names if rng.random() < 0.3) for _ in pieces]
        frozen = frozen if rng.random() < 0.3 else frozen[:1] * len(pieces)
        classes = rng.choice([None, CLASSES])
        if process.rank not in ranks:
            with pytest.raises(ValueError, match="a group that this process is a member of"):
                case.results(case.leaves(pieces[0]), shard=VocabShard(0, classes, group))
            continue
        mine = ranks.index(process.rank)
        own, leaves = pieces[mine], case.leaves(pieces[mine], frozen[mine])
        with torch.set_grad_enabled(grad):
            results = case.results(leaves, shard=VocabShard(own.start, classes, group))
        whole = case.leaves(slice(None))
        expected = case.results(whole)
        for result, exact in zip(results, expected, strict=True):
            close(result, exact)
        assert results[0].requires_grad == grad
        if grad:
            total = total + total_of(results)
            alone |= len(frozen[mine]) == len(leaves)
            gradients = torch.autograd.grad(total_of(expected), [*whole.values()])
            calls.append((case, own, leaves, gradients))
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


@check(call=None)
def destroyed_groups(process: Process, case: None) -> None:
    """No cache keeps a process group alive."""
    group = dist.new_group([*range(SIZE)])
    input, head, _, target = draw(F64)
    shard = VocabShard(process.classes.start, CLASSES, group)
    cross_entropy((input @ head.t())[:, process.classes], target, shard=shard)
    reference = weakref.ref(group)
    dist.barrier()
    dist.destroy_process_group(group)
    del group, shard
    gc.collect()
    assert reference() is None


@check(drawn=16)
def sequences(process: Process, case: int) -> None:
    """The collectives of all processes stay paired, whatever calls follow each other."""
    seed = [random.randrange(1 << 30)]
    dist.broadcast_object_list(seed)
    for step in range(case):
        text = f"seed {seed[0]}, step {step}"
        try:
            differentiated_together(process, random.Random(text))
        except Exception as error:
            raise AssertionError(text) from error
        known = torch.tensor([process.rank + step])
        dist.all_reduce(known)  # would hang or differ after an unpaired collective
        assert known.item() == sum(range(SIZE)) + SIZE * step, text


# ---- weights of other dtypes ---------------------------------------------------------------------

TOKENS = 70000  # a sum of as many weights in half precision is inf, or loses most of its digits


# The dtypes of the input and the weights, and the arguments. Class weights have the input's dtype.
WEIGHTED_CALLS: dict[str, Any] = {
    "class_weight": (BF16, BF16, ("weight",), "mean"),
    "both": (F16, F16, ("weight", "token_weight"), "mean"),
    "both_double": (F64, F64, ("weight", "token_weight"), "mean"),
    "half": (F32, F16, ("token_weight",), "mean"),
    "half_of_double": (F64, BF16, ("token_weight",), "mean"),
    "mask": (F32, torch.bool, ("token_weight",), "mean"),
    "unreduced": (F32, BF16, ("token_weight",), "none"),
    "denominator": (F32, F16, ("denominator",), "mean"),
}


@check(**{f"{k}_{h}": (*v, h) for k, v in WEIGHTED_CALLS.items() for h in ("logits", "head")})
def weights_of_other_dtypes(process: Process, case: Any) -> None:
    """Compares the loss and the gradients with a call on all classes in float64."""
    input_dtype, weight_dtype, names, reduction, kind = case
    generator = torch.Generator().manual_seed(8)
    x, head = (torch.randn(n, 4, generator=generator).to(input_dtype) for n in (TOKENS, 8))
    target = torch.randint(8, (TOKENS,), generator=generator)
    target[::7] = -100
    kept, factors, class_weight = (torch.rand(n, generator=generator) for n in (TOKENS, TOKENS, 8))
    of_tokens = kept < 0.97 if weight_dtype is torch.bool else (kept < 0.97) * (1 + factors)
    weights = {"weight": class_weight + 0.5, "token_weight": of_tokens}
    weights["denominator"] = torch.tensor(3001.0)
    weights = {name: weights[name].to(weight_dtype) for name in names}
    classes = slice(2 * process.rank, 2 * process.rank + 2)
    whole, take = (x, head), [slice(None), classes]
    function = linear_cross_entropy
    if kind == "logits":
        whole, take, function = (x @ head.t(),), [(slice(None), classes)], cross_entropy
    parts = [x[part] for x, part in zip(whole, take, strict=True)]
    options: Any = {"label_smoothing": 0.1, "reduction": reduction}
    wide = [x.double().requires_grad_() for x in whole]
    wide_weights = {name: weight.double() for name, weight in weights.items()}
    exact = function(*wide, target, **options, **wide_weights)
    grad = 4096 * torch.linspace(1, 2, exact.numel(), dtype=F64).view_as(exact)
    gradients = torch.autograd.grad(exact, wide, grad)
    expected = [x[part] for x, part in zip(gradients, take, strict=True)]
    # Elements of half precision are rounded once; sums of n others have sqrt(n / 12) roundings.
    is_half, eps = input_dtype.itemsize == 2, torch.finfo(input_dtype).eps
    tolerance = eps if is_half else math.sqrt(TOKENS / 12) * eps
    of_loss = min(tolerance, 8 * torch.finfo(F32).eps)
    if kind == "head" and is_half:
        # Some processors round the logits to half precision, with a random error in each row.
        of_loss = 2 * eps / TOKENS**0.5
    options["loss_dtype"] = torch.promote_types(input_dtype, F32)
    options["shard"] = VocabShard(classes.start, 8)
    for create_graph in (False, True):
        leaves = [x.clone().requires_grad_() for x in parts]
        loss = function(*leaves, target, **options, **weights)
        got = torch.autograd.grad(loss, leaves, grad.to(loss.dtype), create_graph=create_graph)
        bounds = of_loss, *[tolerance] * len(got)
        for value, right, bound in zip((loss, *got), (exact, *expected), bounds, strict=True):
            error = (value.double() - right).norm() / right.norm()
            assert error <= bound, f"{error:.3g} with create_graph={create_graph}"


# ---- tests ---------------------------------------------------------------------------------------


def checks_of(rank: int) -> dict[str, Callable[[], None]]:
    warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
    process = Process(rank)
    return {name: partial(function, process) for name, function in CHECKS.items()}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run_checks(checks_of, SIZE)


@pytest.mark.parametrize("name", CHECKS)
def test_in_processes(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


def test_calls_on_gpus_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of meta tensors cannot be read, and indices in a list would be copied to the GPU."""
    state = torch.empty(SMOOTHING_FIELDS, 2, device="meta", dtype=F64)
    merged = lambda *_: shards._merged(state.clone(), None, False, 5)  # noqa: E731
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    monkeypatch.setattr(CrossEntropy, "fused", lambda *_: merged())
    monkeypatch.setattr(shards, "unsupported", lambda *_: None)
    monkeypatch.setattr(dispatch, "active_mode", lambda: None)
    logits, target = torch.empty(2, 5, device="meta"), torch.zeros(2, device="meta").long()
    with Recording() as mode:
        cross_entropy(logits, target, shard=VocabShard(0, 5))
        cross_entropy(logits, target, torch.empty(5, device="meta"), shard=VocabShard(0))
    assert not [name for name in mode.seen if name.startswith("aten.index")]
    with pytest.raises(RuntimeError, match="meta"):  # the sum over the processes is read
        cross_entropy(logits, target, shard=VocabShard(0))
