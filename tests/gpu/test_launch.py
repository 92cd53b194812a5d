"""A prepared launch passes the same arguments to the launcher as Triton does; needs no GPU."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

pytest.importorskip("triton")

import compile_ahead as ahead
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import JITFunction, driver

from pyfused import kernels
from pyfused.backends.versions import is_tested
from pyfused.kernels import launch
from pyfused.kernels.launch import Choice, Launch


class Driver:
    """A fake GPU driver that records launches.

    It uses device numbers that no GPU has, because compiled kernels are cached by device.
    """

    def __init__(self) -> None:
        self.device = 1000
        self.launched: list[tuple[str, int, Any]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 232_448, "warpSize": 32},
        )

    def launcher_cls(self, _source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append((metadata.name, self.device, arguments))

    def get_current_target(self) -> Any:
        return ahead.TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None) -> int:
        return 100 + (device or 0)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


DRIVER = Driver()


@pytest.fixture
def recorder() -> Iterator[Driver]:
    cached = launch.warp_size, launch.backend, launch.prepared
    driver.set_active(DRIVER)
    for function in cached:
        function.cache_clear()
    DRIVER.launched.clear()
    with patch.object(DRIVER, "device", 1000):
        yield DRIVER
    driver.set_active(None)  # reset to the real driver
    for function in cached:
        function.cache_clear()


def described(arguments: Any) -> Any:
    """Replaces tensors by their types, because each call has new tensors."""
    if isinstance(arguments, tuple):
        return tuple(map(described, arguments))
    is_tensor = isinstance(arguments, torch.Tensor)
    return (arguments.dtype, arguments.shape) if is_tensor else arguments


@pytest.mark.parametrize("name", ahead.QUICK)
def test_arguments_equal_those_of_triton(name: str, recorder: Driver) -> None:
    case = next(case for case in ahead.all_cases() if case.name == name)
    by_triton = lambda run, programs, *arguments: run.by_triton(programs, arguments)  # noqa: E731
    with patch.object(launch.Launch, "__call__", by_triton):
        case.run()
    of_triton = recorder.launched.copy()
    for _ in range(2):  # the second launch uses the compiled kernel
        recorder.launched.clear()
        case.run()
        for (*kernel, found), (*expected_kernel, expected) in zip(
            recorder.launched, of_triton, strict=True
        ):
            assert kernel == expected_kernel
            grid_and_stream, function, options = found[:4], *found[4:6]
            assert (grid_and_stream, function, options) == (expected[:4], *expected[4:6])
            assert described(found[9:]) == described(expected[9:])  # 6 to 8 are for hooks


def test_every_kernel_has_its_constants_last() -> None:
    modules = [
        importlib.import_module(f"pyfused.kernels.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    ]
    found = {
        kernel
        for module in modules
        for kernel in vars(module).values()
        if isinstance(kernel, JITFunction) and kernel.fn.__name__.endswith("_kernel")
    }
    assert len(found) > 10
    for kernel in found:
        constant = [parameter.is_constexpr for parameter in kernel.params]
        assert constant == sorted(constant), kernel.fn.__name__


@triton.jit
def add_kernel(x, out, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + lanes, tl.load(x + lanes, mask=lanes < n) + 1, mask=lanes < n)


@pytest.fixture
def add(recorder: Driver) -> Launch:
    return Launch(add_kernel, Choice(1, 128, 128))


def compiled_by_triton(add: Launch, *arguments: Any) -> bool:
    """Returns whether a launch with these arguments uses Triton's launcher."""
    with patch.object(Launch, "by_triton", autospec=True, side_effect=Launch.by_triton) as way:
        add(4, *arguments)
    return way.called


def test_specializations_are_distinguished(add: Launch) -> None:
    x = torch.zeros(1024)
    given: list[tuple[Any, ...]] = [
        (x, x, 1024),
        (x, x, 1023),  # not divisible by 16
        (x, x, 1),
        (x, x, 1 << 40),
        (x[1:], x, 1024),  # not aligned
        (x.double(), x, 1024),
        (x, x.half(), 1024),
    ]
    for arguments in given:
        assert compiled_by_triton(add, *arguments)
        assert not compiled_by_triton(add, *arguments)
    assert not compiled_by_triton(add, x, x, 2048)
    assert not compiled_by_triton(add, x.clone(), x.clone(), 1008)


def test_kernels_are_cached_per_device(add: Launch, recorder: Driver) -> None:
    x = torch.zeros(1024)
    add(8, x, x, 1024)
    recorder.device = 1001
    assert compiled_by_triton(add, x, x, 1024)
    assert not compiled_by_triton(add, x, x, 1024)
    assert [arguments[3] for *_, arguments in recorder.launched] == [1100, 1101, 1101]


@pytest.mark.parametrize("hooked", [False, True])
def test_a_launch_goes_to_the_device_of_the_tensor(
    hooked: bool, add: Launch, recorder: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        with patch.object(recorder, "device", index):
            yield

    x = torch.zeros(1024)
    on_gpu = Mock(wraps=x, get_device=lambda: 1001)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(add, "compiles", not hooked)
    launched = Mock(side_effect=lambda *_: devices.append(recorder.device))
    devices: list[int] = []
    monkeypatch.setattr(add, "by_triton", launched)
    monkeypatch.setattr(launch, "specialize", lambda *_: None)
    add(8, on_gpu, x, 1024)
    assert devices == [1001]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called_at_each_launch(add: Launch, hook: str) -> None:
    x = torch.zeros(1024)
    assert compiled_by_triton(add, x, x, 1024)

    def called(_metadata: Any) -> None:
        pass

    hooks = getattr(knobs.runtime, hook)
    hooks.add(called)
    try:
        assert compiled_by_triton(add, x, x, 1024)
    finally:
        hooks.remove(called)
    assert not compiled_by_triton(add, x, x, 1024)


def test_an_untested_release_uses_tritons_launcher(
    recorder: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(map(is_tested, ("3.6.0", "3.7.1+git1", triton.__version__)))
    assert not any(map(is_tested, ("3.5.1", "3.10.0", "4.0.0")))
    monkeypatch.setattr(launch, "specialize", None)
    run, x = Launch(add_kernel, Choice(1, 128, 128)), torch.zeros(1024)
    for _ in range(2):
        assert compiled_by_triton(run, x, x, 1024)
    assert len(recorder.launched) == 2
