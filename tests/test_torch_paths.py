"""What the kernels do not take gets torch's own result, or torch's own error.

Where a call has to be seen by torch (tracing, fake tensors, modes, subclasses), a kernel that works
on raw memory would silently leave a constant in a graph or read what is not there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import grid
import pytest
import torch
from calls import BESIDE, within
from calls import TORCH as F
from compare import evaluate
from conftest import KernelCalls
from samples import ACTIVATIONS, FIRST, Loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pyfused
from pyfused import functional as fused

TARGET = torch.tensor([0, 1, 2, 3, 4, 0])
OTHER = torch.linspace(-2, 2, 30).view(6, 5)

Call = Callable[[Any, Tensor], Tensor]


def beside(loss: Loss, functional: Any, x: Tensor, **options: Any) -> Tensor:
    """Floats for tensors where they will do: torch looks at the values of these."""
    others = {name: tensor.to(x.device) for name, tensor in BESIDE[loss.id].tensors.items()}
    numbers = {operand.name: 0.7 for operand in loss.operands if operand.number}
    given: dict[str, Any] = others | numbers
    given.pop("weight", None)
    first = within(loss.bounded[0], x)
    return getattr(functional, loss.op.name)(first, **given, **loss.parameters, **options)


CALLS: dict[str, Call] = {
    "cross_entropy": lambda f, x: f.cross_entropy(x, TARGET.to(x.device)),
    "probabilities": lambda f, x: f.cross_entropy(x, OTHER.to(x.device).softmax(1)),
    **{op.name: lambda f, x, name=op.name: getattr(f, name)(x) for op in ACTIVATIONS},
    **{loss.kernel: lambda f, x, loss=loss: beside(loss, f, x) for loss in FIRST},
}
ONE_OF_EACH_FAMILY = ("cross_entropy", "probabilities", "relu", "gelu", "mse_loss")
SOME = [*CALLS] if grid.FULL else [*ONE_OF_EACH_FAMILY, "gaussian_nll_loss"]
every_call = pytest.mark.parametrize("call", [CALLS[name] for name in SOME], ids=SOME)
close = torch.testing.assert_close


# ---- tensors of other kinds ---------------------------------------------------------------------


@every_call
def test_a_parameter_takes_the_kernels(call: Call, kernel_calls: KernelCalls) -> None:
    x = torch.nn.Parameter(torch.randn(6, 5))
    close(call(fused, x), call(F, x))
    assert kernel_calls.total() == 1


class Marked(Tensor):
    """Propagates through torch's operators, as subclasses do by default."""


