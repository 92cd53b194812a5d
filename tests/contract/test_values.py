"""The contract of every operator: values, dtypes, memory, empty inputs, threads and modules.

The tests run the calls that `catalogue.py` lists for every declared operator.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import catalogue
import interpreter
import pytest
import torch
from catalogue import OF_FAMILIES, SOME, TRIED, Call, Example, every_example, every_operator, ours
from check_calls import ERRORS, check_call, converted, natively, run
from compare import (
    DEVICE,
    FLOATS,
    HALF,
    Errors,
    assert_accurate,
    largest,
    operators_of_torch,
    outcome,
    parameters,
)
from conftest import ISAS, KernelCalls, fused_always, fused_by_size
from grid import grid
from samples import LAYOUTS, SAME_VALUES, Layout, is_divergence
from torch import Tensor

import pyfused
from pyfused import nn
from pyfused.backends import cpu
from pyfused.ops.operators import COSINE_EMBEDDING_LOSS as COSINE
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY, LINEAR_LOG_PROBS, LINEAR_TOPK_KL_DIV

close = torch.testing.assert_close


def rearranged(call: Call, layout: Layout, others: Layout | None = None) -> Call:
    """Returns the call with all tensors and grad_output copied to another layout."""
    first, *names = call.tensors
    chosen = {first: layout} | dict.fromkeys(names, others or layout)
    given = {name: chosen[name](x.detach()) for name, x in call.tensors.items() if x.numel() > 1}
    for name in given.keys() & call.leaves.keys():
        given[name].requires_grad_()
    return Call(call.op, call.given | given, layout)


def assert_same_outcome(call: Call, expected: Callable[[], list[Tensor]]) -> None:
    """Compares results, or expects both calls to raise."""
    try:
        results = expected()
    except ERRORS:
        with pytest.raises(ERRORS):
            run(call, ours)
    else:
        close(run(call, ours), results, equal_nan=True)


# ---- values --------------------------------------------------------------------------------------


@grid(example=catalogue.EXAMPLES.values(), dtype=FLOATS)
def test_values_and_gradients(example: Example, dtype: Any, kernel_calls: KernelCalls) -> None:
    """Kernels return torch's dtypes, and are as accurate as torch."""
    call = example.call(dtype)
    check_call(call)
    assert kernel_calls.total()


HEADS = [e for e in TRIED.values() if e.op.is_linear and "loss_dtype" not in e.options]


