"""Logits with sharded classes give the results of one process, over gloo.

Every process runs all checks; a test fails if a check fails in one of them.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from catalogue import TORCH
from conftest import fused_always
from processes import in_processes
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from pyfused import VocabShard, explain, functional
from pyfused.dispatch import run as dispatch
from pyfused.dispatch import signature
from pyfused.functional import cross_entropy, linear_cross_entropy
from pyfused.ops import shards
from pyfused.ops.cross_entropy import CrossEntropy
from pyfused.ops.operators import OPERATORS
from pyfused.ops.shards import _merged
from pyfused.types import SMOOTHING_FIELDS

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
    pytest.mark.cpu,
]

ROWS, FEATURES, CLASSES = 13, 6, 150
CUTS = [0, 1, 70, 70, CLASSES]  # uneven shards, one of them empty
SIZE = len(CUTS) - 1


class Process:
    """A process, and the sizes of the tensors that it has sent."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.reduced: list[int] = []
        self.gathered: list[int] = []
        self.watch("all_reduce", 0, self.reduced)
        self.watch("all_gather", 1, self.gathered)

    def watch(self, name: str, position: int, sizes: list[int]) -> None:
        original = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            sizes.append(args[position].numel())
            return original(*args, **kwargs)

        setattr(dist, name, collective)

    def classes(self) -> slice:
        """Returns the classes of this process; those of the last process come first."""
        return slice(*CUTS[SIZE - 1 - self.rank :][:2])

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


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found if part is not None for tensor in flat(part)]


def error_of(call: Any) -> str:
    try:
        call()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---- plain tensors -------------------------------------------------------------------------------


