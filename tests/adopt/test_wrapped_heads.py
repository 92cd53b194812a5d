"""Converted heads in wrappers of torch train like unconverted ones.

Two processes train a tiny language model in each wrapper, and compare losses, the gradient of an
input and parameters after the steps.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from language_models import are_computed
from processes import run_checks
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

import pyfused
from pyfused.dispatch import reasons, sizes

pytestmark = pytest.mark.skipif(torch.__version__ < "2.12", reason="lacks parts of FSDP2")

VOCABULARY, FEATURES, BATCH, LENGTH, STEPS = 1001, 16, 2, 24, 2


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.Tanh(), nn.Linear(24, FEATURES))


class Model(nn.Module):
    """A language model.

    Args:
        tied: Whether the embedding and the head share a parameter.
        has_loss: Whether the forward computes the loss.
    """

    def __init__(self, tied: bool = False, has_loss: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.has_loss = has_loss
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm = nn.LayerNorm(FEATURES)
        self.lm_head = nn.Linear(FEATURES, VOCABULARY, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor, shift: Tensor) -> Any:
        x = self.embedding(tokens) + shift
        for block in self.blocks:
            x = x + block(x)
        logits = self.lm_head(self.norm(x))
        return logits, loss_of(logits, targets) if self.has_loss else None


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# ---- wrappers ------------------------------------------------------------------------------------


class Wrapper(NamedTuple):
    """A way to train a model.

    Attributes:
        wrap: Returns the wrapped model.
        before: The result if the model is converted before it is wrapped: "fused"; "warned", if it
            computes its logits and one warning gives the reason; "left", if it computes its logits
            without a warning; or "refused", if convert raises.
        after: The result if the model is converted after it is wrapped.
        options: The model's options.
        tolerance: The tolerance for losses, gradients and parameters.
        same_batch: Whether both processes train with the same batches.
    """

    wrap: Callable[[Any], Any]
    before: str
    after: str
    options: dict[str, Any] = {}  # noqa: RUF012
    tolerance: float = 1e-5
    same_batch: bool = False


ddp = nn.parallel.DistributedDataParallel


def fsdp1(flat: bool) -> Any:
    options = {"use_orig_params": not flat, "device_id": torch.device("cpu")}
    return lambda model: FullyShardedDataParallel(model, **options)


def fsdp2(units: str = "head", **policy: Any) -> Any:
    def wrap(model: Any) -> Any:
        given: dict[str, Any] = {"mesh": dist.init_device_mesh("cpu", (2,))}
        if policy:
            given["mp_policy"] = MixedPrecisionPolicy(**policy)
        for block in model.blocks:
            fully_shard(block, **given)
        if units:
            head = model.lm_head
            fully_shard([model.norm, head] if units == "group" else head, **given)
        return fully_shard(model, **given)

    return wrap


def tensor_parallel(model: Any, layout: Any = Replicate(), **style: Any) -> Any:  # noqa: B008
    plan = {"lm_head": ColwiseParallel(output_layouts=layout, **style)}
    return parallelize_module(model, dist.init_device_mesh("cpu", (2,)), plan)


def not_wrapped(model: Any) -> Any:
    return model


def compiled(wrap: Callable[[Any], Any] = not_wrapped, from_elements: int = 0) -> Any:
    """Compiles a wrapped model whose head is fused from this number of logits on."""

    def wrap_and_compile(model: Any) -> Any:
        torch.compiler.reset()
        sizes.COMPILED["linear_cross_entropy"] = from_elements, from_elements
        return torch.compile(wrap(model), backend="eager")

    return wrap_and_compile


HALF = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
WRAPPERS = {
    "plain": Wrapper(not_wrapped, "fused", "fused"),
    "compiled": Wrapper(compiled(), "fused", "fused"),
    "compiled, small": Wrapper(compiled(from_elements=sys.maxsize), "left", "left"),
    "DDP, compiled": Wrapper(compiled(ddp), "fused", "fused"),
    "root unit, compiled": Wrapper(compiled(fsdp2("")), "fused", "refused"),
    "DDP": Wrapper(ddp, "fused", "fused"),
    "DDP, unused": Wrapper(partial(ddp, find_unused_parameters=True), "fused", "fused"),
    "DDP, tied": Wrapper(ddp, "fused", "fused", {"tied": True}),
    "DDP, loss outside": Wrapper(ddp, "fused", "fused", {"has_loss": False}),
    "FSDP1": Wrapper(fsdp1(False), "fused", "fused"),
    "FSDP1, flat": Wrapper(fsdp1(True), "fused", "fused"),
    "FSDP1, loss outside": Wrapper(fsdp1(False), "fused", "fused", {"has_loss": False}),
    "root unit, tied": Wrapper(fsdp2(""), "fused", "refused", {"tied": True}),
    "root unit, bf16": Wrapper(fsdp2("", **HALF), "fused", "refused", {}, 2e-2),
    "unit": Wrapper(fsdp2(), "warned", "refused"),
    "unit of norm and head": Wrapper(fsdp2("group"), "warned", "refused"),
    "TP": Wrapper(tensor_parallel, "warned", "left", same_batch=True),
    "TP, loss_parallel": Wrapper(
        partial(tensor_parallel, layout=Shard(-1), use_local_output=False),
        "warned",
        "left",
        {"has_loss": False},
        same_batch=True,
    ),
}

# ---- training ------------------------------------------------------------------------------------


def batch(step: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
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
        with wrapped.no_sync() if active and hasattr(wrapped, "no_sync") else nullcontext():
            yield


def parameters(wrapped: Any) -> list[Tensor]:
    is_fsdp1 = isinstance(wrapped, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(wrapped) if is_fsdp1 else nullcontext():
        return [getattr(p, "full_tensor", p.clone)().detach().clone() for p in wrapped.parameters()]


def build(wrapper: Wrapper, when: str) -> Any:
    """Returns a wrapped model.

    Args:
        when: Whether the model is converted "before" or "after" it is wrapped, or "" for never.
    """
    model: Any = Model(**wrapper.options)
    if when == "before":
        pyfused.convert(model, head="lm_head")
    wrapped = wrapper.wrap(model)
    if when == "after":
        if wrapped is not model:
            with pytest.raises(ValueError, match="expected"):
                pyfused.convert(wrapped, head="lm_head")
        pyfused.convert(model, head="lm_head")
    return wrapped


def train(wrapper: Wrapper, when: str, accumulates: bool) -> tuple[list[Tensor], str]:
    """Trains a model, and returns the values to compare and the outcome of the conversion.

    A step has two batches if `accumulates`, whose gradients are reduced once.
    """
    wrapped = build(wrapper, when)
    reasons._reported.clear()
    initial, values = parameters(wrapped), list[Tensor]()
    rank = 0 if wrapper.same_batch else dist.get_rank()
    computed, optimizer = False, torch.optim.SGD(wrapped.parameters(), lr=0.5)
    with warnings.catch_warnings(record=True) as caught, loss_parallel():
        warnings.simplefilter("always")
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(1 + accumulates):
                tokens, targets, shift = batch(2 * step + part, rank)
                with without_sync(wrapped, accumulates and part == 0):
                    logits, loss = wrapped(tokens, targets, shift)
                    loss = loss_of(logits, targets) if loss is None else loss
                    loss.backward()
                computed |= are_computed(logits)
                values += [loss.detach(), shift.grad]
            optimizer.step()
    values += [a - b for a, b in zip(parameters(wrapped), initial, strict=True)]
    messages = [str(each.message) for each in caught if "pyfused" in str(each.message)]
    outcome = "warned" if messages else "left" if computed else "fused"
    assert len(messages) == (outcome == "warned"), messages
    return values, outcome


@cache
def unconverted(name: str, accumulates: bool) -> list[Tensor]:
    return train(WRAPPERS[name], "", accumulates)[0]


def check(name: str, when: str, accumulates: bool) -> None:
    wrapper = WRAPPERS[name]
    if getattr(wrapper, when) == "refused":
        with pytest.raises(ValueError, match="is not sharded by FSDP yet, got FSDP"):
            build(wrapper, when)
        return
    values, outcome = train(wrapper, when, accumulates)
    assert outcome == getattr(wrapper, when)
    for value, right in zip(values, unconverted(name, accumulates), strict=True):
        assert (value - right).norm() <= wrapper.tolerance * right.norm()


CASES = [(name, when, False) for name in WRAPPERS for when in ("before", "after")]
CASES += [(name, "before", True) for name in ("DDP", "FSDP1", "root unit, tied")]


def checks_of(rank: int) -> dict[Any, Callable[[], None]]:
    return {case: partial(check, *case) for case in CASES}


@pytest.fixture(scope="module")
def failures() -> dict[Any, str]:
    return run_checks(checks_of, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_wrapped_models_train_like_unconverted_ones(case: Any, failures: dict[Any, str]) -> None:
    assert case not in failures, failures[case]