@grid(
    example=HEADS,
    dtype=FLOATS,
    shape=[(4, 70)] if interpreter.ON else [(40, 70), (50, 1100)],
    half_products=["half", "float32"],
    number=[1, 3],
    isa=ISAS,
)
def test_accuracy_of_heads(
    example: Example,
    dtype: torch.dtype,
    shape: tuple[int, int],
    half_products: str,
    number: int,
    isa: str,
    threads: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Draws each answer of what is measured or chosen for a machine."""
    monkeypatch.setattr(cpu, "HALF_PRODUCTS", half_products)
    threads(number)
    call, errors = example.call(dtype, shape), Errors()
    exact = run(converted(call, torch.float64), catalogue.reference)
    results = zip(run(call, ours), run(call, catalogue.reference), exact, strict=True)
    for i, (got, native, best) in enumerate(results):
        if got.is_floating_point():
            errors.add(f"result {i}", got, native.to(got.dtype), best, products=max(shape))
    errors.check(roundings=128 if dtype is torch.float64 else 2)  # no wider dtype for sums


@grid(
    example=TRIED.values(),
    shape=[(0, 5), (5, 0), (0, 5, 2), (5, 0, 2)],
    sizes=[fused_always, fused_always if interpreter.ON else fused_by_size],
)
def test_no_elements(example: Example, shape: tuple[int, ...], sizes: Any) -> None:
    """Values and gradients of empty inputs equal torch's, also if two operands are one object."""
    call = example.call(shape=shape)
    same = [{y: call.given[x]} for x, y in itertools.permutations(call.tensors, 2)]
    for changed in ({}, *same):
        changed_call = replace(call, given=call.given | changed)
        with sizes():
            assert_same_outcome(changed_call, partial(natively, changed_call))


@grid(example=TRIED.values(), dtype=[torch.float32, torch.float64, *HALF])
def test_autocast(example: Example, dtype: torch.dtype) -> None:
    """Results have torch's dtypes, and at most torch's errors plus roundings."""
    call = example.call(dtype)
    if DEVICE != "cpu" and example.op.name == "binary_cross_entropy":
        with torch.autocast(DEVICE), pytest.raises(RuntimeError, match="unsafe to autocast"):
            run(call, ours)
        return
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run(call, ours)
        try:
            native = run(call, catalogue.reference)
        except (NotImplementedError, RuntimeError):  # torch lacks some half-precision operators
            native = natively(call)
    exact = run(converted(call, torch.float64), catalogue.reference)
    rounded = torch.bfloat16 if call.op.is_linear else dtype  # the dtype of matrix products
    if dtype is torch.float64:  # not affected by autocast; torch has float32 constants
        rounded = torch.float32
    for found, of_torch, best in zip(got, native, exact, strict=True):
        assert found.dtype == of_torch.dtype
        if found.is_floating_point():
            eps = max(torch.finfo(found.dtype).eps, torch.finfo(rounded).eps)
            error = 2 * largest(of_torch.double() - best) + 16 * eps * largest(best)
            assert_accurate(found, best, error, native=of_torch)


@pytest.mark.cpu
def test_autocast_makes_no_float32_copy_of_the_logits() -> None:
    """The kernel reads half-precision logits; torch converts them first."""
    rows, target = 1 << 15, torch.arange(1 << 15) % 3
    logits = torch.randn(rows, 3, dtype=torch.bfloat16, requires_grad=True)
    copies = []
    for functional in (pyfused.functional, torch.nn.functional):
        with operators_of_torch("aten::_to_copy") as casts, torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(logits, target)
            (gradient,) = torch.autograd.grad(loss, logits)
        assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
        copies.append(sum(shapes[0] == [rows, 3] for shapes in casts))
    assert copies[0] == 0 < copies[1]


# ---- memory --------------------------------------------------------------------------------------


@grid(example=SOME.values(), layout=LAYOUTS, shape=[(6, 5), (2, 5, 3)])
def test_layouts(example: Example, layout: str, shape: Any, kernel_calls: KernelCalls) -> None:
    """Results do not depend on strides, which may differ between operands.

    Some layouts repeat elements, which a teacher's class indices must not do.
    """
    layouts = SAME_VALUES if example.op is LINEAR_TOPK_KL_DIV else LAYOUTS
    names = [*layouts]
    if layout in layouts:
        other = names[(names.index(layout) + 1) % len(names)]
        # In the interpreter, an example has one layout, but each operand is tried in all of them.
        for others in names if interpreter.ON else (layout, other):
            call = rearranged(example.call(shape=shape), layouts[layout], layouts[others])
            assert_same_outcome(call, partial(run, converted(call), ours))
        of_matrices = COSINE, LINEAR_CROSS_ENTROPY, LINEAR_LOG_PROBS
        assert kernel_calls.total() or (example.op in of_matrices and len(shape) == 3)


@grid(example=SOME.values(), layout=SAME_VALUES, shape=[(6, 5), (2, 5, 4, 3)])
def test_strides_of_results(example: Example, layout: str, shape: tuple[int, ...]) -> None:
    """Users may call view() on a result where torch's is contiguous."""
    moved = rearranged(example.call(shape=shape), SAME_VALUES[layout])
    expected = outcome(moved.reference)
    if isinstance(expected, Tensor):  # else torch does not support the shape
        assert moved.ours().stride() == expected.stride()


@every_operator
def test_memory_beyond_a_view_is_neither_read_nor_written(example: Example) -> None:
    """Surrounds each tensor with NaN, which must not reach results and must not change."""
    call, whole = example.call(), {}
    for name, x in call.tensors.items():
        if not x.is_floating_point():
            continue
        around = torch.full([n + 4 for n in x.shape], float("nan"), dtype=x.dtype)
        view = around[(slice(2, -2),) * x.dim()]
        view.copy_(x.detach())
        whole[name], call.given[name] = around, view.requires_grad_(x.requires_grad)
    value = call.ours()
    assert value.isfinite().all()
    for gradient in torch.autograd.grad(value.sum(), [*call.leaves.values()]):
        assert gradient.isfinite().all()
    for name, around in whole.items():
        assert int(around.isnan().sum()) == around.numel() - call.given[name].numel()


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.cpu
@grid(
    example=OF_FAMILIES.values(), shape=[(203, 700), (7003, 10), (9, 4100)], dtype=FLOATS, isa=ISAS
)
def test_large_calls_are_bitwise_identical_for_every_number_of_threads(
    example: Example, shape: tuple[int, int], dtype: torch.dtype, isa: str, threads: Any
) -> None:
    """Values are torch's. Matrix products, which libraries compute, may differ in the last bits."""
    call, found = example.call(dtype, shape), []
    call.given.pop("memory_budget", None)  # would take thousands of small products
    check_call(call)
    for number in (1, 3):
        threads(number)
        found.append(run(call, ours))
    tolerance: dict[str, float] = {} if call.op.is_linear else {"rtol": 0, "atol": 0}
    if call.op.is_linear and dtype is torch.float16:  # the default is less than one bit
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-5}
    close(*found, **tolerance)