@every_call
def test_a_subclass_stays_a_subclass(call: Call, kernel_calls: KernelCalls) -> None:
    x = torch.randn(6, 5).as_subclass(Marked).requires_grad_()
    got, expected = call(fused, x), call(F, x)
    assert type(got) is type(expected) is Marked
    close(got.as_subclass(Tensor), expected.as_subclass(Tensor))
    close(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    assert not kernel_calls.total()


@pytest.mark.parametrize(
    "name", ["cross_entropy", "linear_cross_entropy", "log_probs", "linear_log_probs"]
)
def test_a_subclass_of_another_name_than_its_own(name: str) -> None:
    """One that is called as torch's DTensor is, whose classes may be sharded."""
    lookalike = type("DTensor", (Marked,), {})
    plain = [torch.randn(6, 5), torch.randn(7, 5)][: 1 + name.startswith("linear")]
    tensors = [tensor.as_subclass(lookalike) for tensor in plain]
    got, expected = getattr(fused, name)(*tensors, TARGET), getattr(fused, name)(*plain, TARGET)
    if not isinstance(got, Tensor):
        got, expected = got.log_probability, expected.log_probability
    assert type(got) is lookalike
    close(got.as_subclass(Tensor), expected)


class Recording(Tensor):
    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@every_call
def test_torch_function_of_the_input_is_asked(call: Call) -> None:
    Recording.seen.clear()
    call(fused, torch.randn(6, 5).as_subclass(Recording))
    assert Recording.seen


@pytest.mark.parametrize("position", [1, 2])
def test_torch_function_of_other_arguments_is_asked(position: int) -> None:
    arguments = [torch.randn(6, 5), TARGET, torch.ones(5)]
    arguments[position] = arguments[position].as_subclass(Recording)
    Recording.seen.clear()
    fused.cross_entropy(*arguments)
    assert Recording.seen


@every_call
def test_meta_tensors(call: Call, kernel_calls: KernelCalls) -> None:
    x = torch.randn(6, 5, device="meta", requires_grad=True)
    got, expected = call(fused, x), call(F, x)
    assert got.device.type == "meta"
    assert (got.shape, got.dtype, got.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    got.sum().backward()
    assert x.grad is not None
    assert not kernel_calls.total()


@every_call
def test_fake_tensors(call: Call, kernel_calls: KernelCalls) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(6, 5))
        got, expected = call(fused, x), call(F, x)
    assert type(got) is type(expected)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert not kernel_calls.total()


def outcome(function: Callable[[], Tensor]) -> Tensor | type[Exception]:
    try:
        return function()
    except Exception as error:
        return type(error)


KINDS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(6, 5).to_sparse(),
    "sparse_csr": lambda: torch.eye(6, 5).to_sparse_csr(),
    "complex": lambda: torch.randn(6, 5, dtype=torch.complex64),
    "conjugated": lambda: torch.randn(6, 5, dtype=torch.complex64).conj(),
    "int64": lambda: torch.arange(-15, 15).view(6, 5),
    "uint8": lambda: torch.arange(30, dtype=torch.uint8).view(6, 5),
    "bool": lambda: torch.eye(6, 5).bool(),
    "float8": lambda: torch.randn(6, 5).to(torch.float8_e4m3fn),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(6, 5), 0.1, 0, torch.qint8),
    "meta": lambda: torch.randn(6, 5, device="meta"),
    "nested": lambda: torch.nested.nested_tensor(list(torch.randn(6, 5))),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_other_kinds_of_tensors(call: Call, kind: Callable[[], Tensor]) -> None:
    x = kind()
    ours, theirs = outcome(lambda: call(fused, x)), outcome(lambda: call(F, x))
    if isinstance(theirs, type):
        assert isinstance(ours, type)
        assert issubclass(ours, theirs)
        return
    assert isinstance(ours, Tensor)
    assert (ours.dtype, ours.layout, ours.device) == (theirs.dtype, theirs.layout, theirs.device)
    if ours.is_nested:
        close(list(ours.unbind()), list(theirs.unbind()))
    elif ours.device.type != "meta" and not ours.is_quantized:
        close(ours, theirs, equal_nan=True)


def test_a_lazily_negated_input() -> None:
    """The imaginary part of a conjugate is negated only when it is read."""
    z = torch.randn(6, 5, dtype=torch.complex64)
    negated = z.conj().imag
    assert negated.is_neg()
    for call in CALLS.values():
        close(call(fused, negated), call(F, negated.resolve_neg()))
    probabilities = negated.exp().softmax(1)
    close(fused.cross_entropy(OTHER, probabilities), F.cross_entropy(OTHER, probabilities))


def test_upstream_gradient_of_another_kind() -> None:
    """Autograd may hand backward a lazily negated gradient, or one of zeros without memory."""
    x = torch.randn(6, 5, requires_grad=True)
    grad_output = torch.randn(6, 5, dtype=torch.complex64).conj().imag
    zeros = torch._efficientzerotensor((6, 5))
    calls = [lambda f, op=op: getattr(f, op.name)(x) for op in ACTIVATIONS]
    calls += [lambda f, loss=loss: beside(loss, f, x, reduction="none") for loss in FIRST]
    for call in calls:
        for above in (grad_output, zeros):
            ours, theirs = (torch.autograd.grad(call(f), x, above) for f in (fused, F))
            close(ours, theirs)


@every_call
def test_a_lazy_clone_stays_one(call: Call) -> None:
    x = torch.randn(6, 5, requires_grad=True)
    clone = torch._lazy_clone(x)
    value = call(fused, clone)
    above = torch._lazy_clone(torch.randn(value.shape))
    close(value, call(F, x))
    close(torch.autograd.grad(value, x, above), torch.autograd.grad(call(F, x), x, above))
    assert torch._C._is_cow_tensor(clone)
    assert torch._C._is_cow_tensor(above)


