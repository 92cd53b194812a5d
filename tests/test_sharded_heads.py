"""Converted heads under wrappers of torch and other libraries train like unconverted ones.

Two processes train a tiny language model in each wrapper, with and without `convert`, and compare
losses, the gradient of an input, parameters after the steps and collectives.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import in_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused.dispatch import sizes

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 lacks parts of FSDP2"),
]

VOCABULARY, FEATURES, BATCH, LENGTH, STEPS = 1001, 16, 2, 24, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, 24), nn.Linear(24, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Double(torch.autograd.Function):
    """An operator that C++ calls, which holds the logits that are passed to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return 2 * gradient


class Model(nn.Module):
    """A language model.

    Args:
        tied: Whether the embedding and the head share a parameter.
        saves: Whether the blocks are checkpointed.
        reads: What else the forward does: "maximum" reads the logits, "function" passes them to
            C++, "twice" calls the head for a second loss.
    """

    def __init__(self, tied: bool = False, saves: bool = True, reads: str = "") -> None:
        super().__init__()
        self.saves, self.reads = saves, reads
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(FEATURES)
        self.lm_head = nn.Linear(FEATURES, VOCABULARY, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor, shift: Tensor) -> Any:
        x = self.embedding(tokens) + shift
        for block in self.blocks:
            x = block(x) if self.saves else checkpoint(block, x, use_reentrant=False)
        x = self.norm(x)
        logits = self.lm_head(x)
        if self.reads == "function":
            logits = Double.apply(logits)
        loss = F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.view(-1))
        if self.reads == "maximum":
            loss = loss + 0.01 * logits.max()
        if self.reads == "twice":
            logits = self.lm_head(x.roll(1, 1))
            loss = loss + F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.view(-1))
        return logits, loss


def build(**options: Any) -> Model:
    torch.manual_seed(1)
    return Model(**options)


# ---- wrappers ------------------------------------------------------------------------------------


class Wrapper(NamedTuple):
    """A way to train a model.

    Attributes:
        wrap: Returns the wrapped model.
        before: The result if the model is converted before it is wrapped: fused, told (one warning
            says why it computes its logits), left (plan_conversion says why) or refused.
        after: The result if it is converted after that.
        options: Of the model.
        tolerance: Of losses, gradients and parameters.
    """

    wrap: Callable[[Any], Any]
    before: str
    after: str
    options: dict[str, Any] = {}  # noqa: RUF012
    tolerance: float = 1e-5


def ddp(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(flat: bool) -> Any:
    def wrap(model: Any) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(
                model, use_orig_params=not flat, device_id=torch.device("cpu")
            )

    return wrap


def fsdp2(units: str = "head", root: bool = True, head: Any = None, **options: Any) -> Any:
    def wrap(model: Any) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        names = {"reshard_after_forward"}
        given: dict[str, Any] = {k: v for k, v in options.items() if k in names}
        policy = {k: v for k, v in options.items() if k not in names}
        if policy:
            given["mp_policy"] = MixedPrecisionPolicy(**policy)
        given["mesh"] = dist.init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, **given)
        if head:
            given["mp_policy"] = MixedPrecisionPolicy(**head)
        if units == "head":
            fully_shard(model.lm_head, **given)
        elif units == "group":
            fully_shard([model.norm, model.lm_head], **given)
        elif units == "hooked":
            model.lm_head.register_forward_hook(lambda *arguments: 2 * arguments[-1])
            fully_shard(model.lm_head, **given)
        if head:
            given["mp_policy"] = MixedPrecisionPolicy(**policy)
        return fully_shard(model, **given) if root else model

    return wrap


def tensor_parallel(local: bool = True) -> Any:
    def wrap(model: Any) -> Any:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        style = ColwiseParallel(output_layouts=Replicate(), use_local_output=local)
        mesh = dist.init_device_mesh("cpu", (2,))
        return parallelize_module(model, mesh, {"lm_head": style})

    return wrap