class Case(NamedTuple):
    """A call.

    Attributes:
        orders: The number of derivatives. Each differentiates the previous one, times random
            numbers.
        dims: The dimensions after the classes of logits with special values; None for others.
    """

    name: str
    options: dict[str, Any]
    orders: int = 0
    dtype: torch.dtype = torch.float64
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

    def outcome(self, classes: slice, **shard: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Returns the results and gradients; higher orders also differentiate by grad_output."""
        whole, target = self.tensors()
        parts = {k: self.part(k, x, classes).requires_grad_() for k, x in whole.items()}
        given = parts | self.options | shard
        results = flat(getattr(functional, self.name)(target=target, **given))
        is_log_probs = "log_probs" in self.name
        value = torch.stack(results[: 1 + 2 * ("return_lse" in self.options)])
        value = value if is_log_probs else results[0]
        above = torch.linspace(1, 2, value.numel()).view_as(value).to(value.dtype).requires_grad_()
        generator = torch.Generator().manual_seed(11)
        outputs, factors, leaves = [value], [above], [*parts.values()]
        found = [[*torch.autograd.grad(value, leaves, above, retain_graph=self.orders > 0)]]
        for _ in range(self.orders):
            outputs = [*torch.autograd.grad(outputs, leaves, factors, create_graph=True)]
            assert all(output.requires_grad for output in outputs)
            found.append([output.detach() for output in outputs])
            random = {k: torch.randn(x.shape, generator=generator) for k, x in whole.items()}
            factors = [self.part(key, x, classes).double() for key, x in random.items()]
            if len(leaves) > len(parts):
                factors.append(torch.linspace(-1, 1, above.numel()).view_as(above).double())
            leaves = [*parts.values(), above]
        return [result.detach() for result in results], found


WEIGHT, TOKEN_WEIGHT = torch.linspace(0.5, 2, CLASSES), torch.linspace(0, 1, ROWS)
TOKEN_WEIGHT[[1, 4]] = 0
WEIGHTED: dict[str, Any] = {"weight": WEIGHT.double(), "token_weight": TOKEN_WEIGHT}
RESULTS, LOGIT_METRICS = {"return_entropy": True, "return_lse": True}, {"return_metrics": True}
OPTIONS: dict[str, Any] = {"scale": 0.5, "z_loss": 0.1, "reduction": "none"}
DERIVED = {
    "mean": Case("cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.1, "scale": 0.5}, 3),
    "none": Case("cross_entropy", {"reduction": "none", **WEIGHTED}, 3),
    "divided": Case("cross_entropy", {"denominator": torch.tensor(5.0)}, 3),
    "linear": Case("linear_cross_entropy", {"softcap": 4.0, **WEIGHTED}, 3),
    "linear_sum": Case("linear_cross_entropy", {"reduction": "sum", "label_smoothing": 0.1}, 3),
    "with_metrics": Case("cross_entropy_with_metrics", {"reduction": "sum"}, 3),
    "linear_with_metrics": Case("linear_cross_entropy_with_metrics", {"z_loss": 0.1}, 3),
    "weighted_with_metrics": Case("linear_cross_entropy_with_metrics", WEIGHTED),
    "log_probs": Case("log_probs", {"softcap": 4.0, "temperature": 2.0, **RESULTS}, 3),
    "linear_log_probs": Case(
        "linear_log_probs", {"softcap": 4.0, "temperature": 0.5, **RESULTS, **LOGIT_METRICS}, 3
    ),
}
METRICS = {
    f"{kind}_{str(dtype)[6:]}": case._replace(dtype=dtype)
    for kind, case in {
        "metrics": Case("cross_entropy_with_metrics", OPTIONS, dims=()),
        "metrics_of_dims": Case("cross_entropy_with_metrics", OPTIONS, dims=(2,)),
        "metrics_of_head": Case(
            "linear_cross_entropy_with_metrics", OPTIONS | {"softcap": 4.0, "memory_budget": 4000}
        ),
        "metrics_of_log_probs": Case("log_probs", {"temperature": 0.5, **LOGIT_METRICS}, dims=()),
    }.items()
    for dtype in (torch.float32, torch.float64)
}


@check(**DERIVED, **METRICS)
def results(process: Process, case: Case) -> None:
    """Results and gradients equal those of one process, and are bitwise equal in all processes.

    The processes reduce three numbers per row, and others for smoothing and the entropy. Metrics
    gather two numbers per row.
    """
    classes = process.classes()
    process.sent()
    with torch.no_grad():
        whole, target = case.tensors()
        own = {key: case.part(key, tensor, classes) for key, tensor in whole.items()}
        given = {"target": target, "shard": VocabShard(classes.start, CLASSES), **case.options}
        getattr(functional, case.name)(**own, **given)
    reduced, gathered = process.sent()
    has_metrics, is_log_probs = "metrics" in str(case), "log_probs" in case.name
    smooth = "label_smoothing" in case.options or (is_log_probs and has_metrics)
    assert sum(reduced) == target.numel() * (3 + smooth + (has_metrics or is_log_probs))
    assert gathered == [2 * target.numel()] * has_metrics
    found, gradients = case.outcome(classes, shard=VocabShard(classes.start))
    expected, whole_gradients = case.outcome(slice(None))
    everywhere: list[Any] = [None] * SIZE
    dist.all_gather_object(everywhere, [x.numpy().tobytes() for x in found])
    assert everywhere == everywhere[:1] * SIZE
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9} if case.orders else {}
    torch.testing.assert_close(found, expected, equal_nan=True, **close)
    for own_part, exact in zip(gradients, whole_gradients, strict=True):
        parts = [case.part(key, x, classes) for key, x in zip(whole, exact, strict=False)]
        torch.testing.assert_close(own_part, parts + exact[len(parts) :], equal_nan=True, **close)
    if case.dims is None or case.dtype is not torch.float64:
        return
    logits, target = special_logits(case.dtype, case.dims)
    if is_log_probs:
        counted = target != -100
        best: Any = (logits.argmax(1) == target) & counted, logits.mean(1).where(counted, 0) / 0.5
    else:
        _, best = TORCH.cross_entropy_with_metrics(logits, target, scale=0.5)
    torch.testing.assert_close(found[1:], [*best], equal_nan=True)


class Seen(TorchDispatchMode):
    """Collects the operators of a block."""

    def __enter__(self) -> Any:
        self.names: set[str] = set()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


MODES: dict[str, Any] = {
    **{name: (name, {}) for name in ("cross_entropy", "linear_cross_entropy")},
    **{name: (name, {}) for name in ("log_probs", "linear_log_probs")},
    "smoothing": ("cross_entropy", {"label_smoothing": 0.1, "reduction": "none"}),
    "entropy": ("linear_log_probs", {"return_entropy": True, "return_lse": True}),
    "options": ("linear_cross_entropy", {"softcap": 2.0, "z_loss": 0.1, "temperature": 0.5}),
    "token_weight": ("linear_cross_entropy", {"token_weight": torch.arange(ROWS) / ROWS}),
}


@check(**MODES)
def modes_and_compilers(process: Process, case: Any) -> None:
    """A mode sees torch's operators; a compiled program breaks its graph."""
    name, options = case
    classes = process.classes()
    options = {"shard": VocabShard(classes.start, CLASSES)} | options
    for dtype in (torch.float32, torch.bfloat16):
        input, head, bias, target = draw(dtype)
        layer = (input, head[classes], bias[classes])
        leaves = [
            x.detach().clone().requires_grad_()
            for x in (layer if "linear" in name else (input @ head[classes].t(),))
        ]
        given = dict(zip(("input", "linear_weight", "linear_bias"), leaves, strict=False))
        if name == "log_probs":
            given = {"logits": leaves[0]}

        def call(
            given: dict[str, Any] = given, target: Tensor = target, leaves: list[Tensor] = leaves
        ) -> list[Tensor]:
            results = flat(getattr(functional, name)(target=target, **given, **options))
            total = sum(x.double().sum() for x in results)
            return [*results, *torch.autograd.grad(total, leaves)]

        expected = call()
        with Seen() as seen:
            found = call()
        assert "aten.sum.dim_IntList" in seen.names
        for x, y in zip(found, expected, strict=True):
            assert x.dtype is y.dtype
            rounding = 1e-5 + 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(x, y, rtol=rounding, atol=rounding)
    if name == "cross_entropy":
        compiled = torch.compile(lambda: call()[0], backend="eager")
        assert torch.equal(compiled(), expected[0])
        with forward_ad.dual_level():
            assert "expected no forward-mode AD with a shard" in error_of(call)
        metrics = partial(functional.cross_entropy_with_metrics, leaves[0], target, **options)
        with Seen():
            reason = explain("cross_entropy", leaves[0], target, **options).reason
            assert reason == "a torch dispatch or function mode"
            assert "mode around a call with a shard and metrics" in error_of(metrics)


@check(logits="cross_entropy", head="linear_cross_entropy")
def plans(process: Process, case: str) -> None:
    """Calls with other numbers of rows and numbers use the same plan, but for empty shards."""
    classes = process.classes()
    input, head, _, target = draw(torch.float32)
    operands = (input, head[classes]) if "linear" in case else (input @ head[classes].t(),)
    cached = OPERATORS[case].plans

    def call(rows: int, scale: float, total: int) -> None:
        first, *others = operands
        shard = VocabShard(classes.start, total)
        call = getattr(functional, case)
        call(first[:rows], *others, target=target[:rows], scale=scale, shard=shard)

    call(ROWS, 0.5, CLASSES)
    before = len(cached)
    for rows in range(2, ROWS):
        call(rows, rows + 0.5, CLASSES)
    planned = len(cached)
    assert planned == before or classes.start == classes.stop
    call(ROWS, 0.5, CLASSES + 1)
    assert len(cached) == planned + 1


TOTAL = 5 * SIZE
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "weight": (TOTAL, {"weight": torch.ones(3)}, "RuntimeError: weight: expected shape"),
    "constant": (
        TOTAL,
        {"weight": torch.ones(TOTAL, requires_grad=True)},
        "RuntimeError: weight: expected a tensor that the kernels support with a shard",
    ),
    "gamma": (None, {"gamma": 2.0}, "ValueError: gamma: expected 0.0 with a shard, got 2.0"),
    "negative": (-1, {}, "ValueError: classes: expected"),
    "no_shard": (None, {"shard": 0}, "TypeError: shard: expected a VocabShard, got int"),
    "first": (None, {"shard": VocabShard(0.5)}, "TypeError: first: expected an int"),  # type: ignore[arg-type]
    "shape": (None, {"target": torch.zeros(1, 2, 3).long()}, "ValueError: target: expected"),
    "type": (None, {"target": None}, "TypeError: target: expected a Tensor"),
}


