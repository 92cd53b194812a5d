"""A prepared launch passes the same arguments to the launcher as Triton does; needs no GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import compile_ahead as ahead
import triton
import triton.language as tl
from triton import knobs

from pyfused.backends.versions import is_tested
from pyfused.kernels import launch
from pyfused.kernels.cross_entropy import row_kernel
from pyfused.kernels.launch import Choice, Launch

numbers = itertools.count(1000, 2)  # of devices; Triton caches compiled kernels by device


@pytest.fixture
def gpu() -> Iterator[Any]:
    """Returns a fake GPU driver that records launches as `launched`."""
    fake: Any = SimpleNamespace(device=next(numbers), launched=[])
    fake.utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda _: {"max_shared_mem": 232_448, "warpSize": 32},
    )
    fake.launcher_cls = lambda _, metadata: (
        lambda *arguments: fake.launched.append((metadata.name, fake.device, arguments))
    )
    fake.get_current_target = lambda: ahead.TARGETS["sm_90"]
    fake.get_current_device = lambda: fake.device
    fake.get_current_stream = lambda device: 100 + (device or 0)
    fake.map_python_to_cpp_type = lambda kind: kind
    with ahead.on_fake_gpu(fake):
        yield fake


def described(arguments: Any) -> Any:
    """Replaces tensors by their types, because each call has new tensors."""
    if isinstance(arguments, tuple):
        return tuple(map(described, arguments))
    return (arguments.dtype, arguments.shape) if isinstance(arguments, Tensor) else arguments


@pytest.mark.parametrize("name", ahead.QUICK)
def test_arguments_equal_those_of_triton(name: str, gpu: Any) -> None:
    case = ahead.cases()[name]
    by_triton = lambda run, programs, *arguments: run.by_triton(programs, arguments)  # noqa: E731
    with patch.object(launch.Launch, "__call__", by_triton):
        case.run()
    of_triton = gpu.launched.copy()
    assert of_triton
    for _ in range(2):  # the second launch uses the compiled kernel
        gpu.launched.clear()
        case.run()
        for (*kernel, found), (*same, expected) in zip(gpu.launched, of_triton, strict=True):
            assert kernel == same
            assert found[:6] == expected[:6]  # the grid, the stream, the function and options
            assert described(found[9:]) == described(expected[9:])  # 6 to 8 are for hooks


@triton.jit
def add_kernel(x, out, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + lanes, tl.load(x + lanes, mask=lanes < n) + 1, mask=lanes < n)


@pytest.fixture
def add(gpu: Any) -> Launch:
    return Launch(add_kernel, Choice(1, 128, 128))


def is_by_triton(add: Launch, *arguments: Any) -> bool:
    """Returns whether a launch with these arguments uses Triton's launcher."""
    with patch.object(Launch, "by_triton", autospec=True, side_effect=Launch.by_triton) as way:
        add(4, *arguments)
    return way.called


def test_specializations_and_devices_are_distinguished(add: Launch, gpu: Any) -> None:
    x = torch.zeros(1024)
    sizes = 1024, 1023, 1, 1 << 40  # 1023 is not divisible by 16
    tensors = (x[1:], x), (x.double(), x), (x, x.half())  # the first is not aligned
    for arguments in (*[(x, x, n) for n in sizes], *[(*each, 1024) for each in tensors]):
        assert is_by_triton(add, *arguments)
        assert not is_by_triton(add, *arguments)
    assert not is_by_triton(add, x, x, 2048)
    assert not is_by_triton(add, x.clone(), x.clone(), 1008)
    gpu.launched.clear()
    gpu.device += 1
    assert is_by_triton(add, x, x, 1024)
    assert not is_by_triton(add, x, x, 1024)
    assert [arguments[3] for *_, arguments in gpu.launched] == [100 + gpu.device] * 2  # streams


def test_kernels_are_chosen_for_the_device_of_the_tensor(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two kinds of GPU, one has less shared memory and fewer multiprocessors."""
    sizes = {gpu.device: (132, 232_448), gpu.device + 1: (58, 101_376)}
    names = "multi_processor_count", "shared_memory_per_block_optin"
    properties = {i: SimpleNamespace(**dict(zip(names, sizes[i], strict=True))) for i in sizes}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.get)
    monkeypatch.setattr(Tensor, "get_device", lambda _: gpu.device)
    for gpu.device in (*sizes, *sizes):
        gpu.launched.clear()
        ahead.cases()["cross_entropy bfloat16 4096x32000"].run()
        programs, stages = sizes[gpu.device][0], 1 + sizes[gpu.device][1] // (32_768 * 2)
        (launched,) = [x for name, _, x in gpu.launched if name == row_kernel.fn.__name__]
        names_of_last = [x.name for x in row_kernel.params][::-1]
        constants = dict(zip(names_of_last, launched[::-1], strict=False))
        assert (launched[0], constants["STAGES"]) == (programs, min(3, stages))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_launch_goes_to_the_device_of_the_tensor(
    hooked: bool, add: Launch, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        with patch.object(gpu, "device", index):
            yield

    x, devices, other = torch.zeros(1024), list[int](), gpu.device + 1
    on_gpu = Mock(wraps=x, get_device=lambda: other)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(add, "compiles", not hooked)
    monkeypatch.setattr(add, "by_triton", lambda *_: devices.append(gpu.device))
    monkeypatch.setattr(launch, "specialize", lambda *_: None)
    add(8, on_gpu, x, 1024)
    assert devices == [other]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called_at_each_launch(add: Launch, hook: str) -> None:
    x, hooks = torch.zeros(1024), getattr(knobs.runtime, hook)
    called: Any = lambda _metadata: None  # noqa: E731
    assert is_by_triton(add, x, x, 1024)
    hooks.add(called)
    try:
        assert is_by_triton(add, x, x, 1024)
    finally:
        hooks.remove(called)
    assert not is_by_triton(add, x, x, 1024)


def test_an_untested_release_uses_tritons_launcher(gpu: Any, monkeypatch: Any) -> None:
    assert all(map(is_tested, ("3.6.0", "3.7.1+git1", triton.__version__)))
    assert not any(map(is_tested, ("3.5.1", "3.10.0", "4.0.0")))
    monkeypatch.setattr(launch, "specialize", None)
    run, x = Launch(add_kernel, Choice(1, 128, 128)), torch.zeros(1024)
    for _ in range(2):
        assert is_by_triton(run, x, x, 1024)
    assert len(gpu.launched) == 2