# ---- modules -------------------------------------------------------------------------------------


@every_example
def test_a_module_and_its_copies(example: Example, kernel_calls: KernelCalls) -> None:
    """A module and its pickled copies compute the same as the function, and are explained alike."""
    call = example.call()
    op, options, layer = call.op, dict(call.given), dict[str, Any]()
    tensors = [options.pop(o.name) for o in op.operands if not o.optional]
    numbers = [operand.name for operand in op.operands if operand.number]
    by_name = {name: options.pop(name) for name in numbers if name in options}
    if "reduction" in parameters(op):
        options.setdefault("reduction", parameters(op)["reduction"])  # a module's may differ
    if is_divergence(op):
        by_name = {name: options.pop(name) for name in call.tensors if name in options}
    elif "linear" in op.name:
        layer = {"weight": tensors.pop(1), "bias": options.pop("linear_bias", None)}
        options |= {"in_features": 4, "num_classes": 5, "bias": layer["bias"] is not None}
    try:
        module = getattr(nn, op.module)(**options)
    except TypeError:  # an argument that the module lacks
        assert hasattr(torch.nn, op.module) or "with_metrics" in options
        return
    for name, x in layer.items():
        setattr(module.linear, name, x if x is None else torch.nn.Parameter(x.detach()))
    explanation = pyfused.explain(module, *tensors, **by_name)
    assert bool(kernel_calls) == (explanation.backend != "torch")
    assert explanation == pyfused.explain(op.name, **call.given)
    kernel_calls.clear()
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        found = each(*[x * 1 for x in tensors], **by_name)
        if isinstance(found, tuple):
            found = torch.stack([result for result in found[:3] if result is not None])
        close(found, call.ours())


@pytest.mark.thresholds
@every_example
def test_both_sides_of_the_size_limit(example: Example, kernel_calls: KernelCalls) -> None:
    """A small call is torch's, bit for bit; a kernel's results are close, with the same dtypes."""
    call = example.call()
    small = run(call, ours)
    bits = {} if kernel_calls.total() else {"rtol": 0.0, "atol": 0.0}  # some kernels run always
    close(small, run(call, catalogue.reference), **bits, equal_nan=True)
    with fused_always():
        close(run(call, ours), small, equal_nan=True)
