"""Fixtures and settings of all test files."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grid
import hypothesis
import interpreter
import pytest
import torch

import pyfused
from pyfused.adopt import lazy_logits
from pyfused.backends import backend_of, cpu
from pyfused.dispatch import reasons, sizes

if device := os.environ.get("PYFUSED_TEST_DEVICE"):
    torch.set_default_device(device)
# No test depends on what is faster on this processor; child processes read the variable.
os.environ.setdefault("PYFUSED_HALF_PRODUCTS", "half")
cpu.HALF_PRODUCTS = os.environ["PYFUSED_HALF_PRODUCTS"]
# Warnings from threads of Inductor's workers would fail unrelated tests.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# The compiler's cache keys do not include the tables and kernels that tests replace.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
collect_ignore = interpreter.OTHERS if interpreter.ON else []
backend = backend_of(torch.empty(0))  # the backend under test


# Files that start processes or build C++.
SLOW = (
    *("test_compile_ahead", "test_import", "test_limits", "test_parallel"),
    *("test_processes", "test_vec", "test_vocab_parallel", "test_wrapped_heads"),
)

# Files with many tests that compile; single tests in other files use the fixture `compiler`.
COMPILES = "test_backends", "test_convert", "test_formula", "test_patch"


def pytest_addoption(parser: pytest.Parser) -> None:
    full = "run all combinations of parameters, and tests that take minutes, gigabytes or builds"
    slow = "also run tests that start processes, build packages or run examples; in --full"
    parser.addoption("--full", action="store_true", help=full)
    parser.addoption("--slow", action="store_true", help=slow)


def pytest_configure(config: pytest.Config) -> None:
    formulas = Path(__file__).parents[1] / "csrc" / "formulas_checksum.inc"
    compiled = getattr(cpu.native, "formulas_checksum", None)
    if compiled and formulas.exists() and f" = {compiled}u;" not in formulas.read_text("utf-8"):
        changed = "csrc/*_formulas.inc have changed since the kernels were compiled"
        built = "make formulas OP=... compiles only one of the instruction sets"
        raise pytest.UsageError(f"{changed}, and {built}: run make build")
    config.addinivalue_line("markers", "thresholds: small inputs run torch's operators, as usual")
    config.addinivalue_line("markers", "interpreted: tests of a family that also run interpreted")
    config.addinivalue_line("markers", "cpu: tests of the C++ kernels, or of torch on CPUs")
    config.addinivalue_line("markers", "large: tests that need minutes or gigabytes; see --full")
    if interpreter.ON:
        config.addinivalue_line("filterwarnings", "ignore:All-NaN slice:RuntimeWarning")
    grid.FULL = config.getoption("full")
    grid.SLOW = grid.FULL or config.getoption("slow")
    examples = 20 if grid.FULL else 4, 100 if grid.FULL else 16
    hypothesis.settings.register_profile(
        "repeatable",
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=examples[not interpreter.ON],
    )
    hypothesis.settings.register_profile("search", deadline=None, max_examples=5000)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
    # Parallel regions would take longer than the tests, especially on busy cores;
    # tests of several threads set another number.
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cpu") and backend is not cpu:
        pytest.skip("cpu: applies only to the C++ kernels")
    if item.get_closest_marker("thresholds") and sizes.FORCED:
        pytest.skip("thresholds: a forced backend runs kernels at every size")
    if item.get_closest_marker("large") and not grid.FULL:
        pytest.skip("large: run with --full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_left_out(item: pytest.Item) -> bool:
        if interpreter.ON and not grid.FULL and item.path.name not in interpreter.WHOLE:
            return not item.get_closest_marker("interpreted")
        slow = item.path.stem in SLOW or item.get_closest_marker("slow")
        return bool(slow) and not grid.SLOW

    left_out = {item for item in items if is_left_out(item)}
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]


@contextlib.contextmanager
def fused_always() -> Iterator[None]:
    """Runs kernels for tensors of any size; by default, torch's operators compute tiny tensors."""
    with sizes.every_size():
        yield


@contextlib.contextmanager
def fused_by_size() -> Iterator[None]:
    """Leaves small calls to torch, as users do, within `fused_always`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "FORCED", None)
        yield


@pytest.fixture(autouse=True)
def fused(request: pytest.FixtureRequest) -> Iterator[None]:
    measured = request.node.get_closest_marker("thresholds")
    if request.path.stem in COMPILES and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    with contextlib.nullcontext() if measured else fused_always():
        yield


@pytest.fixture
def compiler() -> None:
    """Resets the compiler, because sizes that earlier tests changed would become dynamic."""
    torch.compiler.reset()


@pytest.fixture
def compiled_always(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes heads of all sizes custom operators; by default, small ones are torch's operators."""
    for op in sizes.COMPILED:
        monkeypatch.setitem(sizes.COMPILED, op, (0, 0))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


# The functions of a backend that implement one operator.
BY_NAME = (
    *("cross_entropy", "kl_div_with_logits", "nll_loss", "row_state", "row_gradients"),
    "add_product",
)


class KernelCalls(Counter[str]):
    """Counts the calls of each kernel; separate backward kernels have their own names."""

    def record(self, family: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            name = family if family in BY_NAME else getattr(args[0], "name", args[0])
            self[f"{name}_backward" if family.endswith("_backward") else name] += 1
            return function(*args, **kwargs)

        return counted


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch, fused: None) -> KernelCalls:
    """Counts kernel calls, because a test must not compare torch with torch."""
    calls = KernelCalls()
    losses = *BY_NAME, "embedding_loss", "pointwise_loss"
    for family in (*losses, "activation", "activation_backward", "softmax", "softmax_backward"):
        if hasattr(backend, family):
            kernels = getattr(backend, family)
            monkeypatch.setattr(backend, family, calls.record(family, kernels))
    return calls


os.environ.setdefault("PYFUSED_ISAS", ",".join(x.replace("-", "_") for x in cpu.BUILT) or "all")
# `make formulas OP=name` compiles a changed formula for one instruction set only.
CHECKSUMS = {isa: cpu.load(isa).formulas_checksum for isa in cpu.supported}
COMPILED = [isa for isa in CHECKSUMS if CHECKSUMS[isa] == CHECKSUMS[cpu.capability]]
ISAS = COMPILED if backend is cpu else ["triton"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each instruction set that this CPU supports."""
    if backend is cpu:
        monkeypatch.setattr(cpu, "native", cpu.load(request.param))
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Returns `torch.set_num_threads`, and restores the number afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def switching() -> Iterator[None]:
    """Lets Python switch threads as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# ---- converted heads -----------------------------------------------------------------------------


@pytest.fixture
def reset_warnings() -> None:
    """Lets each test receive the warnings that other tests have received."""
    reasons._reported.clear()


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Counts the losses that were computed without logits."""
    found: list[torch.Tensor] = []
    run = lazy_logits.run
    recorded = lambda *a, **k: found.append(run(*a, **k)) or found[-1]  # noqa: E731
    monkeypatch.setattr(lazy_logits, "run", recorded)
    return found


def pytest_report_header() -> str:
    kernels = f"ISA {', '.join(ISAS)}" if backend is cpu else "Triton"
    return f"pyfused {getattr(pyfused, '__version__', '?')}: {kernels}"
