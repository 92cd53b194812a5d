"""How the operators live within autograd: graphs kept, shared, hooked, interrupted, resumed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import interpreter
import pytest
import torch
import torch.distributed as dist
from calls import (
    CONSTANTS,
    Beside,
    Case,
    WithTensorOption,
    every_case,
    every_loss_call,
    every_tensor_option,
)
from calls import TORCH as F
from compare import Operator
from conftest import KernelCalls
from samples import ACTIVATIONS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyfused import functional as fused
from pyfused.ops.activation import Activation
from pyfused.ops.dispatch import call


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 5, requires_grad=True)


def gradient(operator: Operator, x: Tensor, grad_output: Tensor | None = None) -> Tensor:
    value = operator(x)
    grad_output = torch.ones_like(value) if grad_output is None else grad_output.expand(value.shape)
    return torch.autograd.grad(value, x, grad_output)[0]


close = torch.testing.assert_close


# ---- grad_output --------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("grad_output", [0.0, 1.0, -2.5, float("nan"), float("inf")], ids=str)
def test_a_scalar_for_all(case: Case, grad_output: float, x: Tensor) -> None:
    """expand() makes it a tensor without strides where the loss is not reduced."""
    got = gradient(case.ours, x, torch.tensor(grad_output))
    expected = gradient(case.reference, x, torch.tensor(grad_output))
    if not torch.isfinite(torch.tensor(grad_output)):
        # 0 * inf: what is not finite in one may be NaN or inf in the other, but nothing else.
        assert torch.equal(got.isfinite() & (got != 0), expected.isfinite() & (expected != 0))
        return
    close(got, expected)


# ---- the same graph, more than once -------------------------------------------------------------


@every_case
@pytest.mark.parametrize("grad_output", [1.0, 3.0])
def test_backward_twice_through_a_kept_graph(case: Case, grad_output: float, x: Tensor) -> None:
    value = case.ours(x)
    given = torch.full_like(value, grad_output)
    gradients = []
    for _ in range(3):
        (got,) = torch.autograd.grad(value, x, given, retain_graph=True)
        gradients.append(got.clone())
        got.fill_(float("nan"))  # whoever holds a gradient may write into it
    expected = gradient(case.reference, x, given)
    for got in gradients:
        close(got, expected)


@every_case
def test_backward_twice_without_keeping_the_graph_is_torchs_error(case: Case, x: Tensor) -> None:
    value = case.ours(x).sum()
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


@every_case
def test_the_upstream_gradient_is_left_as_it_was(case: Case, x: Tensor) -> None:
    value = case.ours(x)
    grad_output = torch.randn_like(value)
    before = grad_output.clone()
    torch.autograd.grad(value, x, grad_output)
    assert torch.equal(grad_output, before)


@every_case
def test_accumulation_into_grad(case: Case, x: Tensor) -> None:
    for _ in range(3):
        case.ours(x).sum().backward()
    assert x.grad is not None
    close(x.grad, 3 * gradient(case.reference, x))


@every_loss_call
@pytest.mark.parametrize("backwards", [False, True], ids=["", "backwards"])
def test_one_backward_for_each_of_several_inputs(
    beside: Beside, backwards: bool, reduction: str, x: Tensor
) -> None:
    """Asked for one input's gradient and then, through the kept graph, for the others'."""
    names = [beside.first.name, *beside.differentiated][:: -1 if backwards else 1]
    wanted = {}
    for functional in (fused, F):
        given = {beside.first.name: beside.inside(x), **beside.clones()}
        for name in beside.differentiated:
            given[name].requires_grad_()
        options = beside.parameters | {"reduction": reduction}
        value = getattr(functional, beside.op)(**given, **options).sum()
        wanted[functional] = [
            torch.autograd.grad(value, given[name], retain_graph=True)[0] for name in names
        ]
    close(wanted[fused], wanted[F])


# ---- no graph -----------------------------------------------------------------------------------


@every_case
def test_no_gradient_wanted(case: Case, x: Tensor, kernel_calls: KernelCalls) -> None:
    value = case.ours(x.detach())
    assert not value.requires_grad
    assert kernel_calls.total() <= 1  # torch may take the in-place one
    with torch.no_grad():
        assert not case.ours(x).requires_grad
    close(value, case.reference(x.detach()))


@every_case
def test_inference_mode(case: Case, x: Tensor) -> None:
    expected = case.reference(x).detach()
    with torch.inference_mode():
        value = case.ours(x)
        assert value.is_inference()
        close(value.clone(), expected)
        assert not case.ours(torch.ones(6, 5)).requires_grad


@every_loss_call
def test_an_inference_tensor_beside_the_input(beside: Beside, reduction: str, x: Tensor) -> None:
    """torch may refuse to save one for backward; ours may, with torch's error, or gets it right."""
    with torch.inference_mode():
        given = beside.clones()
    options = beside.parameters | {"reduction": reduction}
    try:
        value = getattr(fused, beside.op)(beside.inside(x), **given, **options).sum()
    except RuntimeError as error:
        assert "Inference tensors cannot be saved for backward" in str(error)  # noqa: PT017
    else:
        normal = beside.clones()
        expected = gradient(
            lambda x: getattr(F, beside.op)(beside.inside(x), **normal, **options), x
        )
        close(torch.autograd.grad(value, x)[0], expected)


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """What is there already is not looked at by each collection, of a tenth of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_garbage")
@every_case
def test_nothing_is_kept_alive_once_the_graph_is_gone(case: Case) -> None:
    source = torch.randn(6, 5, requires_grad=True)
    hidden = source * 2
    memory = weakref.ref(hidden.untyped_storage())
    value = case.ours(hidden).sum()
    value.backward()
    del hidden, value
    gc.collect()
    assert memory() is None


# ---- inputs are only read, and a change to them never gives a wrong number ----------------------


@every_case
def test_inputs_are_not_changed(case: Case, x: Tensor) -> None:
    given = (*CONSTANTS, x.detach())
    before = [tensor.clone() for tensor in given]
    versions = [tensor._version for tensor in given]
    case.ours(x).sum().backward()
    assert [tensor._version for tensor in given] == versions
    for constant, copy in zip(given, before, strict=True):
        assert torch.equal(constant, copy)


def gradient_or_version_error(value: Tensor, x: Tensor, grad_output: float) -> Tensor | None:
    try:
        return torch.autograd.grad(value, x, torch.tensor(grad_output))[0]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return None


@every_case
@pytest.mark.parametrize("grad_output", [1.0, 0.5])
def test_input_overwritten_before_backward(case: Case, grad_output: float, x: Tensor) -> None:
    hidden = x * 1
    value = case.ours(hidden).sum()
    expected = grad_output * gradient(case.reference, x)
    with torch.no_grad():
        hidden.fill_(7.0)
    got = gradient_or_version_error(value, x, grad_output)
    if got is not None:
        close(got, expected)


@every_loss_call
def test_another_argument_overwritten_before_backward(
    beside: Beside, reduction: str, x: Tensor
) -> None:
    options = beside.parameters | {"reduction": reduction}

    def function(x: Tensor, **tensors: Tensor) -> Tensor:
        return getattr(fused, beside.op)(beside.inside(x), **tensors, **options)

    expected = gradient(lambda x: function(x, **beside.tensors).sum(), x)
    for overwritten in beside.tensors:
        given = beside.clones()
        value = function(x, **given).sum()
        given[overwritten].zero_()
        got = gradient_or_version_error(value, x, 2.0)
        if got is not None:
            close(got, 2 * expected)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A group of which this process is the only one."""
    if not dist.is_available():
        pytest.skip("torch without distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_tensor_option
@pytest.mark.parametrize("reads", ["unreduced", "float16", "second_backward", "create_graph"])
@pytest.mark.usefixtures("one_process")
def test_an_option_overwritten_before_backward_is_torchs_error(
    call: WithTensorOption, reads: str
) -> None:
    """In each of the calls whose backward pass reads it: not a gradient of the new number."""
    if reads == "unreduced" and call.option == "denominator":
        pytest.skip("only a mean has a denominator")
    dtype = torch.float16 if reads == "float16" else torch.float32
    x, value = torch.randn(6, 5, dtype=dtype, requires_grad=True), call.value(dtype)
    loss = call.run(x, value, reduction="none" if reads == "unreduced" else "mean").sum()
    if reads == "second_backward":
        torch.autograd.grad(loss, x, retain_graph=True)
    value.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=reads == "create_graph")


