"""What only a GPU can show: graphs, streams, devices, memory, and that nothing waits."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused import functional as fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Call = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
# Of logits (600, 700), class indices, and something of the logits' shape.
CALLS: dict[str, Call] = {
    "index": lambda f, x, t, y: f.cross_entropy(x, t),
    "index none": lambda f, x, t, y: f.cross_entropy(x, t, reduction="none"),
    "smoothed": lambda f, x, t, y: f.cross_entropy(x, t, y[0].abs(), label_smoothing=0.1),
    "probabilities": lambda f, x, t, y: f.cross_entropy(x, y.softmax(1)),
    "positions": lambda f, x, t, y: f.cross_entropy(x.view(6, 100, 700), t.repeat(7).view(6, 700)),
    "transposed": lambda f, x, t, y: f.cross_entropy(x.T[None], t.view(1, 600)),
    "split": lambda f, x, t, y: f.cross_entropy(x.view(6, 70_000), t[:6]),
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
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfused.kernels import launch
    from pyfused.ops import dispatch

    monkeypatch.setattr(dispatch, "aten_is_faster", lambda _, input: input.numel() == 0)
    monkeypatch.setattr(launch, "SPLIT", launch.Split(positions=8, classes=16384, programs=512))


def inputs(dtype: torch.dtype = torch.float32, device: str = "cuda") -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    x = torch.randn(600, 700, device=device).to(dtype).requires_grad_()
    target = torch.randint(700, (600,), device=device) % 100
    target[::7] = -100
    return x, target, torch.randn(600, 700, device=device).to(dtype)


def results(functional: Any, call: Call, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    value = call(functional, x, *others)
    upstream = torch.linspace(1, 2, value.numel(), device=x.device, dtype=torch.float64)
    upstream = upstream.to(value.dtype).view(value.shape)
    return value.detach(), torch.autograd.grad(value, x, upstream)[0]


def close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        eps = torch.finfo(dtype).eps
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=16 * eps, atol=16 * eps * scale)


@every_call
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_against_torch_in_float64(call: Call, dtype: torch.dtype) -> None:
    x, target, other = inputs(dtype)
    exact = x.detach().double().requires_grad_(), target, other.double()
    close(results(fused, call, x, target, other), results(F, call, *exact), dtype)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("classes", [16_384, 32_000, 50_304, 128_256, 262_144])
@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=lambda dtype: str(dtype)[6:])
def test_rows_that_programs_share(dtype: torch.dtype, classes: int, inplace: bool) -> None:
    """Targets in each program's share, and a gradient stored after all of them have theirs."""
    x = (3 * torch.randn(300, classes, device="cuda")).to(dtype)
    target = torch.linspace(0, classes - 1, 300, device="cuda").long()
    target[::7] = -100

    def loss(functional: Any, x: Tensor, **options: bool) -> Tensor:
        return functional.cross_entropy(x * 1, target, **options)

    expected = results(F, loss, x.double().requires_grad_())
    for _ in range(5):
        fresh = x.clone().requires_grad_()
        got = results(fused, partial(loss, inplace=inplace), fresh)
        close(got, expected, dtype)


def test_every_kernel_runs() -> None:
    """Short, for a sanitizer."""
    for call in CALLS.values():
        results(fused, call, *inputs())
    torch.cuda.synchronize()


@every_call
def test_nothing_waits_for_the_gpu(call: Call) -> None:
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
    exact = x.detach().double().requires_grad_(), target, other.double()
    close(got, results(F, call, *exact), torch.float32)


@every_call
def test_two_streams(call: Call) -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]
    arguments = [inputs() for _ in streams]
    expected = results(fused, call, *inputs())
    torch.cuda.synchronize()
    got = []
    for _ in range(5):
        for stream, each in zip(streams, arguments, strict=True):
            with torch.cuda.stream(stream):
                got.append(results(fused, call, *each))
    torch.cuda.synchronize()
    for ours in got:
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])


@every_call
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(call: Call) -> None:
    assert torch.cuda.current_device() == 0
    got = results(fused, call, *inputs(device="cuda:1"))
    assert got[1].device == torch.device("cuda:1")
    expected = results(fused, call, *inputs())
    torch.testing.assert_close(tuple(g.cpu() for g in got), tuple(e.cpu() for e in expected))
    assert torch.cuda.current_device() == 0


def test_a_tensor_elsewhere_is_torchs_error() -> None:
    x, target, other = inputs()
    for wrong in (
        lambda f: f.cross_entropy(x, target.cpu()),
        lambda f: f.mse_loss(x, other.cpu()),
    ):
        with pytest.raises(RuntimeError):
            wrong(F)
        with pytest.raises(RuntimeError):
            wrong(fused)


def test_an_out_of_range_target_leaves_the_context_alive() -> None:
    x, target, _ = inputs()
    target[5] = 700
    value, gradient = results(fused, CALLS["index"], x, target, x)
    assert bool(value.isnan())
    assert not bool(gradient[5].any())
    assert bool(gradient.isfinite().all())


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


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_autocast_gives_torchs_dtypes(autocast: torch.dtype, dtype: torch.dtype) -> None:
    x, target, other = inputs(dtype)
    for call in (CALLS["index"], CALLS["probabilities"], CALLS["mse"], CALLS["mse weighted"]):
        with torch.autocast("cuda", dtype=autocast):
            assert call(fused, x, target, other).dtype == call(F, x, target, other).dtype


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


def _work(seed: int) -> float:
    torch.manual_seed(seed)
    x = torch.randn(600, 700, device="cuda", requires_grad=True)
    target = torch.randint(700, (600,), device="cuda")
    loss = fused.cross_entropy(x, target)
    loss.backward()
    return abs(loss.item() - F.cross_entropy(x, target).item())


def test_several_processes() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert max(pool.map(_work, range(2))) < 1e-5
