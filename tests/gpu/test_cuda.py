"""Tests that need a GPU: CUDA graphs, devices, memory, and that no call synchronises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyfused
from pyfused import functional as fused
from pyfused.dispatch import sizes

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # raised by torch's compiler
]

Call = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
# Calls with logits (600, 700), class indices, and a tensor of the logits' shape.
CALLS: dict[str, Call] = {
    "index": lambda f, x, t, y: f.cross_entropy(x, t),
    "index none": lambda f, x, t, y: f.cross_entropy(x, t, reduction="none"),
    "smoothed": lambda f, x, t, y: f.cross_entropy(x, t, y[0].abs(), label_smoothing=0.1),
    "probabilities": lambda f, x, t, y: f.cross_entropy(x, y.softmax(1)),
    "positions": lambda f, x, t, y: f.cross_entropy(x.view(6, 100, 700), t.repeat(7).view(6, 700)),
    "transposed": lambda f, x, t, y: f.cross_entropy(x.T[None], t.view(1, 600)),
    "long rows": lambda f, x, t, y: f.cross_entropy(x.view(6, 70_000), 690 * t[:6].clamp(0)),
    "softmax": lambda f, x, t, y: f.softmax(x, 1),
    "mse": lambda f, x, t, y: f.mse_loss(x, y),
    "mse weighted": lambda f, x, t, y: f.mse_loss(x, y, weight=y.abs()),
    "mse none": lambda f, x, t, y: f.mse_loss(x, y, reduction="none"),
    "mse broadcast": lambda f, x, t, y: f.mse_loss(x, y[:1].expand_as(x)),
    "relu": lambda f, x, t, y: f.relu(x),
    "relu inplace": lambda f, x, t, y: f.relu(x * 1, inplace=True),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def every_size() -> Iterator[None]:
    with sizes.every_size():
        yield


def inputs(dtype: torch.dtype = torch.float32, device: str = "cuda") -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    x = torch.randn(600, 700, device=device).to(dtype).requires_grad_()
    target = torch.randint(700, (600,), device=device) % 100
    target[::7] = -100
    return x, target, torch.randn(600, 700, device=device).to(dtype)


def results(functional: Any, call: Call, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    value = call(functional, x, *others)
    numbers = torch.arange(value.numel(), device=x.device) % 8 + 1  # exact in every dtype
    grad_output = (numbers / 8).to(value.dtype).view(value.shape)
    return value.detach(), torch.autograd.grad(value, x, grad_output)[0]


def exact_results(call: Call, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Returns torch's results in float64, computed on the CPU."""
    x, target, other = (tensor.detach().cpu() for tensor in tensors)
    value, gradient = results(F, call, x.double().requires_grad_(), target, other.double())
    return value.to(tensors[0].device), gradient.to(tensors[0].device)


def close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        eps = torch.finfo(dtype).eps
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=16 * eps, atol=16 * eps * scale)


def test_every_kernel_runs() -> None:
    """Runs quickly, for compute-sanitizer."""
    for call in CALLS.values():
        results(fused, call, *inputs())
    torch.cuda.synchronize()


@every_call
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_no_call_synchronises(call: Call) -> None:
    arguments = inputs()
    results(fused, call, *arguments)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(fused, call, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_call
def test_a_captured_graph_follows_its_inputs(call: Call) -> None:
    x, target, other = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            results(fused, call, x, target, other)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(fused, call, x, target, other)
    with torch.no_grad():
        x.copy_(torch.randn_like(x) * 2)
        target.copy_(target.flip(0))
    graph.replay()
    close(got, exact_results(call, x, target, other), torch.float32)


def test_sums_on_concurrent_streams_and_graphs() -> None:
    """Each call has its own arrival counter."""
    x, _, y = inputs()
    expected = fused.mse_loss(x, y)
    assert torch.equal(expected, fused.mse_loss(x, y))  # sums have a fixed order
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(4)]
    with torch.cuda.graph(graph):
        captured = fused.mse_loss(x, y)
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(fused.mse_loss(x, y))
        with torch.cuda.stream(streams[0]):
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected) for each in (*found, captured))