@check(**BAD)
def bad_input(process: Process, case: Any) -> None:
    classes, options, expected = case
    shard, target = VocabShard(5 * process.rank, classes), torch.tensor([0, 1])
    given = {"target": target, "shard": shard} | options
    process.sent()
    error = error_of(lambda: cross_entropy(torch.zeros(2, 5), **given))
    assert error.startswith(expected)
    assert process.sent() == ([], [])


# ---- DTensors ------------------------------------------------------------------------------------


@check(replicated_loss=False, parallel_loss=True)
def dtensors(process: Process, case: bool) -> None:
    """DTensors take the path of tensor subclasses: torch's function, or the definition."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    input, head, _, target = draw(torch.float64)
    whole = input @ head.t()
    features, target_of_all = (distribute_tensor(x, mesh, [Replicate()]) for x in (input, target))
    with loss_parallel() if case else contextlib.nullcontext():
        logits = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_()
        assert explain("cross_entropy", logits, target_of_all).reason == "input is a DTensor"
        of_torch = torch.nn.functional.cross_entropy(logits, target_of_all)
        gradients = [torch.autograd.grad(of_torch, logits, retain_graph=True)[0]]
        loss = cross_entropy(logits, target_of_all)
        gradients += torch.autograd.grad(loss, logits)
        assert torch.equal(*[x.full_tensor() for x in (loss, of_torch)])
        assert torch.equal(*[x.full_tensor() for x in gradients])
        weight = distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()
        linear = linear_cross_entropy(features, weight, target_of_all, z_loss=0.1)
        linear_gradient = torch.autograd.grad(linear, weight)[0]
    leaf = head.clone().requires_grad_()
    expected = linear_cross_entropy(input, leaf, target, z_loss=0.1)
    torch.testing.assert_close(linear.full_tensor(), expected)
    exact = torch.autograd.grad(expected, leaf)[0]
    torch.testing.assert_close(linear_gradient.full_tensor(), exact)
    error = error_of(lambda: linear_cross_entropy(input, weight, target))  # as with FSDP
    assert "mixed torch.Tensor and DTensor" in error
    shard = VocabShard(-(-CLASSES // SIZE) * process.rank, CLASSES)
    error = error_of(lambda: cross_entropy(logits, target, shard=shard))
    assert error.endswith("that the kernels support with a shard, but input is a DTensor")
    local_loss = cross_entropy(logits.to_local(), target, shard=shard)
    torch.testing.assert_close(local_loss, of_torch.full_tensor())
    gradient = torch.autograd.grad(local_loss, logits)[0]
    torch.testing.assert_close(gradient.full_tensor(), gradients[0].full_tensor())


# ---- processes -----------------------------------------------------------------------------------


def rank_of(rank: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE
    )
    failures, process = {}, Process(rank)
    with fused_always():
        for name, function in CHECKS.items():
            try:
                function(process)
            except Exception:  # noqa: PERF203
                failures[name] = traceback.format_exc()
    dist.barrier()
    dist.destroy_process_group()
    pipe.send_bytes(pickle.dumps(failures))


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = str(tmp_path_factory.mktemp("store"))
    return [pickle.loads(found) for found in in_processes(rank_of, SIZE, folder)]


@pytest.mark.parametrize("name", CHECKS)
def test_in_processes(name: str, failures: list[dict[str, str]]) -> None:
    for rank, found in enumerate(failures):
        assert name not in found, f"rank {rank}: {found[name]}"


class NoIndices(TorchDispatchMode):
    """Raises for indices that are not slices: those of a list would be copied to the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put_)
        return func(*args, **(kwargs or {}))


def test_calls_on_gpus_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of meta tensors cannot be read."""

    def merged(*_: Any) -> Tensor:
        state = torch.empty(SMOOTHING_FIELDS, 2, device="meta", dtype=torch.float64)
        return _merged(state, None, False)

    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    monkeypatch.setattr(CrossEntropy, "plan", lambda *_: merged)
    monkeypatch.setattr(shards, "unsupported", lambda *_: None)
    monkeypatch.setattr(signature, "active_mode", lambda: None)
    logits, target = torch.empty(2, 5, device="meta"), torch.zeros(2, device="meta").long()
    with NoIndices():
        cross_entropy(logits, target, shard=VocabShard(0, 5))
        cross_entropy(logits, target, torch.empty(5, device="meta"), shard=VocabShard(0))
    with pytest.raises(ValueError, match=r"shard: expected classes in \[0, 5\) .*, got \[1, 6\)"):
        cross_entropy(logits, target, shard=VocabShard(1, 5))
    with pytest.raises(RuntimeError, match="meta"):  # the sum over the processes is read
        cross_entropy(logits, target, shard=VocabShard(0))
    dispatch.forget_plans()