def zero3(model: Any) -> Any:
    """Partitions the head's weight as ZeRO-3 of DeepSpeed: hooks gather it for each pass."""
    weight = model.lm_head.weight
    shards = [part.clone() for part in weight.detach().flatten().tensor_split(2)]

    def gather(*_: Any) -> None:
        weight.data = torch.cat(shards).view(VOCABULARY, FEATURES)

    def release(*_: Any) -> None:
        weight.data = torch.empty(0)

    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(release)
    model.lm_head.register_full_backward_pre_hook(gather)
    model.full_weight = gather
    release()
    return model


def compiled(model: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="eager")


def same(model: Any) -> Any:
    return model


HALF = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
WRAPPERS = {
    "plain": Wrapper(same, "fused", "fused"),
    "checkpointing": Wrapper(same, "fused", "fused", {"saves": False}),
    "torch.compile": Wrapper(compiled, "fused", "refused"),
    "DDP": Wrapper(ddp, "fused", "fused"),
    "DDP, tied": Wrapper(ddp, "fused", "fused", {"tied": True}),
    "FSDP1": Wrapper(fsdp1(False), "fused", "refused"),
    "FSDP1, flat": Wrapper(fsdp1(True), "fused", "refused"),
    "FSDP1, tied": Wrapper(fsdp1(False), "fused", "refused", {"tied": True}),
    "root unit": Wrapper(fsdp2(""), "fused", "refused"),
    "root unit, tied": Wrapper(fsdp2(""), "fused", "refused", {"tied": True}),
    "root unit, bf16": Wrapper(fsdp2("", **HALF), "fused", "refused", {}, 2e-2),
    "unit": Wrapper(fsdp2(), "fused", "refused"),
    "unit, gathered once": Wrapper(fsdp2(reshard_after_forward=False), "fused", "refused"),
    "unit, checkpointing": Wrapper(fsdp2(), "fused", "refused", {"saves": False}),
    "unit, bf16": Wrapper(fsdp2(**HALF), "fused", "refused", {}, 2e-2),
    "unit, float32 output": Wrapper(
        fsdp2(**HALF, head=HALF | {"output_dtype": torch.float32}), "fused", "refused", {}, 2e-2
    ),
    "unit, bf16 output": Wrapper(
        fsdp2(**HALF, head=HALF | {"output_dtype": torch.bfloat16}), "fused", "refused", {}, 2e-2
    ),
    "unit, bf16 head": Wrapper(fsdp2(head=HALF), "fused", "refused", {}, 2e-2),
    "unit, two calls": Wrapper(fsdp2(), "fused", "refused", {"reads": "twice"}),
    "unit, read": Wrapper(fsdp2(), "told", "refused", {"reads": "maximum"}),
    "unit, in C++": Wrapper(fsdp2(), "told", "refused", {"reads": "function"}),
    "unit with a hook": Wrapper(fsdp2("hooked"), "told", "refused"),
    "unit of norm and head": Wrapper(fsdp2("group"), "fused", "refused"),
    "unit without a root": Wrapper(fsdp2(root=False), "fused", "refused"),
    "tensor parallel": Wrapper(tensor_parallel(), "told", "left"),
    "ZeRO-3": Wrapper(zero3, "told", "left"),
}

# ---- training ------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """The result of training: values to compare, and what happened after the first step."""

    values: list[Tensor]
    outcome: str
    collectives: list[tuple[str, int]]
    warned: list[str]


@contextlib.contextmanager
def recorded(collectives: list[tuple[str, int]], logits: list[Tensor]) -> Any:
    """Records calls of collectives, with their sizes, and the computed logits."""
    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    before = {name: getattr(dist, name) for name in names}
    linear = F.linear

    def collective(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if args else next(iter(kwargs.values()))
            collectives.append((name, tensor.numel()))
            return before[name](*args, **kwargs)

        return call

    def watched(input: Tensor, weight: Tensor, *bias: Any, **kwargs: Any) -> Tensor:
        output = linear(input, weight, *bias, **kwargs)
        if not torch.compiler.is_compiling() and output.shape[-1] == VOCABULARY:
            logits.append(output.detach()[:0])
        return output

    try:
        for name in names:
            setattr(dist, name, collective(name))
        F.linear = watched
        yield
    finally:
        F.linear = linear
        for name in names:
            setattr(dist, name, before[name])


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    draw = lambda: torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)  # noqa: E731
    targets = draw().masked_fill(torch.rand(BATCH, LENGTH, generator=generator) < 0.2, -100)
    shift = 0.1 * torch.randn(BATCH, LENGTH, FEATURES, generator=generator)
    return draw(), targets, shift.requires_grad_()