@pyfused.loss
def scaled(input: Tensor, target: Tensor, *, scale: float = 0.5, power: float = 1.5) -> Tensor:
    return scale * (input - target).abs() ** power


def test_a_formula_takes_new_parameters_in_a_captured_graph_and_on_another_stream() -> None:
    x, _, y = inputs()
    named = {"scale": 0.1, "power": 2.7}
    scaled(x, y)  # compiles
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = scaled(x, y, **named)
    with torch.cuda.stream(side):
        beside = scaled(x, y, **named)  # before the first replay
    side.synchronize()
    graph.replay()
    expected = scaled.function(x.double(), y.double(), **named).mean()
    for got in (captured, beside):
        torch.testing.assert_close(got.double(), expected)


@every_call
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(call: Call) -> None:
    assert torch.cuda.current_device() == 0
    got = results(fused, call, *inputs(device="cuda:1"))
    assert got[1].device == torch.device("cuda:1")
    expected = results(fused, call, *inputs())
    torch.testing.assert_close(tuple(g.cpu() for g in got), tuple(e.cpu() for e in expected))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_peak_memory_is_one_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(2048, 32_000, device="cuda").to(dtype).requires_grad_()
    target = torch.randint(32_000, (2048,), device="cuda")
    fused.cross_entropy(x, target).backward()
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused.cross_entropy(x, target).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.01 * x.numel() * x.element_size()


def test_a_compiled_head_makes_blocks_of_logits() -> None:
    x = torch.randn(8192, 64, device="cuda").requires_grad_()  # four blocks
    weight = torch.randn(64_000, 64, device="cuda").requires_grad_()
    target = torch.randint(64_000, (8192,), device="cuda")
    compiled = torch.compile(
        lambda: fused.linear_cross_entropy(x * 1, weight, target), fullgraph=True
    )
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(compiled(), (x, weight)), expected)
    del expected
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(compiled(), (x, weight))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 0.5 * 4 * len(x) * len(weight)


COMPILED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear_cross_entropy": fused.linear_cross_entropy,
    "linear_log_probs": lambda *head: fused.linear_log_probs(*head)[0].mean(),
    "after a product": lambda x, w, t: fused.linear_cross_entropy(x @ x.T @ x, w, t),
}


@pytest.mark.parametrize("head", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # Inductor's advice
def test_a_compiled_head_equals_the_eager_head(
    head: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in sizes.LINEAR:
        monkeypatch.setitem(sizes.COMPILED, op, (0, 0))
    x = (torch.randn(64, 32, device="cuda", dtype=dtype) / 8).requires_grad_()
    weight = torch.randn(1000, 32, device="cuda", dtype=dtype)
    target = torch.randint(1000, (64,), device="cuda")
    compiled = torch.compile(lambda x: head(x, weight, target), fullgraph=True)
    got, expected = compiled(x), head(x, weight, target)
    assert got.dtype == expected.dtype
    pairs = [(got, expected)]
    pairs += [(torch.autograd.grad(3 * got, x)[0], torch.autograd.grad(3 * expected, x)[0])]
    for ours, eager in pairs:
        difference = (ours.double() - eager.double()).norm() / eager.double().norm()
        assert difference <= 8 * torch.finfo(dtype).eps


def test_offsets_beyond_32_bits() -> None:
    rows = 2**31 // 32_768 + 5
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    x = torch.zeros(rows, 32_768, device="cuda", dtype=torch.bfloat16).requires_grad_()
    target = torch.arange(rows, device="cuda") % 32_768
    with torch.no_grad():
        x[-1, target[-1]] = 20.0
    loss = fused.cross_entropy(x, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    tail = x.detach()[-3:].double().requires_grad_()
    expected = F.cross_entropy(tail, target[-3:], reduction="none")
    (tail_gradient,) = torch.autograd.grad(expected.sum(), tail)
    torch.testing.assert_close(loss[-3:].double(), expected, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(gradient[-3:].double(), tail_gradient, rtol=1e-2, atol=1e-6)