@every_tensor_option
@pytest.mark.usefixtures("one_process")
def test_saved_tensors_hooks_see_an_option(call: WithTensorOption, x: Tensor) -> None:
    """Backward reads what they give back, and nobody else keeps what they have taken away."""
    value = call.value(x.dtype)
    address, memory = value.data_ptr(), weakref.ref(value.untyped_storage())

    def pack(tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        return copy * 2 if tensor.data_ptr() == address else copy

    reduction = "sum" if call.option == "token_weight" else "mean"
    expected = torch.autograd.grad(call.run(x, value, reduction=reduction), x)[0]
    expected = expected * 2 if call.option == "token_weight" else expected / 2
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        loss = call.run(x, value, reduction=reduction)
    del value
    gc.collect()
    assert memory() is None
    torch.autograd.grad(loss, x, retain_graph=True)  # may be what the forward pass has computed
    close(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
    close(torch.autograd.grad(loss, x, create_graph=True)[0], expected)


@pytest.mark.parametrize(
    "op", [op for op in ACTIVATIONS if op.saves == "output"], ids=lambda op: op.name
)
def test_an_output_overwritten_before_backward_is_torchs_error(op: Activation, x: Tensor) -> None:
    y = call(op, (x, *op.defaults))
    with torch.no_grad():
        y.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_case
def test_value_overwritten_after_the_call(case: Case, x: Tensor) -> None:
    value = case.ours(x)
    doubled = value * 2
    if value.dim() < 2:  # the others may be an activation's, which backward reads
        with torch.no_grad():
            value.zero_()
    close(
        torch.autograd.grad(doubled.sum(), x)[0],
        2 * gradient(case.reference, x),
    )


# ---- hooks, checkpoints, anomalies --------------------------------------------------------------


@every_case
def test_hooks_see_and_change_the_gradient(case: Case, x: Tensor) -> None:
    def tripled(operator: Operator) -> Tensor:
        hidden = x * 1
        hidden.register_hook(lambda grad: grad * 3)
        return torch.autograd.grad(operator(hidden).sum(), x)[0]

    close(tripled(case.ours), 3 * gradient(case.reference, x))
    close(tripled(case.ours), tripled(case.reference))


@every_case
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpoint(case: Case, reentrant: bool, x: Tensor) -> None:
    def wrapped(x: Tensor) -> Tensor:
        return checkpoint(lambda x: case.ours(x.tanh()), x, use_reentrant=reentrant)

    value = wrapped(x).sum()
    value.backward()
    assert x.grad is not None
    close(x.grad, gradient(lambda x: case.reference(x.tanh()), x))


@every_case
def test_saved_tensors_hooks(case: Case, x: Tensor) -> None:
    """What is saved may be moved away and brought back, as save_on_cpu does."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index].clone()):
        value = case.ours(x)
    expected = gradient(case.reference, x)
    for _ in range(2):
        (got,) = torch.autograd.grad(value, x, torch.ones_like(value), retain_graph=True)
        close(got, expected)
    with torch.autograd.graph.save_on_cpu():
        close(gradient(case.ours, x), expected)


@every_case
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Error detected in")
def test_anomaly_mode(case: Case, x: Tensor) -> None:
    with torch.autograd.detect_anomaly():
        close(gradient(case.ours, x), gradient(case.reference, x))
        with pytest.raises(RuntimeError, match="returned nan values"):
            gradient(case.ours, x, torch.tensor(float("nan")))


# ---- several threads of Python ------------------------------------------------------------------


@pytest.mark.skipif(interpreter.ON, reason="the interpreter knows one thread")
@every_case
def test_several_python_threads_at_once(case: Case) -> None:
    inputs = [torch.randn(6, 5) for _ in range(8)]
    expected = [gradient(case.reference, x.clone().requires_grad_()) for x in inputs]

    def work(x: Tensor) -> list[Tensor]:
        return [gradient(case.ours, x.clone().requires_grad_()) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(work, inputs), expected, strict=True):
            for one in got:
                close(one, wanted)


@pytest.fixture(autouse=True)
def constants_stay_constant() -> Iterator[None]:
    before = [constant.clone() for constant in CONSTANTS]
    yield
    for constant, copy in zip(CONSTANTS, before, strict=True):
        assert torch.equal(constant, copy)
