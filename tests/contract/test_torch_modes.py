"""The contract of every operator with torch's kinds of tensors, modes, transforms and tracers.

Calls that kernels do not support give torch's results or errors. If torch has to see a call, a
kernel, which works on raw memory, would bake a constant into a graph or read invalid memory.
The tests run the calls that `catalogue.py` lists for every declared operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue import Call, Example, every_operator
from compare import Recording as Operators
from compare import outcome
from conftest import KernelCalls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import pyfused
from pyfused.ops.elementwise import L1_LOSS

close = torch.testing.assert_close
Step = Callable[[Tensor], Tensor]


def steps(example: Example) -> tuple[Step, Step, Tensor]:
    """Returns pyfused's and torch's call as functions of the first argument, and that argument."""
    call = example.call()
    for operand in call.op.operands:
        if operand.number:  # torch reads tensors' values, but not floats'
            call.given[operand.name] = 0.7
    if call.op is L1_LOSS:  # torch drops the weight under modes and tracers
        call.given.pop("weight", None)
    return call.of_first(Call.ours), call.of_first(Call.reference), call.first


# ---- other kinds of tensors ----------------------------------------------------------------------


class Marked(Tensor):
    """A subclass that propagates through torch's operators, the default."""


@every_operator
@pytest.mark.parametrize("kind", [Marked, torch.nn.Parameter])
def test_parameters_and_subclasses(
    example: Example, kind: type[Tensor], kernel_calls: KernelCalls
) -> None:
    ours, of_torch, x = steps(example)
    x = x.detach().as_subclass(kind).requires_grad_()
    got, expected = ours(x), of_torch(x)
    assert type(got) is type(expected)
    assert (type(got) is Marked) == (kind is Marked) == (not kernel_calls.total())
    close(got.as_subclass(Tensor), expected.as_subclass(Tensor))
    close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(expected.sum(), x))


class Recording(Tensor):
    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@every_operator
def test_torch_function_of_each_argument_is_called(example: Example) -> None:
    call = example.call()
    for name, x in call.tensors.items():
        Recording.seen.clear()
        call.ours(**{name: x.detach().as_subclass(Recording)})
        assert Recording.seen, name


@every_operator
def test_meta_and_fake_tensors(example: Example, kernel_calls: KernelCalls) -> None:
    ours, of_torch, x = steps(example)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for context, y in (contextlib.nullcontext(), x.to("meta")), (mode, mode.from_tensor(x)):
        with context:
            got, expected = ours(y), of_torch(y)
        assert type(got) is type(expected)
        assert (got.device, got.dtype) == (expected.device, expected.dtype)
        assert (got.shape, got.stride()) == (expected.shape, expected.stride())
    assert not kernel_calls.total()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda x: x.where(x > 0, 0).to_sparse(),
    "conjugated": lambda x: x.to(torch.complex64).conj(),
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([*x]),
}


@every_operator
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_other_kinds_of_tensors(example: Example, kind: Callable[[Tensor], Tensor]) -> None:
    ours, of_torch, x = steps(example)
    x = kind(x)
    got, expected = outcome(lambda: ours(x)), outcome(lambda: of_torch(x))
    if isinstance(expected, Exception):
        of_torch = type(expected) if hasattr(F, example.op.name) else Exception
        assert isinstance(got, of_torch), repr(got)
        return
    assert isinstance(got, Tensor)
    assert (got.dtype, got.layout, got.device) == (expected.dtype, expected.layout, expected.device)
    if got.is_nested:
        close(list(got.unbind()), list(expected.unbind()))
    elif not got.is_quantized:
        close(got, expected, equal_nan=True)


def negated(x: Tensor) -> Tensor:
    """Returns a tensor with the negative bit: the imaginary part of a conjugate."""
    found = torch.complex(x.detach(), -x.detach()).conj().imag
    assert found.is_neg()
    return found


@every_operator
def test_lazy_tensors(example: Example) -> None:
    """Covers lazily negated tensors, and zero tensors without memory, as inputs and gradients."""
    ours, of_torch, x = steps(example)
    for lazy in (negated(x), torch._efficientzerotensor(x.shape)):
        close(ours(lazy), of_torch(lazy.resolve_neg()))
    value, expected = ours(x.requires_grad_()), of_torch(x)
    for above in (negated(torch.randn(value.shape)), torch._efficientzerotensor(value.shape)):
        found = torch.autograd.grad(value, x, above, retain_graph=True)
        close(found, torch.autograd.grad(expected, x, above, retain_graph=True))


@every_operator
def test_a_lazy_clone_is_not_materialised(example: Example) -> None:
    ours, of_torch, x = steps(example)
    clone = torch._lazy_clone(x.requires_grad_())
    value = ours(clone)
    above = torch._lazy_clone(torch.randn(value.shape))
    close(value, of_torch(x))
    close(torch.autograd.grad(value, x, above), torch.autograd.grad(of_torch(x), x, above))
    assert torch._C._is_cow_tensor(clone) or example.op.operands[0].low == 0
    assert torch._C._is_cow_tensor(above)


@every_operator
def test_a_tensor_that_escaped_a_transform(example: Example) -> None:
    """A tensor wrapped by torch.func.grad outlives the transform."""
    ours, of_torch, x = steps(example)
    kept: list[Tensor] = []
    torch.func.grad(lambda y: kept.append(y * 1) or y.sum())(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(ours(kept[0]), of_torch(x))


# ---- modes and tracers --------------------------------------------------------------------------


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@every_operator
@pytest.mark.parametrize("mode", [SeesFunctions, Operators])
def test_a_mode_sees_the_call(
    example: Example, mode: type[SeesFunctions | Operators], kernel_calls: KernelCalls
) -> None:
    ours, of_torch, x = steps(example)
    x.requires_grad_()
    seen = []
    for step in (ours, of_torch):
        kernel_calls.clear()
        with mode() as each:
            torch.autograd.grad(step(x).sum(), x)
        seen.append(each.seen)
    if mode is Operators and hasattr(F, example.op.name):
        assert seen[0] == seen[1]
    assert example.op.name in seen[0] or len(seen[0]) > 2
    assert not kernel_calls.total()


DEVICES = torch.device("cpu"), torch.device("meta"), FlopCounterMode(display=False)


@every_operator
@pytest.mark.parametrize("mode", DEVICES, ids=["cpu", "meta", "flops"])
def test_results_under_a_default_device_and_a_counter(example: Example, mode: Any) -> None:
    ours, of_torch, x = steps(example)
    expected = of_torch(x.requires_grad_())
    with mode:
        got = ours(x)
        found = got, *torch.autograd.grad(got.sum(), x)
    close(found, (expected, *torch.autograd.grad(expected.sum(), x)))


class Mine(pyfused.nn.ReLU):
    pass


@pytest.mark.parametrize("converted", [False, True])
def test_symbolic_trace_of_modules(converted: bool) -> None:
    """Modules are nodes of the graph, like torch's, so their hooks and kernels still run."""
    seen: list[Tensor] = []
    nn = torch.nn if converted else pyfused.nn
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), Mine(), nn.GELU(), nn.LogSoftmax(-1))
    if converted:
        pyfused.convert(model)
    model[2].register_forward_hook(lambda *args: seen.append(args[-1]))
    traced, x = torch.fx.symbolic_trace(model), torch.randn(6, 5)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["0", "2", "3"]  # a subclass is traced, like one of torch.nn's
    assert not seen
    close(traced(x), model(x))
    assert len(seen) == 2