@every_call
def test_a_tensor_that_left_a_transform(call: Call) -> None:
    """What torch.func.grad wrapped, and is kept, is dead but for its value."""
    kept = []
    x = torch.randn(6, 5)
    torch.func.grad(lambda y: kept.append(y * 1) or y.sum())(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(call(fused, kept[0]), call(F, x))


def test_a_zero_tensor_without_memory() -> None:
    zeros = torch._efficientzerotensor((6, 5))
    for call in CALLS.values():
        close(call(fused, zeros), call(F, zeros))


# ---- modes and tracers --------------------------------------------------------------------------


@every_call
def test_a_function_mode_sees_the_call(call: Call) -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.randn(6, 5)
    with Mode():
        got = call(fused, x)
    close(got, call(F, x))
    assert seen


@every_call
def test_a_dispatch_mode_sees_the_operators(call: Call) -> None:
    def operators(functional: Any) -> list[str]:
        seen = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        x = torch.randn(6, 5, requires_grad=True)
        with Mode():
            call(functional, x).sum().backward()
        return seen

    assert operators(fused) == operators(F)


@every_call
def test_a_default_device_does_not_disturb(call: Call) -> None:
    x = torch.randn(6, 5)
    with torch.device("cpu"):
        close(call(fused, x), call(F, x))
    with FlopCounterMode(display=False):
        close(call(fused, x), call(F, x))


@every_call
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_leaves_no_constants(call: Call, mode: str) -> None:
    graph = make_fx(lambda x: call(fused, x), tracing_mode=mode, _allow_non_fake_inputs=True)(
        torch.zeros(6, 5)
    )
    x = torch.randn(6, 5)
    close(graph(x), call(F, x))


@every_call
def test_jit_trace_leaves_no_constants(call: Call) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: call(fused, x), (torch.zeros(6, 5),))
    x = torch.randn(6, 5)
    close(traced(x), call(F, x))


def test_symbolic_trace_keeps_a_call() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fused.mse_loss(fused.relu(x), OTHER)

    graph = torch.fx.symbolic_trace(Model())
    x = torch.randn(6, 5)
    close(graph(x), F.mse_loss(F.relu(x), OTHER))


def test_symbolic_trace_of_modules() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), pyfused.nn.ReLU())
    x = torch.randn(6, 5)
    close(torch.fx.symbolic_trace(model)(x), model(x))


@every_call
def test_export(call: Call) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(fused, x)

    exported = torch.export.export(Model(), (torch.zeros(6, 5),))
    x = torch.randn(6, 5)
    close(exported.module()(x), call(F, x))


@every_call
def test_functionalization(call: Call) -> None:
    x = torch.randn(6, 5)
    close(torch.func.functionalize(lambda x: call(fused, x))(x), call(F, x))


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@every_call
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_in_one_graph(call: Call, backend: str) -> None:
    def step(x: Tensor) -> Tensor:
        return call(fused, x * 2).sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    x = torch.randn(6, 5, requires_grad=True)
    got, expected = evaluate(compiled, x), evaluate(lambda x: call(F, x * 2).sum(), x)
    close(got.value, expected.value)
    close(got.gradients, expected.gradients)


@pytest.mark.large
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_with_inductor() -> None:
    def step(functional: Any, x: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(functional.relu(x), target)

    compiled = torch.compile(lambda x, target: step(fused, x, target), fullgraph=True)
    x, target = torch.randn(64, 100, requires_grad=True), torch.randint(100, (64,))
    got, expected = evaluate(compiled, x, target), evaluate(lambda x, t: step(F, x, t), x, target)
    close(got.value, expected.value)
    close(got.gradients, expected.gradients)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_of_modules() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), pyfused.nn.ReLU())
    criterion = pyfused.nn.CrossEntropyLoss(label_smoothing=0.1)
    compiled = torch.compile(
        lambda x: criterion(model(x), TARGET), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(6, 5)
    close(compiled(x), F.cross_entropy(F.relu(model[0](x)), TARGET, label_smoothing=0.1))