@contextlib.contextmanager
def without_sync(wrapped: Any, active: bool) -> Any:
    """Lets the gradients of a step accumulate without collectives."""
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(not active)
        yield
    else:
        with wrapped.no_sync() if active and hasattr(wrapped, "no_sync") else contextlib.nullcontext():
            yield


def parameters(wrapped: Any) -> list[Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

    gathered = FSDP1.summon_full_params(wrapped) if isinstance(wrapped, FSDP1) else None
    with gathered or contextlib.nullcontext():
        return [getattr(p, "full_tensor", p.clone)().detach().clone() for p in wrapped.parameters()]


def train(wrapper: Wrapper, when: str, micro_batches: int = 1) -> Trained:
    model = build(**wrapper.options)
    if when == "before":
        pyfused.convert(model, head="lm_head")
    wrapped = wrapper.wrap(model)
    if when == "after":
        if wrapped is not model:
            with pytest.raises(ValueError, match="expected"):
                pyfused.convert(wrapped, head="lm_head")
        try:
            pyfused.convert(model, head="lm_head")
        except ValueError:
            return Trained([], "refused", [], [])
    values: list[Tensor] = []
    collectives: list[tuple[str, int]] = []
    logits: list[Tensor] = []
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            optimizer.zero_grad()
            if step == 1:  # the first loss is compared with torch's
                logits.clear()
                collectives.clear()
            with recorded(collectives, logits):
                for micro_batch in range(micro_batches):
                    tokens, targets, shift = batch(step * micro_batches + micro_batch)
                    with without_sync(wrapped, micro_batch + 1 < micro_batches):
                        output, loss = wrapped(tokens, targets, shift)
                        loss.backward()
                    assert shift.grad is not None
                    values += [loss.detach(), shift.grad]
            getattr(model, "full_weight", lambda: None)()
            optimizer.step()
    values += parameters(wrapped)
    told = [str(each.message) for each in caught if "pyfused" in str(each.message)]
    fused = output is None and not logits
    return Trained(values, "fused" if fused else "told" if told else "left", collectives, told)


def compared(wrapper: Wrapper, when: str, micro_batches: int = 1) -> dict[str, Any]:
    """Returns how a converted model differs from an unconverted one."""
    found = train(wrapper, when, micro_batches)
    expected = train(wrapper, "", micro_batches) if found.values else found
    errors = [
        float((a - b).norm() / b.norm().clamp(min=1e-3))
        for a, b in zip(found.values, expected.values, strict=False)
    ]
    return {
        "outcome": found.outcome,
        "error": max(errors, default=0.0),
        "warnings": found.warned,
        "collectives": found.collectives,
        "expected": expected.collectives,
    }


def rank_of_two(rank: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    sizes.FORCED = "every size"  # as in other tests
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[Any, Any] = {}
    for name, wrapper in WRAPPERS.items():
        for when in ("before", "after"):
            try:
                results[name, when] = compared(wrapper, when)
            except Exception as error:
                import traceback
                results[name, when] = traceback.format_exc()
                if rank == 0: print(name, when, results[name, when])
    dist.barrier()
    dist.destroy_process_group()
    pipe.send_bytes(pickle.dumps(results))


if __name__ == "__main__":
    import tempfile, sys, time
    t=time.time()
    names = sys.argv[1:]
    for r in map(pickle.loads, in_processes(rank_of_two, 2, tempfile.mkdtemp())):
        for k, v in r.items():
            print(k, v if isinstance(v, str) else (v["outcome"], v["error"], v["warnings"], "SAME" if v["collectives"] == v["expected"] else (v["collectives"], v["expected"])))
        print("-----")
    print(time.time()-t)
