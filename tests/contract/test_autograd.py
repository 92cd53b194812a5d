"""The contract of every operator with autograd: retained, shared, hooked and differentiated graphs.

The tests run the calls that `catalogue.py` lists for every declared operator.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import interpreter
import pytest
import torch
from catalogue import SOME, Call, Example, every_example, every_operator
from compare import DEVICE, assert_accurate, flattened, largest, parameters, random_grad_output
from conftest import KernelCalls
from samples import declared, is_log_probs
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError, checkpoint

import pyfused
from pyfused import functional as fused
from pyfused.ops.activation import Activation

# torch compiles its forward-mode decompositions with torch.jit at their first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

close = torch.testing.assert_close
CHANGED = "modified by an inplace operation"
ours, of_torch = Call.ours, Call.reference
Function = Callable[..., Tensor]  # one of these


def gradients(call: Call, function: Function = ours, grad_output: Any = None) -> tuple[Tensor, ...]:
    value = function(call)
    return torch.autograd.grad(value, [*call.leaves.values()], above(value, grad_output))


def above(value: Tensor, grad_output: Tensor | None = None) -> Tensor:
    if grad_output is None:
        return random_grad_output(value.shape).to(value)
    return grad_output.to(value.dtype).expand(value.shape)


def through(call: Call, factor: Tensor) -> dict[str, Tensor]:
    """Returns the differentiated arguments as results of a graph: leaves times a factor."""
    return {name: x * factor for name, x in call.leaves.items()}


# ---- grad_output ---------------------------------------------------------------------------------


@pytest.mark.interpreted
@every_operator
@pytest.mark.parametrize("number", [-2.5, math.inf])
def test_an_expanded_grad_output(example: Example, number: float) -> None:
    """expand() returns a tensor with strides of 0 if the result has several elements."""
    call = example.call()
    found = [gradients(call, function, torch.tensor(number)) for function in (ours, of_torch)]
    if math.isinf(number):  # an infinite gradient may be NaN, and 0 times infinity 0
        found = [[x.isfinite() & (x != 0) for x in each] for each in found]
    close(*found)


@pytest.mark.interpreted
@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_through_a_retained_graph(example: Example, dtype: torch.dtype) -> None:
    """The owner of a gradient may overwrite it; neither arguments nor grad_output are modified."""
    call = example.call(dtype)
    value = call.ours()
    tensors = [*call.tensors.values(), above(value)]
    before, first = [(x._version, x.detach().clone()) for x in tensors], None
    if dtype is torch.float32:  # test_values.py checks other dtypes
        first = gradients(call, of_torch)
    for _ in range(2):
        found = torch.autograd.grad(value, [*call.leaves.values()], tensors[-1], retain_graph=True)
        first = first or [gradient.clone() for gradient in found]
        for gradient, expected in zip(found, first, strict=True):
            assert_accurate(gradient, expected, 16 * torch.finfo(dtype).eps * largest(expected))
            gradient.fill_(float("nan"))
    for x, (version, copy) in zip(tensors, before, strict=True):
        assert x._version == version
        assert torch.equal(x, copy)


# ---- without a graph -----------------------------------------------------------------------------


@pytest.mark.interpreted
@every_operator
def test_without_gradients(example: Example, kernel_calls: KernelCalls) -> None:
    call = example.call()
    expected, kept = call.reference().detach(), {n: x.detach() for n, x in call.leaves.items()}
    value = call.ours(**kept)
    assert not value.requires_grad
    assert kernel_calls.keys() & {"row_gradients", f"{call.op.name}_backward"} == set()
    close(value, expected)
    launched, names = +kernel_calls, {operand.name for operand in call.op.all_operands}
    floats = [x for x in call.tensors if x in names and call.given[x].is_floating_point()]
    for name in floats:  # kernels may not differentiate this operand
        kernel_calls.clear()
        with torch.no_grad():
            value = call.ours(**kept | {name: call.given[name].detach().requires_grad_()})
        assert not value.requires_grad
        close(value, expected)
        assert kernel_calls.keys() == launched.keys()
    with torch.inference_mode(), torch.enable_grad():  # without effect in inference mode
        value = call.ours()
        assert value.is_inference()
        assert not value.requires_grad
        close(value.clone(), expected)


SEVERAL = {n: e for n, e in SOME.items() if len(e.call().tensors) > 1}


@pytest.mark.parametrize("example", SEVERAL.values(), ids=SEVERAL)
def test_inference_tensors_among_the_arguments(example: Example) -> None:
    """Autograd cannot save inference tensors, so calls copy those that backward reads."""
    call = example.call()
    first, *others = call.tensors
    with torch.inference_mode():
        kept = {name: call.given[name].detach().clone() for name in others}
    value, leaf = call.ours(**kept).sum(), call.leaves[first]
    (expected, *_) = gradients(call, of_torch, torch.tensor(1.0))
    close(torch.autograd.grad(value, leaf, retain_graph=True)[0], expected)
    if example.id == "mse_loss":  # backward needs only the gradients, so no copy was saved
        with pytest.raises(RuntimeError, match="expected operands created outside of inference"):
            torch.autograd.grad(value, leaf, create_graph=True)


@every_operator
@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])
def test_the_graph_holds_all_tensors(example: Example, hooks: bool) -> None:
    """Without it, or if hooks replace saved tensors, they are freed."""
    call = example.call()
    gc.freeze()  # collecting the objects of earlier tests takes a tenth of a second
    hidden = {name: x * 1 for name, x in call.tensors.items()}
    memory = [weakref.ref(x.untyped_storage()) for x in hidden.values()]
    with saved_tensors_hooks(Tensor.clone, lambda x: x) if hooks else contextlib.nullcontext():
        value = call.ours(**hidden)
    hidden.clear()
    if not hooks:
        value.sum().backward()
        del value
    gc.collect()
    gc.unfreeze()
    assert [each() for each in memory] == [None] * len(memory)


# ---- modified arguments and results --------------------------------------------------------------


@pytest.mark.interpreted
@every_example
def test_each_gradient_separately(example: Example) -> None:
    """One argument requires grad, or gradients are computed one by one through a retained graph."""
    call = example.call()
    expected, value = dict(zip(call.leaves, gradients(call, of_torch), strict=True)), call.ours()
    for name, x in reversed(call.leaves.items()):
        frozen = {other: y.detach() for other, y in call.leaves.items() if other != name}
        alone = call.ours(**frozen)
        close(torch.autograd.grad(alone, x, above(alone))[0], expected[name])
        close(torch.autograd.grad(value, x, above(value), retain_graph=True)[0], expected[name])


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("when", ["first", "second", "create_graph"])
def test_modified_arguments(
    example: Example, dtype: Any, when: str, kernel_calls: KernelCalls
) -> None:
    """Backward raises if it reads the argument; else it computes the gradients of the old values.

    Where the forward pass computes the gradients, only ``create_graph`` reads saved arguments, as
    in torch's cross_entropy. An option of half precision is copied.
    """
    call = example.call(dtype)
    value, expected = call.ours(), gradients(call, of_torch if dtype is torch.float32 else ours)
    kernel_calls.clear()
    torch.autograd.grad(value, [*call.leaves.values()], above(value))
    backward_reads = bool(kernel_calls)
    for name, x in call.tensors.items():
        changed, saved = x.detach().clone().requires_grad_(x.requires_grad), list[int]()
        hidden = changed * 1 if name in call.leaves else changed
        with saved_tensors_hooks(lambda y: saved.append(y.data_ptr()) or y, lambda y: y):  # noqa: B023
            call.ours(**{name: hidden})
        value = call.ours(**{name: hidden})
        leaves = [changed if other == name else y for other, y in call.leaves.items()]
        if when == "second":
            torch.autograd.grad(value, leaves, above(value), retain_graph=True)
        with torch.no_grad():
            hidden.copy_(1 - hidden if hidden.is_floating_point() else hidden.flip(0))
        create_graph = when == "create_graph"
        raises = hidden.data_ptr() in saved and (backward_reads or create_graph)
        error = pytest.raises(RuntimeError, match=f"(?s){CHANGED}.*Pass a clone to the call")
        with error if raises else contextlib.nullcontext():
            got = torch.autograd.grad(value, leaves, above(value), create_graph=create_graph)
            close(got, expected, msg=lambda message, name=name: f"{name}: {message}")


@every_example
def test_results_can_be_changed_in_place(example: Example) -> None:
    """Each result has its own memory, and only activations save their result, as in torch."""
    call = example.call()
    given = dict(call.given)
    function = getattr(fused, call.op.name + "_with_metrics" * given.pop("with_metrics", False))
    expected, results = gradients(call), flattened(function(**given))
    memory = [x.untyped_storage().data_ptr() for x in (*results, *call.tensors.values())]
    assert len({*memory[: len(results)]} - {*memory[len(results) :]}) == len(results)
    for x in results:
        x.detach().zero_()
    results = [x for x in flattened(function(**given)) if x.requires_grad]
    for x in results:
        x.mul_(2)
    value = torch.stack(results) if is_log_probs(call.op) else results[0]
    leaves = [*call.leaves.values()]
    if getattr(call.op, "saves", "input") == "output":
        with pytest.raises(RuntimeError, match=CHANGED):
            torch.autograd.grad(value, leaves, above(value) / 2)
    else:
        close(torch.autograd.grad(value, leaves, above(value) / 2), expected)


# ---- hooks, checkpoints, anomaly mode ------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_tensor_hooks(example: Example, dtype: torch.dtype) -> None:
    """Backward reads what hooks return: one tensor for several, in another layout."""
    call = example.call(dtype)
    leaves, packed = [*call.leaves.values()], dict[Any, tuple[Tensor, Tensor]]()

    def pack(x: Tensor) -> Any:
        key = x.shape, x.stride(), x.dtype, x.detach().double().numpy(force=True).tobytes()
        with_gaps = torch.stack([x.detach()] * 2, -1)[..., 0]
        packed.setdefault(key, (with_gaps, x.detach().clone()))
        return key

    with saved_tensors_hooks(pack, lambda key: packed[key][0]):
        first, second = (call.ours(**through(call, torch.ones(()).to(x))) for x in leaves[:1] * 2)
    assert all(isinstance(x, Tensor) for x in getattr(first.grad_fn, "saved_tensors", ()))
    found = torch.autograd.grad([first, second], leaves, [above(first), 2 * above(first)])
    for got, once in zip(found, gradients(call), strict=True):
        assert_accurate(got, 3 * once, 16 * torch.finfo(dtype).eps * largest(3 * once))
    assert all(torch.equal(x, y) for x, y in packed.values())


# What hooks may return for a saved tensor, and whether torch's definition computes with it.
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "wider": (lambda x: x.double() if x.is_floating_point() else x, True),
    "narrower": (lambda x: x.float() if x.is_floating_point() else x, True),
    "subclass": (lambda x: x.as_subclass(Subclass), True),
    "device": (lambda x: x.to("meta"), False),
    "sparse": (lambda x: x.to_sparse() if x.dim() else x, False),
    "shape": (lambda x: x.unsqueeze(0), False),
    "fewer": (lambda x: x.flatten()[:1], False),
}


@every_operator
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hooks_that_change_saved_tensors(example: Example, change: Any) -> None:
    """Kernels read the memory of saved tensors in the format in which they were saved."""
    function, is_valid = change
    call = example.call(torch.float64 if change is CHANGES["narrower"] else torch.float32)
    with saved_tensors_hooks(lambda x: function(x.detach()), lambda x: x):
        value = call.ours()
    leaves = [*call.leaves.values()]
    if not is_valid:
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.autograd.grad(value, leaves, above(value))
        return
    found = torch.autograd.grad(value, leaves, above(value))
    assert [x.dtype for x in found] == [x.dtype for x in leaves]
    close(found, gradients(call, of_torch), rtol=1e-4, atol=1e-4, check_dtype=False)


@every_operator
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpoint(example: Example, reentrant: bool) -> None:
    call = example.call()
    expected = gradients(call, of_torch, torch.tensor(1.0))

    def step(*leaves: Tensor) -> Tensor:
        return call.ours(**dict(zip(call.leaves, leaves, strict=True)))

    checkpoint(step, *call.leaves.values(), use_reentrant=reentrant).sum().backward()
    close([x.grad for x in call.leaves.values()], [*expected])


@every_operator
def test_hooks_that_raise(example: Example) -> None:
    """The error of a hook reaches the user from either pass, as of a checkpoint that differs."""

    def fail(_: Any) -> Any:
        raise CheckpointError("the disk is full")

    call, message = example.call(), r"^the disk is full$"
    with pytest.raises(CheckpointError, match=message), saved_tensors_hooks(fail, fail):
        call.ours()
    with saved_tensors_hooks(lambda x: x, fail):
        value = call.ours()
    with pytest.raises(CheckpointError, match=message):
        value.sum().backward()


@every_operator
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomaly_mode(example: Example) -> None:
    call = example.call()
    with torch.autograd.detect_anomaly():
        close(gradients(call), gradients(call, of_torch))
        with pytest.raises(RuntimeError, match="returned nan values"):
            gradients(call, ours, torch.tensor(float("nan")))


@pytest.mark.skipif(interpreter.ON, reason="the interpreter supports only one thread")
@every_operator
def test_concurrent_python_threads(example: Example) -> None:
    call = example.call()
    factors = [1 + n / 16 for n in range(8)]

    def work(factor: float) -> tuple[Tensor, ...]:
        return gradients(call, ours, torch.tensor(factor, device=DEVICE))

    expected = [gradients(call, of_torch, torch.tensor(factor)) for factor in factors]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(work, factors), expected, strict=True):
            close(got, wanted)


# ---- derivatives computed by the definition ------------------------------------------------------


@every_example
def test_gradients_by_finite_differences(example: Example, kernel_calls: KernelCalls) -> None:
    """Checks first derivatives of the kernels, and second derivatives of the definition."""
    call = example.call(torch.float64)
    if call.op.name == "gaussian_nll_loss" and "eps" in call.given:
        pytest.skip("the variance gets a gradient even where eps replaces it, as in torch")
    if isinstance(call.op, Activation):  # away from kinks
        call.first.add_(0.1 * call.first.sign())

    def function(*leaves: Tensor) -> Tensor:
        return call.ours(**dict(zip(call.leaves, leaves, strict=True)))

    leaves = [*call.leaves.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, nondet_tol=1e-9)
    assert kernel_calls.total()
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, nondet_tol=1e-9)


CONSTANTS = [
    pytest.param(example, operand.name, id=f"{example.id}-{operand.name}")
    for example in SOME.values()
    for operand in declared(example.op).values()
    if not operand.differentiated and not operand.indices
]


@pytest.mark.parametrize(("example", "name"), CONSTANTS)
def test_an_argument_that_is_not_differentiated_requires_grad(example: Example, name: str) -> None:
    """torch computes the gradient, or raises."""
    call = replace(example, optional=(*example.optional, name)).call()
    if "teacher_requires_grad" in parameters(example.op):  # else the teacher is a constant
        call.given["teacher_requires_grad"] = True
    x = call.given[name].detach().clone().requires_grad_()

    def compute(function: Function) -> Tensor:
        return torch.autograd.grad(function(call, **{name: x}).sum(), x)[0]

    try:
        expected = compute(of_torch)
    except RuntimeError as error:
        with pytest.raises(type(error)):
            compute(ours)
    else:
        close(compute(ours), expected)


def assert_alike(compute: Callable[[Function], Any]) -> None:
    """Compares pyfused with torch; if torch lacks a derivative, both raise.

    While torch is patched, results are bitwise equal: a definition that called a patched function
    would recurse into its operator, or compute a part with another kernel.
    """
    try:
        expected = compute(of_torch)
    except RuntimeError as error:
        known = "implemented", "not support", "vmap"
        assert any(words in str(error) for words in known)  # noqa: PT017
        with pytest.raises(RuntimeError, match=r"implemented|not support|vmap"):
            compute(ours)
    else:
        found, before = compute(ours), sys.getrecursionlimit()
        close(found, expected)
        sys.setrecursionlimit(len(inspect.stack(0)) + 300)  # endless recursion would take minutes
        try:
            with pyfused.patch():
                close(compute(ours), found, rtol=0, atol=0)
        finally:
            sys.setrecursionlimit(before)


@pytest.mark.parametrize("name", ["mse_loss", "cross_entropy", "linear_cross_entropy"])
def test_create_graph_frees_gradients_of_the_forward_pass(name: str) -> None:
    """Later passes compute them again."""
    call, saved = SOME[name].call(), list[Any]()
    leaves, shape = [*call.leaves.values()], call.first.shape

    def pack(x: Tensor) -> Tensor:
        if x.shape == shape and not x.requires_grad:
            saved.append(weakref.ref(x.untyped_storage()))
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        value = call.ours(**through(call, torch.ones(())))
    held = sum(each() is not None for each in saved)
    torch.autograd.grad(value, leaves, create_graph=True)
    assert sum(each() is not None for each in saved) < held
    close(torch.autograd.grad(value, leaves), gradients(call, of_torch, torch.tensor(1.0)))


@every_operator
def test_double_backward(example: Example) -> None:
    """Differentiates by every argument and by grad_output, which depend on one tensor."""
    call = example.call(torch.float64)
    first = torch.autograd.grad(call.ours().sum(), [*call.leaves.values()], create_graph=True)
    assert all(gradient.requires_grad for gradient in first)  # even if the second derivative is 0

    def second(function: Function) -> list[Tensor]:
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        value = function(call, **through(call, factor))
        grad_output = torch.linspace(1, 2, value.numel()).view_as(value).to(value)
        leaves = [factor, *call.leaves.values(), grad_output.requires_grad_()]
        first = torch.autograd.grad(value, leaves[:-1], grad_output, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    assert_alike(second)


def forward_mode(step: Function, x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.linspace(-1, 1, x.numel()).view_as(x))
        return [*forward_ad.unpack_dual(step(dual)), step(x)]  # the last one has no tangent


def vmap(step: Function, x: Tensor) -> list[Tensor]:
    batch = torch.stack([x * factor for factor in (1.0, 0.5, 0.25)])
    per_sample = torch.func.grad(lambda x: step(x).sum())
    return [torch.vmap(step)(batch), torch.vmap(per_sample)(batch)]


TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "forward_mode": forward_mode,
    "vmap": vmap,
    "hessian": lambda step, x: torch.func.hessian(lambda x: step(x).sum())(x),  # jacfwd of jacrev
}


@every_operator
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
def test_transforms(example: Example, transform: Callable[[Function, Tensor], Any]) -> None:
    call = example.call()
    assert_alike(lambda f: transform(call.of_first(f), call.first))


def dual(gradient: Function, v: Tensor) -> Any:
    with forward_ad.dual_level():
        found = gradient(forward_ad.make_dual(v, v * v))
        return [forward_ad.unpack_dual(x).tangent for x in found]


class Subclass(Tensor):
    """A tensor of another class, whose functions return it, too."""


# Ways to compute gradients of a graph that was made before, from a grad_output v.
ABOVE: dict[str, Callable[[Function, Tensor], Any]] = {
    "dual": dual,
    "jvp": lambda gradient, v: torch.func.jvp(gradient, (v,), (v * v,))[1],
    "vjp": lambda gradient, v: torch.func.vjp(gradient, v)[1](gradient(v)),
    "vmap": lambda gradient, v: torch.vmap(gradient)(torch.stack([v, v * v])),
    "is_grads_batched": lambda gradient, v: gradient(
        torch.stack([v, v * v]), is_grads_batched=True
    ),
    "negated": lambda gradient, v: gradient(torch._neg_view(v)),
    "zero": lambda gradient, v: gradient(torch._efficientzerotensor(v.shape, dtype=v.dtype)),
    "subclass": lambda gradient, v: [*map(Tensor.detach, gradient(v.as_subclass(Subclass)))],
}


@every_operator
@pytest.mark.parametrize("transform", ABOVE.values(), ids=ABOVE)
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")
def test_traced_gradients(example: Example, transform: Callable[[Function, Tensor], Any]) -> None:
    call = example.call()

    def compute(function: Function) -> Any:
        value, leaves = function(call), [*call.leaves.values()]
        gradient = partial(torch.autograd.grad, value, leaves, retain_graph=True)
        return transform(gradient, random_grad_output(value.shape).to(value))

    try:
        expected = compute(of_torch)
    except RuntimeError:
        return  # torch's operators have no such derivative
    close(compute(ours), expected)
